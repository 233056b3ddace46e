"""One round: draft a tree, verify it in one forward, accept a path, commit it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxspec.config import TargetConfig
from jaxspec.decoding.accept import accept
from jaxspec.decoding.commit import Verdict, commit
from jaxspec.decoding.reject import accept_sampled, round_keys
from jaxspec.decoding.sampling import SamplingRows, choose, log_law
from jaxspec.decoding.state import DecodeState
from jaxspec.drafters.base import Drafter
from jaxspec.models.decoder import forward, unembed
from jaxspec.models.params import TargetParams
from jaxspec.trees.packing import pack_nodes
from jaxspec.trees.tree import DraftTree, ancestors, chain


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The static half of decoding: hashable, an argument of every jitted function of it.

    Attributes:
      config: of the target.
      drafter: proposes trees.
      chunk: prompt tokens per forward; capacities are multiples of it.
      rejection: the drafter draws chains (`draft_sampled`), verified by rejection sampling;
        otherwise trees are verified by sample-then-match. Both are lossless; only the latter
        gives plain sampling's tokens at the same seed.
      implementation: of tree attention.
      cache_dtype: of the target's and the drafter's keys and values; None for that of the
        target's weights. "float32" makes bfloat16 models faster on a CPU, where XLA converts
        whole caches to write rows.
    """

    config: TargetConfig
    drafter: Drafter
    rejection: bool = False
    chunk: int = 128
    implementation: str | None = None
    cache_dtype: str | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """The weights a round reads."""

    target: TargetParams
    drafter: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """What a round verifies.

    Attributes:
      tree: N nodes per row.
      drawn: with rejection sampling, the chain the tree holds and the laws it was drawn from.
    """

    tree: DraftTree
    drawn: Any = None


def decode_round(
    decoder: Decoder, params: Params, state: DecodeState, sampling: SamplingRows
) -> DecodeState:
    """Draft, verify, commit; nothing in it waits for the host."""
    draft, state = propose(decoder, params, state, sampling)
    verdict = verify(decoder, params, state, sampling, draft)
    return commit(state, decoder.drafter, params.drafter, verdict, sampling.stop_ids)


def propose(
    decoder: Decoder, params: Params, state: DecodeState, sampling: SamplingRows
) -> tuple[Draft, DecodeState]:
    """The drafter's half: a tree per row, at most the row's budget of nodes."""
    drafter, position = decoder.drafter, state.length - 1
    anchor = state.anchor
    drafted_from = params.drafter, state.drafter, anchor, position
    if decoder.rejection:
        keys, _ = round_keys(sampling.key, position)
        drawn, drafted = drafter.draft_sampled(*drafted_from, sampling.temperature, keys)
        lengths = jnp.minimum(drawn.lengths, jnp.minimum(state.budget, drafter.size) - 1)
        drawn = dataclasses.replace(drawn, lengths=lengths)
        tree = chain(anchor, drawn.tokens, lengths, drawn.log_confidence, size=drafter.size)
        draft = Draft(tree, drawn)
    else:
        tree, drafted = drafter.draft(*drafted_from, state.budget)
        draft = Draft(tree)
    return draft, dataclasses.replace(state, drafter=drafted)


@dataclasses.dataclass(frozen=True)
class VerifySize:
    """Room of a forward: nodes of all rows together, and of one row; roots included."""

    total: int
    per_row: int

    def depth(self, drafter: Drafter, draft: Draft) -> int:
        """The longest path that a row's nodes can make; a drawn chain has its own length."""
        return (
            drafter.depth if draft.drawn is not None else min(drafter.depth, self.per_row - 1)
        )


def verify(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    sampling: SamplingRows,
    draft: Draft,
    sizes: tuple[VerifySize, ...] | None = None,
    at_least: jax.Array | int = 0,
) -> Verdict:
    """The target's half: one forward over the tree, and the path it accepts.

    The forward has the smallest size that holds every running row's tree, so that a round with
    little to verify costs little.

    Args:
      sizes: ascending, the last large enough for every draft; the drafter's `verify_sizes` for
        every row, and the whole tree, by default.
      at_least: index of the smallest size to use.
    """
    batch, full = draft.tree.tokens.shape
    if sizes is None:
        own = (*sorted(n for n in decoder.drafter.verify_sizes if n < full), full)
        sizes = tuple(VerifySize(batch * n, n) for n in own)
    if len(sizes) == 1:
        return _verify(decoder, params, state, sampling, draft, sizes[0])
    running = draft.tree.valid & ~state.done[:, None]
    fits = (jnp.array([size.total for size in sizes]) >= running.sum()) & (
        jnp.array([size.per_row for size in sizes])
        >= jnp.max(jnp.where(running, jnp.arange(1, full + 1), 1))
    )
    width = sizes[-1].depth(decoder.drafter, draft) + 1

    def branch(size):
        return lambda draft: _verify(decoder, params, state, sampling, draft, size).padded(
            width
        )

    branches = [branch(size) for size in sizes]
    return jax.lax.switch(jnp.maximum(jnp.argmax(fits), at_least), branches, draft)


def _verify(decoder, params, state, sampling, draft: Draft, size: VerifySize) -> Verdict:
    """`verify` with one size; the verdict has its depth."""
    drafter, position = decoder.drafter, state.length - 1
    depth = size.depth(drafter, draft)
    tree = jax.tree.map(lambda x: x[:, : size.per_row], draft.tree)
    bits = ancestors(tree)
    packing = None
    if size.total < tree.tokens.size:
        packing = pack_nodes(tree.valid & ~state.done[:, None], size.total)
    output = forward(
        params.target,
        decoder.config,
        tree.tokens,
        tree.depths,
        bits,
        state.cache,
        position,
        taps=drafter.taps,
        packing=packing,
        implementation=decoder.implementation,
    )
    logits = unembed(params.target, output.hidden)
    if draft.drawn is not None:
        _, keys = round_keys(sampling.key, position)
        logits = logits if packing is None else packing.spread(logits)
        laws = log_law(logits[:, : depth + 1], sampling)
        # Rows past the tree are past every chain as well: their laws are never read.
        laws = jnp.pad(laws, ((0, 0), (0, depth + 1 - laws.shape[1]), (0, 0)))
        drawn = draft.drawn
        acceptance = accept_sampled(laws, drawn.tokens, drawn.log_q, drawn.lengths, keys)
    else:
        choices = _choose(logits, tree, position + 1, sampling, depth, packing)
        acceptance = accept(tree, bits, choices, depth)
    path = acceptance.path
    taps = output.taps if packing is None else packing.spread(output.taps)
    return Verdict(
        acceptance=acceptance,
        tokens=jnp.take_along_axis(tree.tokens, path, axis=1),
        taps=jnp.take_along_axis(taps, path[..., None], axis=1),
        rows=output.rows.take(path),
        nodes=tree.valid.sum(axis=1),
    )


def _choose(logits, tree: DraftTree, positions, sampling, max_depth: int, packing) -> jax.Array:
    """`choose` after every node of a tree, packed or not: [B, N]."""
    if packing is None:
        return choose(logits, tree.depths, positions, sampling, max_depth)
    rows = packing.rows
    at = positions[rows] + packing.gather(tree.depths)[0]
    own = jax.tree.map(lambda x: x[rows], sampling)
    root = jnp.zeros((rows.shape[0], 1), jnp.int32)
    return packing.spread(choose(logits[0][:, None], root, at, own, 0)[None, :, 0])
