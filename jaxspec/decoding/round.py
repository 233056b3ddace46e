"""One round: draft a tree, verify it in one forward, accept a path, commit it.

Sample, then match: the target chooses a token after every node, and the tree only decides which
choices are computed in advance. Every token is the target's choice given the tokens before it,
so output is lossless for any tree, one that was drafted knowing the noise of the choices
included. Chains sampled from the drafter are accepted by `decoding.rejection` instead.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.decoding import logprobs, rejection
from jaxspec.decoding.choice import masked
from jaxspec.decoding.fitting import choose_in, fitted, own_sizes, smallest
from jaxspec.decoding.penalties import Written
from jaxspec.decoding.precision import exact_in_float32
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.staircase import VerifySize
from jaxspec.decoding.state import (
    Acceptance,
    Decoder,
    DecodeState,
    Draft,
    Params,
    Verdict,
    Verified,
    write_tokens,
)
from jaxspec.drafters.base import Committed
from jaxspec.models.decoder import forward, unembed
from jaxspec.trees.packing import Packing
from jaxspec.trees.tree import DraftTree, ancestors, pack_bits, unpack_bits


def decode_round(
    decoder: Decoder, params: Params, state: DecodeState, sampling: SamplingRows
) -> DecodeState:
    """Draft, verify, accept, commit, without waiting for the host."""
    draft, state = propose(decoder, params, state, sampling)
    sizes = own_sizes(decoder.drafter, draft.tree)
    size = smallest(sizes, draft.tree, state.done)
    verdict = judge(decoder, params, state, sampling, draft, sizes, size)
    return commit(decoder, params, state, sampling, verdict)


@exact_in_float32
def propose(
    decoder: Decoder, params: Params, state: DecodeState, sampling: SamplingRows
) -> tuple[Draft, DecodeState]:
    """The drafter's half: drafts a tree per row, of at most the row's budget of nodes."""
    if decoder.rejection:
        return rejection.propose(decoder, params, state, sampling)
    tree, drafted = decoder.drafter.draft(
        params.drafter,
        state.drafter,
        state.anchor,
        state.position,
        state.budget,
        sampling.noise,
    )
    return Draft(tree), dataclasses.replace(state, drafter=drafted)


@exact_in_float32
def judge(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    sampling: SamplingRows,
    draft: Draft,
    sizes: tuple[VerifySize, ...],
    size: jax.Array | int,
) -> Verdict:
    """The target's half: verifies and accepts, in a forward of `sizes[size]`.

    Args:
      sizes, size: `sizes[size]` holds the drafts of all running rows (`fitting.smallest`).
    """

    def in_size(draft: Draft, packing: Packing | None) -> Verdict:
        verified = verify(decoder, params, state, draft.tree, packing)
        acceptance = accept(decoder, state, sampling, draft, verified)
        path = acceptance.path
        asked, top = sampling.logprobs, decoder.top_logprobs
        return Verdict(
            acceptance=acceptance,
            tokens=jnp.take_along_axis(draft.tree.tokens, path, axis=1),
            taps=jnp.take_along_axis(verified.taps, path[..., None], axis=1),
            rows=verified.rows.take(path),
            nodes=draft.tree.valid.sum(axis=1),
            logprobs=logprobs.of_path(
                verified.logits, packing, path, acceptance.tokens, asked, top
            ),
        )

    return fitted(in_size, decoder.drafter, draft, state.done, sizes, size)


def verify(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    tree: DraftTree,
    packing: Packing | None = None,
) -> Verified:
    """One forward of the target over all nodes, or over the packed ones."""
    bits = ancestors(tree)
    output = forward(
        params.target,
        decoder.config,
        tree.tokens,
        tree.depths,
        bits,
        state.cache,
        state.position,
        taps=decoder.drafter.taps,
        packing=packing,
        implementation=decoder.implementation,
    )
    logits = unembed(params.target, output.hidden)
    taps = output.taps if packing is None else packing.spread(output.taps)
    return Verified(bits, logits, taps, output.rows, packing)


def accept(
    decoder: Decoder,
    state: DecodeState,
    sampling: SamplingRows,
    draft: Draft,
    verified: Verified,
) -> Acceptance:
    """The path that the target takes through the draft, and the token after it."""
    allowed, packing = draft.allowed, verified.packing
    if allowed is not None and packing is not None:
        allowed = packing.gather(allowed)
    verified = dataclasses.replace(verified, logits=masked(verified.logits, allowed))
    tree, depth = draft.tree, min(decoder.drafter.depth, draft.tree.size - 1)
    written = Written.before(
        state.tokens,
        start=state.start,
        length=state.length,
        tree=tree,
        ancestors=verified.ancestors,
    )
    if draft.drawn is not None:
        return rejection.accept(draft.drawn, verified, state.position, sampling, written)
    choices = choose_in(tree, verified, state.length, sampling, depth, written)
    return accept_matches(tree, verified.ancestors, choices, depth)


def accept_matches(
    tree: DraftTree, ancestors: jax.Array, choices: jax.Array, max_depth: int
) -> Acceptance:
    """Follows the target's choices from the root.

    At each node the child that equals the target's choice, if any, is accepted; the first
    choice without a child is the bonus token.

    Args:
      tree: the drafted tree.
      ancestors: its ancestor bits, uint32 [B, N, ceil(N / 32)].
      choices: [B, N] int32, the target's choice after each node.
      max_depth: P, the deepest a node can be.
    """
    n = tree.size
    expected = jnp.take_along_axis(choices, jnp.maximum(tree.parents, 0), axis=1)
    matches = tree.valid & ((tree.tokens == expected) | (jnp.arange(n) == 0))
    # A node is reached iff it and all its ancestors match: no mismatch among its bits, and
    # depth + 1 bits. Without the second test a node whose parent was removed could pass.
    mismatches = pack_bits(~matches)[:, None, :]
    above = jnp.sum(jax.lax.population_count(ancestors), axis=-1, dtype=jnp.int32)
    reached = jnp.all((ancestors & mismatches) == 0, axis=-1) & (above == tree.depths + 1)
    leaf = jnp.argmax(jnp.where(reached, tree.depths, -1), axis=-1)[:, None]  # [B, 1]

    count = jnp.take_along_axis(tree.depths, leaf, axis=1)[:, 0] + 1
    on_path = unpack_bits(jnp.take_along_axis(ancestors, leaf[..., None], axis=1)[:, 0], n)
    at_depth = tree.depths[:, None, :] == jnp.arange(max_depth + 1)[:, None]
    path = jnp.argmax(on_path[:, None, :] & at_depth, axis=-1).astype(jnp.int32)  # [B, P + 1]
    # The choice after path[d] is the token decided at depth d + 1: accepted while
    # d + 1 < count, the bonus at d + 1 = count.
    return Acceptance(path=path, count=count, tokens=jnp.take_along_axis(choices, path, axis=1))


@exact_in_float32
def commit(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    sampling: SamplingRows,
    verdict: Verdict,
) -> DecodeState:
    """Writes the P + 1 rows of the path at the anchor's position and moves `length`.

    Keys and values past the accepted ones are garbage that no later forward sees: visibility
    ends at `length - 1`, and the next round overwrites them. A finished row keeps its tokens,
    its length and its target cache, but not its drafter's state.
    """
    acceptance, running = verdict.acceptance, ~state.done
    anchor_position = state.length - 1
    stops = jnp.any(acceptance.tokens[..., None] == sampling.stop_ids[:, None, :], axis=-1)
    index = jnp.arange(acceptance.path.shape[1])
    stops = stops & (index < acceptance.count[:, None])  # [B, P + 1]
    stopped = jnp.any(stops, axis=1)
    decided = jnp.where(stopped, jnp.argmax(stops, axis=1) + 1, acceptance.count)
    decided = jnp.where(running, decided, 0)
    length = jnp.minimum(state.length + decided, state.limit)

    observed = Committed(
        tokens=verdict.tokens,
        features=verdict.taps,
        position=state.position,
        count=length - state.length,
    )
    batch = jnp.arange(running.shape[0])

    def write(kept, new):
        return write_tokens(kept, new, state.length, length)

    return dataclasses.replace(
        state,
        tokens=write(state.tokens, acceptance.tokens),
        length=length,
        done=state.done | stopped | (length >= state.limit),
        # Orders the write after all reads of the cache (`KVCache.write`).
        cache=state.cache.write(
            verdict.rows, anchor_position, observed.count, after=acceptance.tokens
        ),
        drafter=decoder.drafter.observe(params.drafter, state.drafter, observed),
        rounds=state.rounds + running,
        committed=state.committed.at[batch, state.rounds].add(decided),
        nodes=state.nodes + jnp.where(running, verdict.nodes, 0),
        logprobs=jax.tree.map(write, state.logprobs, verdict.logprobs),
    )
