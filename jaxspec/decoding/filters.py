"""Top-k, top-p and min-p: which tokens a sampled row may choose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxspec.trees.candidates import top_logits

CANDIDATES = 128  # the likeliest tokens, among which filters mostly find what they keep


def filtered(
    logits: Float[Array, "B N V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Float[Array, "B N V"]:
    """Logits over temperature with -inf where a filter of their row drops the token.

    Args:
      logits: float32, over temperature.
      top_k: tokens kept; 0 for all.
      top_p: keeps the likeliest tokens that have this mass together, after top_k; 1 for all.
      min_p: keeps tokens that have this share of the likeliest one's probability.
    """
    return jax.lax.cond(
        jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0)),
        lambda x: jnp.where(kept(x, top_k, top_p, min_p), x, -jnp.inf),
        lambda x: x,
        logits,
    )


def kept(
    logits: Float[Array, "B N V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Bool[Array, "B N V"]:
    """The tokens that the filters of `filtered` keep, with all ties.

    Each node's result depends on its own logits and options alone, so plain and speculative
    decoding keep the same.
    """
    k, mass, share = (x[:, None] for x in (top_k, top_p, min_p))  # against [B, N]
    vocab = logits.shape[-1]
    k = jnp.where((k > 0) & (k < vocab), k, vocab)
    floor, found = _floor_among_candidates(logits, k, mass)
    k, mass = jnp.broadcast_to(k, floor.shape), jnp.broadcast_to(mass, floor.shape)
    floor = jax.lax.platform_dependent(
        floor, found, logits, k, mass, cpu=_complete_each, default=_complete
    )
    floor = jnp.maximum(floor, jnp.max(logits, axis=-1) + jnp.log(share))
    return (logits >= floor[..., None]) & (logits > -jnp.inf)


def _floor_among_candidates(logits, k, mass) -> tuple[jax.Array, jax.Array]:
    """The lowest logit that top-k and top-p keep, from the likeliest tokens.

    Returns:
      floor [B, N], and where it is right [B, N]: elsewhere it depends on further tokens.
    """
    vocab = logits.shape[-1]
    width = min(CANDIDATES, vocab)
    _, top, log_total = top_logits(logits, width)
    last = jnp.min(top, axis=-1)  # a slice would make XLA sort on a CPU
    whole = (last == -jnp.inf) | (width == vocab)  # no other token is possible
    limited = k < vocab
    kth = jnp.minimum(k, width) - 1
    kth = jnp.take_along_axis(top, jnp.broadcast_to(kth, last.shape)[..., None], axis=-1)
    kth = jnp.where(limited, kth[..., 0], -jnp.inf)
    # Tokens beside the candidates may equal the last of them.
    found = whole | ~limited | ((k <= width) & (kth > last))

    in_k = top >= kth[..., None]
    total = jnp.where(limited, jax.nn.logsumexp(top, axis=-1, where=in_k), log_total)
    p = jnp.where(in_k, jnp.exp(top - total[..., None]), 0.0)
    reached = jnp.cumsum(p, axis=-1) >= mass[..., None]
    first = jnp.take_along_axis(top, jnp.argmax(reached, axis=-1)[..., None], axis=-1)[..., 0]
    # Where the candidates have all the mass, rounding may leave it below: all are kept then.
    reached = reached[..., -1]
    found &= whole | limited | (mass >= 1) | reached
    return jnp.where((mass < 1) & reached, first, kth), found


def _complete(floor, found, logits, k, mass) -> jax.Array:
    """The floors; those not found are searched in the whole vocabulary."""

    def bisect():
        return jnp.where(found, floor, _floor_by_bisection(logits, k, mass))

    return jax.lax.cond(jnp.any(~found), bisect, lambda: floor)


def _complete_each(*arguments) -> jax.Array:
    """`_complete` node by node: few need it, and a CPU gains nothing from batches."""
    return jax.lax.map(lambda row: jax.lax.map(lambda node: _complete(*node), row), arguments)


def _floor_by_bisection(logits, k, mass) -> jax.Array:
    """The lowest logit [...] that top-k and top-p keep of [..., V]."""
    p = jax.nn.softmax(logits, axis=-1)
    limited = k < logits.shape[-1]

    def limit(p):
        floor = _largest_threshold(p, lambda kept: jnp.sum(kept, -1) >= k)
        most = jnp.where(p >= floor[..., None], p, 0.0)
        return jnp.where(limited[..., None], most / most.sum(-1, keepdims=True), p)

    p = jax.lax.cond(jnp.any(limited), limit, lambda p: p, p)
    floor = _largest_threshold(p, lambda kept: jnp.sum(jnp.where(kept, p, 0.0), -1) >= mass)
    floor = jnp.where(mass < 1, floor, 0.0)
    return jnp.min(logits, axis=-1, where=(p > 0) & (p >= floor[..., None]), initial=jnp.inf)


def _largest_threshold(p: jax.Array, enough) -> jax.Array:
    """The largest value t for which `enough(p >= t)` holds, given that it holds for 0.

    Bisects the bit pattern of non-negative float32, which is ordered as the numbers are: 31
    passes over p and no sort, exact to the last bit.
    """

    def step(_, bounds):
        low, high = bounds  # enough at low, not at high
        middle = low + (high - low) // 2
        holds = enough(p >= jax.lax.bitcast_convert_type(middle, jnp.float32)[..., None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low = jnp.zeros(p.shape[:-1], jnp.int32)
    high = jnp.full(p.shape[:-1], jnp.float32(2.0).view(jnp.int32))  # above any probability
    low, _ = jax.lax.fori_loop(0, 31, step, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
