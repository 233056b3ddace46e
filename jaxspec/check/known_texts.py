"""A block drafter over known texts: all blocks in one pass, as training runs them, and round by
round over caches, as decoding does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.config import DrafterConfig, TargetConfig
from jaxspec.drafters.base import Committed
from jaxspec.drafters.block import BlockDrafter, BlockParams
from jaxspec.drafters.rollout import greedy, rollout
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.evaluation.walk import rounds_along
from jaxspec.models.decoder import forward_chain
from jaxspec.models.params import TargetParams
from jaxspec.models.state import LayerStates, init_states
from jaxspec.models.target import Target
from jaxspec.training.features import target_features

CHUNK = 128  # texts are padded to a multiple of this
ANCHORS = 32  # anchors drafted from at a time


@dataclasses.dataclass(frozen=True)
class Text:
    """Known tokens to replay.

    Attributes:
      tokens: ids.
      start: position of the first anchor, at least 1. For an answer this is its first token,
        which prefill decides.
    """

    tokens: tuple[int, ...]
    start: int = 1


def padded(tokens: Sequence[int], config: DrafterConfig) -> jax.Array:
    """Pads tokens to [1, T], a multiple of CHUNK and more than a block longer."""
    length = -(-(len(tokens) + config.depth + 1) // CHUNK) * CHUNK
    return jnp.asarray(np.pad(tokens, (0, length - len(tokens)))[None], jnp.int32)


def accepted_everywhere(
    config: DrafterConfig, target: Target, params: BlockParams, texts: Sequence[Text]
) -> list[np.ndarray]:
    """Drafts accepted at every anchor of every text, all blocks run as in training."""
    found = []
    for text in texts:
        tokens = padded(text.tokens, config)
        anchors = np.arange(text.start, len(text.tokens) - 1)
        count = -(-len(anchors) // ANCHORS) * ANCHORS  # few programs
        places = np.minimum(text.start + np.arange(count), tokens.shape[1] - 1)
        chains, _ = draft_everywhere(
            config, target.config, target.params, params, tokens, places
        )
        pairs = zip(anchors, np.asarray(chains), strict=False)
        found.append(np.array([_matches(text, at, chain) for at, chain in pairs]))
    return found


def _matches(text: Text, anchor: int, drafted: np.ndarray) -> int:
    """Number of leading drafts that equal the text after an anchor."""
    known = np.array(text.tokens[anchor + 1 : anchor + 1 + len(drafted)])
    return int(np.cumprod(drafted[: len(known)] == known).sum())


@functools.partial(jax.jit, static_argnames=("config", "target_config"))
def draft_everywhere(
    config: DrafterConfig,
    target_config: TargetConfig,
    target: TargetParams,
    params: BlockParams,
    tokens: jax.Array,
    anchors: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Drafts as training does: greedy chains [A, P] after anchors, and hidden states [A, P, M].

    Args:
      tokens: [1, T], see `padded`.
      anchors: [A] int32 positions in `tokens`; all of them by default.
    """
    features = target_features(target, target_config, tokens, taps=config.taps, chunk=CHUNK)
    head = bind(config, params.head)
    anchors = jnp.arange(tokens.shape[1]) if anchors is None else anchors
    blocks = run_blocks(head, params.vocabulary, tokens, features.taps, anchors[None])

    def chain(block):
        stream, anchor = block[0][None], block[1][None]
        base = head.logits(params.vocabulary, stream)
        return rollout(head, params.vocabulary, stream, base, anchor, greedy)[0][0]

    stream = blocks.stream[0]
    return jax.lax.map(chain, (stream, tokens[0, anchors]), batch_size=8), stream


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Caches:
    target: LayerStates
    drafter: Any


def decoded_rounds(
    target: Target, drafter: BlockDrafter, params: BlockParams, text: Text
) -> list[tuple[int, np.ndarray]]:
    """Every round as decoding runs it: drafts accepted, and differences [P] from training."""
    config = drafter.config
    tokens = padded(text.tokens, config)
    _, streams = draft_everywhere(config, target.config, target.params, params, tokens)
    c, capacity = target.config, tokens.shape[1]
    dtype = target.params.embed.dtype
    caches = _Caches(
        init_states(c, 1, capacity, dtype),
        drafter.init(params, 1, capacity),
    )
    width, differences, at = config.depth + 1, [], 0

    def draft(anchor):
        nonlocal caches, at
        while at < anchor:
            count = min(width, anchor - at)
            rows = tokens[:, at : at + width]
            caches = _commit(drafter, c, target.params, params, caches, rows, at, count)
            at += count
        own, difference = _draft_cached(
            drafter, params, caches.drafter, tokens[:, anchor], anchor, streams[anchor]
        )
        differences.append(np.asarray(difference))
        return np.asarray(own)

    def accepted_at(anchor):
        return _matches(text, anchor, draft(anchor))

    walked = rounds_along(accepted_at, text.start, len(text.tokens))
    counts = [count for _, count in walked]
    return list(zip(counts, differences, strict=True))


@functools.partial(
    jax.jit, static_argnames=("drafter", "target_config"), donate_argnames="caches"
)
def _commit(drafter, target_config, target, params, caches, tokens, start, count) -> _Caches:
    """Runs the target on C tokens from position `start` and commits the first `count`."""
    starts, taps = jnp.full(1, start), drafter.taps
    output = forward_chain(target, target_config, tokens, caches.target, starts, taps=taps)
    committed = Committed(tokens, output.taps, starts, jnp.full(1, count))
    return _Caches(
        caches.target.write(output.rows, starts, committed.count),
        drafter.observe(params, caches.drafter, committed),
    )


@functools.partial(jax.jit, static_argnames="drafter")
def _draft_cached(drafter, params, state, anchor, position, trained):
    """The greedy chain [P], and its logits' distance from those of training's hidden states."""
    head, vocabulary = bind(drafter.config, params.head), params.vocabulary
    stream = drafter.stream(params, state, anchor, jnp.full(1, position))
    base = head.logits(vocabulary, stream)
    own, logits = rollout(head, vocabulary, stream, base, anchor, greedy)

    expected = head.logits(vocabulary, trained[None])
    if head.sequential is not None:
        previous = jnp.concatenate([anchor[:, None], own[:, :-1]], axis=1)
        latent = head.teacher_forced(vocabulary, trained[None], previous)
        expected = head.correct(vocabulary, expected, latent)
    # A bilinear head's logits are -inf outside its candidates.
    scale = jnp.max(jnp.abs(jnp.where(jnp.isfinite(expected), expected, 0)))
    same = logits == expected
    difference = jnp.max(jnp.where(same, 0, jnp.abs(logits - expected)), axis=-1) / scale
    return own[0], difference[0]
