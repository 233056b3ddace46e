"""Block drafters at every anchor of known texts: what is accepted, and training's logits beside
decoding's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.precision import precision_of
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.rollout import greedy
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.evaluation.walk import RecordedAnswer, at_every_anchor, observe_batches
from jaxspec.models.target import Target
from jaxspec.training.features import target_features

BATCH = 8  # texts that the target runs over together


def accepted_everywhere(
    target: Target, drafters: Sequence[LoadedDrafter], texts: Sequence[RecordedAnswer]
) -> list[list[np.ndarray]]:
    """Drafts of the greedy chain that a text accepts at every anchor, by drafter and text."""
    found: list[list[np.ndarray]] = [[] for _ in drafters]
    batch = min(BATCH, len(texts))
    for some, observed in observe_batches(target, drafters, texts, batch=batch):
        for counts, drafter, state in zip(found, drafters, observed.states, strict=True):
            accepted = at_every_anchor(_accepted, observed, some, drafter, state)
            counts += _inside(accepted, some)
    return found


def differences(
    target: Target, drafter: LoadedDrafter, texts: Sequence[RecordedAnswer]
) -> np.ndarray:
    """How far decoding's logits are from training's, [P]: the largest over all anchors.

    Relative to the largest logit of a block.
    """
    largest, batch = [], min(BATCH, len(texts))
    for some, observed in observe_batches(target, [drafter], texts, batch=batch):
        with precision_of(target.params.embed.dtype):  # as decoding observed
            taps = _taps(target.params, target.config, observed.tokens, drafter.drafter.taps)
            state = observed.states[0], observed.tokens, taps
            found = at_every_anchor(_difference, observed, some, drafter, state)
        largest += [rows.max(axis=0) for rows in _inside(found, some)]
    return np.max(largest, axis=0)


def _inside(found: np.ndarray, texts: Sequence[RecordedAnswer]) -> list[np.ndarray]:
    """The rows at anchors that a token follows."""
    return [found[i, : text.new_tokens - 1] for i, text in enumerate(texts)]


def _accepted(drafter, params, state, anchor, position, path, noise):
    chain, _ = drafter.rollout(params, state, anchor, position, greedy)
    return jnp.cumprod(chain == path, axis=1).sum(axis=1)


def _difference(drafter, params, state, anchor, position, path, noise):
    """Of the logits [B, P] along decoding's own chains.

    Args:
      state: the drafter's; the tokens [B, S]; and the target's taps on them.
    """
    state, tokens, taps = state
    chain, logits = drafter.rollout(params, state, anchor, position, greedy)
    head, vocabulary = bind(drafter.config, params.head), params.vocabulary
    blocks = run_blocks(head, vocabulary, tokens, taps, position[:, None])
    previous = jnp.concatenate([anchor[:, None], chain[:, :-1]], axis=1)[:, None]
    expected = dataclasses.replace(blocks, previous=previous).logits(head, vocabulary)[:, 0]
    # A bilinear head's logits are -inf outside its candidates.
    largest = jnp.abs(jnp.where(jnp.isfinite(expected), expected, 0)).max(axis=(1, 2))
    apart = jnp.where(logits == expected, 0, jnp.abs(logits - expected)).max(axis=2)
    return apart / largest[:, None]


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def _taps(params, config, tokens, taps):
    return target_features(params, config, tokens, taps=taps, chunk=128).taps
