"""The records of decoding: static settings, results of each step, state between rounds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxspec.config import TargetConfig
from jaxspec.decoding.logprobs import LogProbs
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.drafters.base import Drafter
from jaxspec.models.params import TargetParams
from jaxspec.models.state import LayerRows, LayerStates
from jaxspec.trees.packing import Packing
from jaxspec.trees.tree import DraftTree


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The static part of decoding: hashable, a static argument of its jitted functions.

    Attributes:
      config: of the target.
      drafter: proposes trees.
      rejection: the drafter samples chains (`draft_sampled`), verified by rejection sampling;
        otherwise trees are verified by sample-then-match. Both are lossless; only the latter
        gives plain sampling's tokens at the same seed.
      chunk: prompt tokens per forward; capacities are multiples of it.
      implementation: of tree attention.
      cache_dtype: dtype of the target's and the drafter's keys and values; None: that of the
        target's weights. "float32" makes bfloat16 models faster on a CPU, where XLA converts
        whole caches to write rows.
      top_logprobs: K, alternatives whose log-probabilities are kept besides every token's, for
        rows that ask; 0 keeps no log-probabilities.
    """

    config: TargetConfig
    drafter: Drafter
    rejection: bool = False
    chunk: int = 128
    implementation: str | None = None
    cache_dtype: str | None = None
    top_logprobs: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """The weights a round reads."""

    target: TargetParams
    drafter: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch to decode.

    Attributes:
      tokens: [B, S] int32, prompts at the left; S is the capacity, a multiple of the chunk that
        leaves P + 1 positions after the last token of every row.
      length: [B] int32, prompt lengths, at least 1.
      max_new_tokens: [B] int32, at least 1.
      budget: [B] int32, nodes verified per round, root included, 1 … N.
      sampling: how each row chooses.
    """

    tokens: jax.Array
    length: jax.Array
    max_new_tokens: jax.Array
    budget: jax.Array
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilling:
    """A batch of prompts during prefill.

    Attributes:
      cache, drafter, logprobs: as in `DecodeState`.
      final: [B, M] float32, hidden state at the last prompt token, once its chunk has run.
    """

    cache: LayerStates
    drafter: Any
    logprobs: LogProbs | None
    final: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of sequences between two rounds.

    The token at `length - 1` is the anchor: it is decided, but the target has not run on it,
    so the cache (and the drafter) hold `length - 1` rows.

    Attributes:
      tokens: [B, S] int32.
      start: [B] int32, length of the prompt.
      length: [B] int32, number of decided tokens, prompt included.
      limit: [B] int32, length at which the row is full.
      done: [B] bool.
      budget: [B] int32, nodes verified per round, root included.
      cache: the target's.
      drafter: the drafter's state.
      rounds: [B] int32.
      committed: [B, S] int32, tokens committed by each round, bonus included. A round cut short
        by `limit` counts in full, as published acceptance lengths do; one that meets a stop
        id counts up to it.
      nodes: [B] int32, nodes verified in all, padding excluded.
      logprobs: [B, S, .] of the decided tokens; None if none are kept.
    """

    tokens: jax.Array
    start: jax.Array
    length: jax.Array
    limit: jax.Array
    done: jax.Array
    budget: jax.Array
    cache: LayerStates
    drafter: Any
    rounds: jax.Array
    committed: jax.Array
    nodes: jax.Array
    logprobs: LogProbs | None

    @property
    def position(self) -> Int[Array, " B"]:
        """Position of the anchor [B], which is also the number of cache rows a round reads; 0
        in finished rows, as attention takes as long as the longest row needs."""
        return jnp.where(self.done, 0, self.length - 1)

    @property
    def anchor(self) -> Int[Array, " B"]:
        """The last decided token of every row."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """The tree that a round verifies, and what restricts it.

    Attributes:
      tree: N nodes per row.
      drawn: with rejection sampling, the chain in the tree and the distributions that it was
        sampled from (`SampledChain`).
      allowed: [B, N, ceil(V / 32)] uint32, bits of the tokens that may follow each node; None
        if all may.
    """

    tree: DraftTree
    drawn: Any = None
    allowed: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """What the target computed for the nodes of a draft.

    Attributes:
      ancestors: uint32 bits [B, N, ceil(N / 32)], of the tree.
      logits: [B, N, V] float32; [1, T, V] with a packing.
      taps: [B, N, len(taps) * M] float32.
      rows: new cache rows of the nodes.
      packing: packing of the nodes that the target ran on; None if it ran on all.
    """

    ancestors: jax.Array
    logits: jax.Array
    taps: jax.Array
    rows: LayerRows
    packing: Packing | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Acceptance:
    """The accepted path of every row.

    Attributes:
      path: [B, P + 1] int32, node at each depth of the accepted path, root first; 0 past it.
      count: [B] int32, nodes on the path, root included (1 … P + 1).
      tokens: [B, P + 1] int32, the decided tokens: those of nodes path[1:count], then the bonus
        at index count - 1; later entries are meaningless.
    """

    path: jax.Array
    count: jax.Array
    tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """The accepted path of a draft, and what the target computed along it.

    Attributes:
      tokens: [B, P + 1] int32, the path's own tokens, root first.
      taps: [B, P + 1, len(taps) * M] float32.
      rows: new cache rows of the path's P + 1 nodes.
      nodes: [B] int32, nodes of the tree, padding excluded.
      logprobs: [B, P + 1, .] of the decided tokens; None if none are kept.
    """

    acceptance: Acceptance
    tokens: jax.Array
    taps: jax.Array
    rows: LayerRows
    nodes: jax.Array
    logprobs: LogProbs | None


def write_tokens(
    tokens: Shaped[Array, "B S *X"],
    new: Shaped[Array, "B C *X"],
    start: Int[Array, " B"],
    stop: Int[Array, " B"],
) -> Shaped[Array, "B S *X"]:
    """tokens[b, start[b]:stop[b]] = new[b, :stop[b] - start[b]]; the rest stays.

    Args:
      tokens: tokens, or values per token.
      start, stop: at most C apart.
    """
    index = start[:, None] + jnp.arange(new.shape[1])
    index = jnp.where(index < stop[:, None], index, tokens.shape[1])  # past the end: dropped
    return tokens.at[jnp.arange(tokens.shape[0])[:, None], index].set(new, mode="drop")
