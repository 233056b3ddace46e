"""Chains slot by slot: greedy, or drawn from the drafter for rejection sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxspec.drafters.head import DraftHead, Vocabulary
from jaxspec.trees.candidates import likeliest

# choose(slot, logits [B, V']) -> (draft index [B] int32 of the choice, the distribution [B, V']
# it was drawn from).
Choose = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledChain:
    """A chain sampled from the drafter, with the distributions it was sampled from.

    Attributes:
      tokens: [B, P] int32.
      log_q: [B, P, C] float32, normalised; each slot's log-probabilities given the tokens
        before it.
      support: the tokens that `log_q` is over, int32 [B, P, C] or [C], without repeats; None
        for all, C = V. Others are never drawn.
      lengths: [B] int32, tokens to verify, 0 … P. Whether slot j is kept must not depend on its
        own token or later ones.
      log_confidence: [B, P] float32, log-probability that each token is accepted if those
        before it are; 0 without a confidence head. It does not depend on the slot's own token.
    """

    tokens: jax.Array
    log_q: jax.Array
    support: jax.Array | None
    lengths: jax.Array
    log_confidence: jax.Array


def rollout(
    head: DraftHead,
    vocabulary: Vocabulary,
    stream: jax.Array,
    base: jax.Array,
    anchor: jax.Array,
    choose: Choose,
) -> tuple[jax.Array, jax.Array]:
    """Chooses slot by slot, each given the choices before it.

    Args:
      stream: [B, P, M].
      base: [B, P, V'], base logits.
      anchor: [B] int32.
      choose: see `Choose`.

    Returns:
      token ids [B, P] int32, and their distributions [B, P, V'].
    """
    slots = jnp.arange(base.shape[1])
    if head.sequential is None:  # slots are independent
        chosen, laws = jax.vmap(choose, in_axes=(0, 1), out_axes=1)(slots, base)
        return vocabulary.ids(chosen), laws

    def step(carry, inputs):
        previous, state = carry
        slot, stream, logits = inputs
        latent, state = head.advance(vocabulary, stream, previous, state)
        chosen, law = choose(slot, head.correct(vocabulary, logits, latent))
        token = vocabulary.ids(chosen)
        return (token, state), (token, law)

    start = anchor, head.sequential.initial_state(anchor.shape)
    inputs = slots, stream.swapaxes(0, 1), base.swapaxes(0, 1)
    _, (tokens, laws) = jax.lax.scan(step, start, inputs)
    return tokens.swapaxes(0, 1), laws.swapaxes(0, 1)


def tempered(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """log softmax(logits / T) in float32, used both to sample and to verify.

    Args:
      logits: [B, V'].
      temperature: [B]; at 0 the likeliest token has probability one.
    """
    hot = temperature[:, None]
    soft = jax.nn.log_softmax(logits.astype(jnp.float32) / jnp.where(hot > 0, hot, 1.0), -1)
    best = likeliest(logits)[..., None] == jnp.arange(logits.shape[-1])
    return jnp.where(hot > 0, soft, jnp.where(best, 0.0, -jnp.inf))


def draw(key: jax.Array, slot: jax.Array, log_q: jax.Array) -> jax.Array:
    """Samples an index from log-probabilities [V']; consumes `key` folded with the slot."""
    chosen = jax.random.categorical(jax.random.fold_in(key, slot), log_q)
    return chosen.astype(jnp.int32)


def sampled(temperature: jax.Array, keys: jax.Array) -> Choose:
    """Draws each slot's token by `tempered` logits; consumes the typed keys [B]."""

    def choose(slot, logits):
        log_q = tempered(logits, temperature)
        return jax.vmap(draw, in_axes=(0, None, 0))(keys, slot, log_q), log_q

    return choose


def greedy(slot: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest choice, for `rollout`."""
    return likeliest(logits), logits


def greedy_with(added: jax.Array) -> Choose:
    """As `greedy`, with the logits plus `added` [., P, .] (`noise.bias`)."""
    return lambda slot, logits: greedy(slot, logits + added[:, slot])
