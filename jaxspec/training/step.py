"""One update of a drafter, target forward included, as one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.weights import random_weights
from jaxspec.models.params import TargetParams
from jaxspec.training.batches import PACKED_UNIT, UNIT
from jaxspec.training.features import target_features
from jaxspec.training.loading import Rows
from jaxspec.training.losses import LossSums, SelectionSums
from jaxspec.training.networks import copy_layers, network_of
from jaxspec.training.recipe import OptimizerConfig, TrainConfig
from jaxspec.training.rnn_head import as_markov, slowed
from jaxspec.training.sharding import state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that an update changes.

    Attributes:
      weights: of the head, float32.
      optimizer: optax's state.
      step: int32 scalar, updates so far; random keys are derived from it and the seed.
    """

    weights: nnx.State
    optimizer: Any
    step: jax.Array


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to zero at `steps`."""
    warmup = max(1, round(config.warmup * steps))
    return optax.warmup_cosine_decay_schedule(
        config.learning_rate / warmup, config.learning_rate, warmup, max(steps, warmup + 1)
    )


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; see `transition` for RNN heads."""
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
        ),
    )

    def update(slopes, state, weights=None):  # the state stays as in earlier checkpoints
        updates, state = chain.update(slopes, state, weights)
        return slowed(updates), state

    return optax.GradientTransformation(chain.init, update)


def init_state(
    config: TrainConfig, target: TargetParams, weights: nnx.State | None = None
) -> TrainState:
    """The state before the first update.

    The final norm is always the target's, because the LM head is and expects its scale.

    Args:
      weights: initial weights, instead of random ones or the target's layers.
    """
    if weights is None:
        weights = as_markov(random_weights(config.drafter, jax.random.key(config.seed)))
        weights.norm = weights.norm.replace(jnp.array(target.final_norm, jnp.float32))
        if config.initial == "target":
            weights = copy_layers(config.drafter, weights, target)
    return TrainState(
        weights, optimizer(config.optimizer, config.steps).init(weights), jnp.int32(0)
    )


@functools.partial(
    jax.jit, static_argnames=("config", "target_config", "mesh"), donate_argnames="state"
)
def train_step(
    config: TrainConfig,
    target_config: TargetConfig,
    target: TargetParams,
    state: TrainState,
    rows: Rows,
    mesh: Mesh | None = None,
    kept: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Products run in the target's dtype; sums and weights are float32.

    Args:
      rows: [n, b, ...], n micro-batches.
      mesh: the devices the arrays are placed on (`sharding`); None for one device.
      kept: [V'] int32, the draft vocabulary (`drafters.head.Vocabulary`); None for all tokens.

    Returns:
      The new state, and means over the batch: the loss and its parts, the acceptance of each
      slot under teacher forcing [P], and the norm of the gradient.
    """
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(config.seed), state.step), len(rows.tokens)
    )

    def micro_batch(carry, batch):
        slopes, sums = jax.grad(batch_loss, argnums=3, has_aux=True)(
            config, target_config, target, state.weights, *batch, kept
        )
        return jax.tree.map(jnp.add, carry, (slopes, sums)), None

    zeros = jax.tree.map(jnp.zeros_like, (state.weights, empty_sums(config.drafter)))
    (slopes, sums), _ = jax.lax.scan(micro_batch, zeros, (rows, keys))
    weight = jnp.maximum(sums.weight, 1e-6)
    slopes = jax.tree.map(lambda x: x / weight, slopes)
    updates, optimizer_state = optimizer(config.optimizer, config.steps).update(
        slopes, state.optimizer, state.weights
    )
    metrics = {
        "loss": sums.total / weight,
        "cross_entropy": sums.cross_entropy / weight,
        "kl": sums.kl / weight,
        "total_variation": sums.total_variation / weight,
        "confidence": sums.confidence / weight,
        **_selector_metrics(sums),
        "acceptance": sums.accepted / jnp.maximum(sums.counted, 1),
        "gradient_norm": optax.tree.norm(slopes),
    }
    weights = optax.apply_updates(state.weights, updates)
    state = TrainState(weights, optimizer_state, state.step + 1)
    if mesh is not None:
        state = jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))
        metrics = jax.lax.with_sharding_constraint(
            metrics, NamedSharding(mesh, PartitionSpec())
        )
    return state, metrics


def batch_loss(
    config: TrainConfig,
    target_config: TargetConfig,
    target: TargetParams,
    weights: nnx.State,
    rows: Rows,
    key: jax.Array,
    kept: jax.Array | None = None,
) -> tuple[jax.Array, LossSums]:
    """The undivided loss of rows [b, ...], and its parts. Consumes `key`."""
    dtype = target.embed.dtype
    features = rows.features
    if features is None:
        features = target_features(
            target,
            target_config,
            rows.tokens,
            rows.starts,
            taps=config.drafter.taps,
            chunk=UNIT if rows.starts is None else PACKED_UNIT,
        )
    features = jax.tree.map(lambda x: x.astype(dtype), features)
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    loss = network_of(config.drafter).loss
    sums = loss(config, weights, target, rows, features, key, kept)
    return sums.total, jax.lax.stop_gradient(sums)


def empty_sums(config: DrafterConfig | EagleConfig) -> LossSums:
    """Sums over no positions."""
    zero, slots = jnp.float32(0), jnp.zeros(config.depth)
    selection = None
    if isinstance(config, DrafterConfig) and config.candidates:
        selection = SelectionSums(zero, recalled=slots, oracle=zero, selected=zero, blocks=zero)
    return LossSums(
        total=zero,
        weight=zero,
        cross_entropy=zero,
        kl=zero,
        total_variation=zero,
        confidence=zero,
        accepted=slots,
        counted=slots,
        selection=selection,
    )


def _selector_metrics(sums: LossSums) -> dict[str, jax.Array]:
    """Metrics of a selector: its loss, how often the label is among its candidates by slot
    [P], and tokens per round with perfect choices and with its own."""
    selection = sums.selection
    if selection is None:
        return {}
    blocks = jnp.maximum(selection.blocks, 1)
    return {
        "selector": selection.loss / jnp.maximum(sums.weight, 1e-6),
        "candidate_recall": selection.recalled / jnp.maximum(sums.counted, 1),
        "oracle_length": 1 + selection.oracle / blocks,
        "selected_length": 1 + selection.selected / blocks,
    }
