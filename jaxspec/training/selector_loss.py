"""The loss of DFlash2's selector: to pick the label among its candidates.

The base loss's pass over the vocabulary (`vocabulary_loss`) finds the candidates; only their
logits are computed again, to be differentiated.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.drafters.chunks import map_chunks
from jaxspec.drafters.head import DraftHead, Vocabulary
from jaxspec.models.layers import product

MISSING = ("inject", "skip")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """A selector's scores of its candidates at every position, [B, R, ...].

    Attributes:
      scores: [B, R, k] float32.
      place: [B, R] int32, index of the label among them; arbitrary if it is absent.
      present: [B, R] bool, whether the label is one of the likeliest by base logits.
    """

    scores: jax.Array
    place: jax.Array
    present: jax.Array

    @property
    def cross_entropy(self) -> jax.Array:
        """Cross-entropy [B, R] of the candidate at `place`."""
        log_p = jax.nn.log_softmax(self.scores, axis=-1)
        return -jnp.take_along_axis(log_p, self.place[..., None], axis=-1)[..., 0]

    @property
    def right(self) -> jax.Array:
        """[B, R] bool: the label was present and has the best score."""
        return self.present & (jnp.argmax(self.scores, axis=-1) == self.place)


def choices(
    head: DraftHead,
    vocabulary: Vocabulary,
    hidden: jax.Array,
    latent: jax.Array,
    candidates: jax.Array,
    truth: jax.Array,
    *,
    missing: str,
    chunk: int,
) -> Choices:
    """Scores positions for training.

    Args:
      hidden: [B, R, M], input of the LM head.
      latent: [B, R, r], given the true tokens before.
      candidates: [B, R, k] int32 draft indices, likeliest first.
      truth: [B, R] int32 draft indices of the labels.
      missing: "inject": a label that is not a candidate replaces the last one; "skip":
        candidates stay as they are.
      chunk: positions whose rows of the LM head are gathered at a time.
    """

    def some(hidden, latent, candidates, truth):
        here = candidates == truth[..., None]
        present, place = here.any(-1), jnp.argmax(here, axis=-1)
        if missing == "inject":
            last = jnp.where(present, candidates[..., -1], truth)
            candidates = candidates.at[..., -1].set(last)
            place = jnp.where(present, place, candidates.shape[-1] - 1)
        rows = jax.lax.stop_gradient(vocabulary.unembed[candidates])  # [B, n, k, M]
        logits = product("brm,brkm->brk", hidden.astype(rows.dtype), rows)
        scores = head.select(head.scaled(logits), candidates, latent)
        return Choices(scores, place.astype(jnp.int32), present)

    size = max(1, chunk // len(truth))
    return map_chunks(some, hidden, latent, candidates, truth, size=size)


def leading_run(good: jax.Array) -> jax.Array:
    """Number of leading true slots: bool [..., P] -> int32 [...]."""
    return jnp.cumprod(good.astype(jnp.int32), axis=-1).sum(axis=-1)
