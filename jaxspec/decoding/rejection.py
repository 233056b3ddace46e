"""Rejection sampling for chains sampled from the drafter: exact for any draft distribution.

Only for drafts that were *sampled* from the distribution q they are verified against. A draft
that is an argmax or a top-k entry was not: accepting it with min(1, p / q) biases the output,
so trees are accepted by `round.accept_matches` instead.

Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspec.decoding.choice import log_law
from jaxspec.decoding.penalties import Written
from jaxspec.decoding.sampling import SamplingRows
from jaxspec.decoding.state import Acceptance, Decoder, DecodeState, Draft, Params, Verified
from jaxspec.trees.tree import chain


def propose(
    decoder: Decoder, params: Params, state: DecodeState, sampling: SamplingRows
) -> tuple[Draft, DecodeState]:
    """Samples a chain from the drafter per row, of at most the row's budget of nodes."""
    drafter, position = decoder.drafter, state.position
    keys, _ = round_keys(sampling.key, position)
    drawn, drafted = drafter.draft_sampled(
        params.drafter, state.drafter, state.anchor, position, sampling.temperature, keys
    )
    lengths = jnp.minimum(drawn.lengths, jnp.minimum(state.budget, drafter.size) - 1)
    drawn = dataclasses.replace(drawn, lengths=lengths)
    tree = chain(state.anchor, drawn.tokens, lengths, drawn.log_confidence, size=drafter.size)
    return Draft(tree, drawn), dataclasses.replace(state, drafter=drafted)


def accept(
    drawn: Any,
    verified: Verified,
    position: Int[Array, " B"],
    sampling: SamplingRows,
    written: Written,
) -> Acceptance:
    """The accepted part of a drawn chain, and the token after it.

    Args:
      drawn: the chain whose nodes were verified, cut to its `lengths`.
      position: [B] int32, of the anchor.
      written: the text before the choice after each node.
    """
    count = drawn.tokens.shape[1] + 1
    logits, packing = verified.logits, verified.packing
    logits = logits if packing is None else packing.spread(logits)
    laws = log_law(logits[:, :count], position + 1, sampling, written)
    # Rows past the tree are past every chain too, so their distributions are never read.
    laws = jnp.pad(laws, ((0, 0), (0, count - laws.shape[1]), (0, 0)))
    _, keys = round_keys(sampling.key, position)
    return accept_chain(
        laws, drawn.tokens, drawn.log_q, drawn.lengths, keys, support=drawn.support
    )


def round_keys(keys: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [B] for drawing a round's draft and for verifying it, from the requests' own.

    The target's plain choices fold absolute positions into the requests' keys; no position
    reaches the numbers folded in here, so the three streams are independent.

    Args:
      keys: [B] typed keys of the requests, not consumed.
      position: [B] int32, of the anchor.
    """
    last = jnp.uint32(2**32 - 1)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    at = jax.vmap(jax.random.fold_in)
    return at(fold(keys, last), position), at(fold(keys, last - 1), position)


def acceptance_probability(
    target_log_probs: Float[Array, "*L V"],
    log_q: Float[Array, "*L C"],
    drafted: Int[Array, "*L"],
    support: Int[Array, ...] | None = None,
) -> Float[Array, "*L"]:
    """min(1, p(x) / q(x)) of drafted tokens x [...]: float32 [...].

    Args:
      target_log_probs: [..., V].
      log_q: [..., C].
      support: the tokens that `log_q` is over, int32, broadcasts to its shape; None for all.
    """
    at = drafted[..., None]
    log_p = jnp.take_along_axis(target_log_probs, at, axis=-1)[..., 0]
    if support is None:
        log_q_drafted = jnp.take_along_axis(log_q, at, axis=-1)[..., 0]
    else:
        log_q_drafted = jnp.max(jnp.where(support == at, log_q, -jnp.inf), axis=-1)
    return jnp.exp(jnp.minimum(log_p - log_q_drafted, 0.0))


def scatter_law(
    log_q: Float[Array, "B C"], support: Int[Array, "B C"], vocab: int
) -> Float[Array, "B {vocab}"]:
    """Log-probabilities over some tokens, scattered to all tokens: [B, C] -> [B, V]."""
    never = jnp.full((log_q.shape[0], vocab), -jnp.inf, log_q.dtype)
    return never.at[jnp.arange(log_q.shape[0])[:, None], support].set(log_q)


def residual(
    target_log_probs: Float[Array, "*L V"], log_q: Float[Array, "*L V"]
) -> Float[Array, "*L V"]:
    """max(p - q, 0), unnormalised, from log-probabilities [..., V]; p itself if that is 0.

    A rejected draft's token is drawn from it, so that the overall distribution is p.
    """
    p = jnp.exp(target_log_probs)
    excess = jnp.maximum(p - jnp.exp(log_q), 0.0)
    # The excess vanishes, up to rounding, only where p = q, and there nothing is rejected.
    return jnp.where(excess.sum(axis=-1, keepdims=True) > 1e-8, excess, p)


def accept_by_rejection(
    target_log_probs: Float[Array, "B _ V"],
    drafted: Int[Array, "B P"],
    log_q: Float[Array, "B P C"],
    lengths: Int[Array, " B"],
    keys: jax.Array,
    *,
    support: jax.Array | None = None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Accepts a prefix of a sampled chain and draws the token after it.

    Args:
      target_log_probs: [B, P + 1, V] float32, normalised; row d is the target's distribution
        after d drafted tokens.
      drafted: [B, P] int32.
      log_q: [B, P, C] float32, the distributions that the drafts were sampled from.
      lengths: [B] int32, drafts to verify, 0 … P; whether slot j is verified must not depend
        on its own token or on later ones.
      keys: [B] typed keys, consumed.
      support: the tokens that `log_q` is over, int32 [B, P, C] or [C]; None for all, C = V.
        Distributions over the vocabulary are built only for the slot after the accepted ones.

    Returns:
      accepted [B] int32, 0 … length; and the next token [B] int32: from the residual after a
      rejection, from the target's distribution after a whole chain.
    """
    depth = drafted.shape[1]
    chance = acceptance_probability(target_log_probs[:, :-1], log_q, drafted, support)
    split = jax.vmap(jax.random.split)(keys)  # [B, 2]
    draws = jax.vmap(lambda key: jax.random.uniform(key, (depth,)))(split[:, 0])
    verified = jnp.arange(depth) < lengths[:, None]
    passed = (verified & (draws < chance)).astype(jnp.int32)
    accepted = jnp.cumprod(passed, axis=1).sum(axis=1)

    def after(laws):  # past the last slot any row of q will do: it is replaced below
        row = jnp.minimum(accepted, laws.shape[1] - 1)
        return jnp.take_along_axis(laws, row[:, None, None], axis=1)[:, 0]

    p, q = after(target_log_probs), after(log_q)  # [B, V], [B, C]
    if support is not None:
        tokens = after(support) if support.ndim == 3 else jnp.broadcast_to(support, q.shape)
        q = scatter_law(q, tokens, p.shape[-1])
    q = jnp.where((accepted < lengths)[:, None], q, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, p.shape[1:], jnp.float32))(split[:, 1])
    token = jnp.argmax(jnp.log(residual(p, q)) + noise, axis=-1)
    return accepted, token.astype(jnp.int32)


def accept_chain(
    target_log_probs: jax.Array,
    drafted: Int[Array, "B P"],
    log_q: Float[Array, "B P C"],
    lengths: Int[Array, " B"],
    keys: jax.Array,
    *,
    support: jax.Array | None = None,
) -> Acceptance:
    """`accept_by_rejection` as an `Acceptance`, for the chain `trees.chain` builds."""
    accepted, token = accept_by_rejection(
        target_log_probs, drafted, log_q, lengths, keys, support=support
    )
    index = jnp.arange(drafted.shape[1] + 1)
    decided = jnp.where(
        index < accepted[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), token[:, None]
    )
    path = jnp.where(index <= accepted[:, None], index, 0).astype(jnp.int32)
    return Acceptance(path=path, count=accepted + 1, tokens=decided)
