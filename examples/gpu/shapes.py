"""Targets and drafters of published shapes with random weights, made on the device.

The target counts: after token t it predicts t + 1, whatever came before, by a margin larger
than any rounding. Its embedding dominates the layers' outputs, and its LM head is the embedding
shifted by one row (if tied, it repeats t). The cost of a round does not depend on weights, and
a long bfloat16 generation does not depend on how many nodes are verified at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.config import DrafterConfig, TargetConfig, TreeConfig
from jaxspec.decoding.sampling import greedy_rows
from jaxspec.decoding.state import Params, Requests
from jaxspec.drafters.block import BlockDrafter, BlockParams, block_params
from jaxspec.drafters.weights import abstract_weights
from jaxspec.models.params import TargetParams, abstract_params
from jaxspec.models.presets import PRESETS
from jaxspec.planning.setup import published_drafter
from jaxspec.planning.steps import Given
from jaxspec.trees.tree import NO_PARENT, DraftTree

TINY = TargetConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
MODELS = {"tiny": TINY} | {name: c for name, c in PRESETS.items() if "-2507" not in name}
CONDITIONED = ("path_conditioned", "transitions")  # trees of drafters with a sequential head
WIDTH, RANK = 7, 256


def case_parts(name: str) -> tuple[str, int]:
    """ "best_first64" -> ("best_first", 64); 0 where no number follows."""
    kind, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
    return kind, int(number or 0)


def dtype_here(name: str | None = None):
    """bfloat16 on a GPU and float32 on a CPU, unless named."""
    return jnp.dtype(name or ("bfloat16" if jax.default_backend() == "gpu" else "float32"))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key, scale, *, shape, dtype):
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def fill(spec, seed: int, scale=lambda name: 0.02):
    """Random arrays of given shapes; vectors, which are norms and biases, are ones."""
    leaves, tree = jax.tree.flatten_with_path(spec)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def make(path, leaf, key):
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        name = getattr(path[-1], "name", "")
        return normal(key, scale(name), shape=leaf.shape, dtype=leaf.dtype)

    made = [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, made)


def random_target(config: TargetConfig, dtype) -> TargetParams:
    """Weights of a target that counts."""
    scales = dict(embed=1.0) | dict.fromkeys(("out", "output", "down", "shared_down"), 5e-4)
    spec = dataclasses.replace(abstract_params(config, dtype), lm_head=None)
    made = fill(spec, 0, lambda name: scales.get(name, 0.02))
    if config.tie_embeddings:
        return made
    return dataclasses.replace(made, lm_head=_roll(made.embed))


@jax.jit
def _roll(table):
    return jnp.roll(table, 1, axis=0)


def drafter_config(config: TargetConfig, kind: str) -> DrafterConfig:
    """A published drafter; with a Markov head where the tree needs a sequential one.

    The tiny target's has one layer, so that it is soon compiled.
    """
    own = published_drafter(config)
    if config == TINY:
        own = dataclasses.replace(
            own, num_layers=1, causal=own.causal[:1], window=own.window[:1]
        )
    if kind in CONDITIONED:
        return dataclasses.replace(own, sequential="markov", rank=RANK)
    return own


def block_drafter(config: TargetConfig, kind: str, nodes: int) -> BlockDrafter:
    return BlockDrafter(drafter_config(config, kind), TreeConfig(kind, size=nodes, width=WIDTH))


class Weights:
    """The target's weights and those of each drafter that is asked for, made once."""

    def __init__(self, config: TargetConfig, dtype):
        self.config, self.dtype = config, dtype
        self.target = jax.block_until_ready(random_target(config, dtype))
        self._heads: dict[DrafterConfig, BlockParams] = {}

    def drafter(self, own: DrafterConfig) -> BlockParams:
        if own not in self._heads:
            head = fill(abstract_weights(own, self.dtype), 1)
            self._heads[own] = jax.block_until_ready(block_params(head, self.target))
        return self._heads[own]

    def params(self, drafter) -> Params:
        """For a decoder; drafters that are no block drafter have none."""
        block = isinstance(drafter, BlockDrafter)
        return Params(self.target, self.drafter(drafter.config) if block else ())


@dataclasses.dataclass(frozen=True)
class Branches(Given):
    """A given tree of `size` nodes: branches of `depth` random tokens hang from the root."""

    depth: int = 15

    def init(self, params, batch: int, capacity: int) -> DraftTree:
        node = np.arange(self.size)
        depths = np.where(node == 0, 0, 1 + (node - 1) % self.depth)
        parents = np.where(depths <= 1, 0, node - 1)
        parents[0] = NO_PARENT
        tokens = np.random.default_rng(0).integers(0, 512, self.size)
        row = lambda x, dtype: jnp.tile(jnp.asarray(x, dtype), (batch, 1))  # noqa: E731
        return DraftTree(
            tokens=row(tokens, jnp.int32),
            parents=row(parents, jnp.int32),
            depths=row(depths, jnp.int32),
            scores=row(-depths, jnp.float32),
            valid=row(node >= 0, bool),
        )


def requests(
    config: TargetConfig, *, batch: int, length: int, capacity: int, new_tokens: int, nodes: int
) -> Requests:
    """Random prompts of one length, greedy, without stop ids, on the device."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((batch, capacity), np.int32)
    tokens[:, :length] = rng.integers(0, config.vocab_size, (batch, length))
    row = lambda value, dtype=np.int32: np.full(batch, value, dtype)  # noqa: E731
    sampling = greedy_rows(jax.random.split(jax.random.key(0), batch))
    return jax.device_put(Requests(tokens, row(length), row(new_tokens), row(nodes), sampling))
