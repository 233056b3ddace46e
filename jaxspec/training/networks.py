"""Initial weights and loss of each kind of drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxspec.config import DrafterConfig, TreeConfig, tree_size
from jaxspec.drafters import registry
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.eagle import eagle_params
from jaxspec.drafters.eagle_head import EagleConfig, ParallelEagleConfig
from jaxspec.drafters.head import Vocabulary, restrict
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.unrolled import unroll
from jaxspec.drafters.weights import bind
from jaxspec.models.params import DeltaNetParams, MoeParams, TargetParams
from jaxspec.models.scaled import by_value, is_scaled
from jaxspec.training.blocks import before_labels, sample_anchors, supervised_slots
from jaxspec.training.features import Features
from jaxspec.training.loading import Rows
from jaxspec.training.losses import LossSums, drafter_loss
from jaxspec.training.recipe import TrainConfig
from jaxspec.training.unrolled_loss import unrolled_loss


@dataclasses.dataclass(frozen=True)
class Network:
    """A kind of drafter, as training sees it.

    Attributes:
      of_target: (config, weights, target) -> weights taken from the target's last layers, by
        path.
      loss: (TrainConfig, weights, target, rows, features, key, kept) -> sums.
    """

    of_target: Callable[..., dict[tuple, jax.Array]]
    loss: Callable[..., LossSums]


def network_of(config: DrafterConfig | EagleConfig) -> Network:
    """The kind of a drafter, by its configuration.

    Raises:
      ValueError: this kind cannot be trained.
    """
    if type(config) not in NETWORKS:
        kinds = ", ".join(kind.__name__ for kind in NETWORKS)
        raise ValueError(
            f"a drafter of {type(config).__name__} cannot be trained; expected one of {kinds}"
        )
    return NETWORKS[type(config)]


def copy_layers(
    config: DrafterConfig | EagleConfig, weights: nnx.State, target: TargetParams
) -> nnx.State:
    """Copies the target's last layers into a drafter's.

    Raises:
      ValueError: their shapes differ.
    """
    if any(isinstance(layer.mlp, MoeParams) for layer in target.layers[-config.num_layers :]):
        raise ValueError(
            "the target's last layers are mixtures of experts, which a drafter cannot "
            "start from; set initial to 'random'"
        )
    if any(map(is_scaled, jax.tree.leaves(target, is_leaf=is_scaled))):
        raise ValueError(
            "the target's weights are in 8 bits, which a drafter cannot start from; load it "
            "with weights 'dequantised', or set initial to 'random'"
        )
    flat = dict(nnx.to_flat_state(weights))
    for path, x in network_of(config).of_target(config, weights, target).items():
        if path in flat and flat[path].shape != x.shape:
            raise ValueError(
                f"the drafter's {'.'.join(map(str, path))} has shape {flat[path].shape}, the "
                f"target's {x.shape}; give the drafter the target's sizes, or set initial to "
                "'random'"
            )
        if path in flat:
            # A copy: the state is donated to every step, the target is not.
            flat[path] = flat[path].replace(jnp.array(x, jnp.float32))
    return nnx.from_flat_state(list(flat.items()))


def trained_drafter(
    config: DrafterConfig | EagleConfig,
    weights: nnx.State,
    target,
    tree: TreeConfig | None = None,
    kept: ArrayLike | None = None,
) -> LoadedDrafter:
    """Weights as a drafter for `jaxspec.generate`.

    Args:
      tree: tree to draft; the whole chain by default.
      kept: the draft vocabulary (`block_params`).
    """
    if tree is None:
        tree = TreeConfig("chain", size=tree_size(config.depth + 1))
    return registry.trained(config, weights, target.params, tree, kept=kept)


def _target_layers(
    config: DrafterConfig | EagleConfig, target: TargetParams
) -> dict[tuple, jax.Array]:
    """The target's last layers by the paths of a drafter's weights."""
    taken = {}
    for i, layer in enumerate(target.layers[-config.num_layers :]):
        attention, mlp = layer.attention, layer.mlp
        if isinstance(attention, DeltaNetParams) or attention.gated:
            raise ValueError(
                "the target's last layers are gated delta nets or gated attention, which "
                "drafters do not have; set initial to 'random'"
            )
        qkv = by_value(attention.qkv)
        found = {
            "norm": attention.norm,
            "q": qkv[:, :, :-2],
            "kv": qkv[:, :, -2:],
            "q_norm": attention.q_norm,
            "k_norm": attention.k_norm,
            "out": by_value(attention.out),
            "mlp_norm": mlp.norm,
            "gate_up": by_value(mlp.gate_up),
            "down": by_value(mlp.down),
        }
        taken |= {("layers", i, name): x for name, x in found.items() if x is not None}
    return taken


def _block_layers(config, weights, target):
    return _target_layers(config, target)


def _eagle_layers(config, weights, target):
    """Weights from the target's layers; the first layer's embedding half stays as it was."""
    taken, flat = _target_layers(config, target), dict(nnx.to_flat_state(weights))
    taken["layers", 0, "hidden_norm"] = taken.pop(("layers", 0, "norm"))
    for name in ("q", "kv"):
        embedded = flat["layers", 0, name][...][: config.hidden_size]
        parts = [embedded, taken["layers", 0, name]]
        if parts[0].shape[1:] == parts[1].shape[1:]:
            taken["layers", 0, name] = jnp.concatenate(parts)
    return taken


def _block_loss(
    config: TrainConfig, weights, target, rows: Rows, features: Features, key, kept
) -> LossSums:
    depth = config.drafter.depth
    anchors, real = sample_anchors(key, rows.supervised, config.anchors)
    weights, vocabulary = restrict(weights, Vocabulary(target.embed, target.unembed), kept)
    bound = bind(config.drafter, weights)
    blocks = run_blocks(bound, vocabulary, rows.tokens, features.taps, anchors, rows.starts)
    return drafter_loss(
        config.loss,
        bound,
        vocabulary,
        blocks,
        supervised_slots(rows.supervised, anchors, real, depth),
        before_labels(features.hidden, anchors, depth),
    )


def _eagle_loss(
    config: TrainConfig, weights, target, rows: Rows, features: Features, key, kept
) -> LossSums:
    params = eagle_params(weights, target, kept=kept)
    bound = bind(config.drafter, params.head)
    steps, starts, at = config.drafter.steps, rows.starts, None
    if config.anchors:  # an anchor is the token after an index
        anchors, real = sample_anchors(key, rows.supervised, config.anchors)
        length = rows.tokens.shape[1]
        at = jnp.where(real & (anchors > 0), anchors - 1, length)
    outputs = unroll(
        bound, params.vocabulary, rows.tokens, features.taps, starts, at, steps=steps
    )
    # A token counts if the target wrote it and the next one: nothing is drafted after the last.
    following = jnp.pad(rows.supervised[:, 1:], [(0, 0), (0, 1)])
    supervised = rows.supervised & following
    arguments = outputs, rows.tokens, supervised, features.hidden, starts, at
    return unrolled_loss(config.loss, bound, params.vocabulary, *arguments)


NETWORKS = {
    DrafterConfig: Network(of_target=_block_layers, loss=_block_loss),
    EagleConfig: Network(of_target=_eagle_layers, loss=_eagle_loss),
    ParallelEagleConfig: Network(of_target=_eagle_layers, loss=_eagle_loss),
}
