"""What DFlash2's selector is trained on: to pick the truth among its candidates.

The candidates of a position are known by then, from the pass over the vocabulary that the base
loss makes (`vocabulary_loss`); only their own logits are computed again, to be differentiated.
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
    """A selector's scores of what it may pick at every position, [B, R, ...].

    Attributes:
      scores: [B, R, k] float32.
      place: [B, R] int32, the truth's among them; any where it is not.
      present: [B, R] bool, the truth is one of the likeliest by base logits.
    """

    scores: jax.Array
    place: jax.Array
    present: jax.Array

    @property
    def cross_entropy(self) -> jax.Array:
        """[B, R], of the candidate at `place`."""
        log_p = jax.nn.log_softmax(self.scores, axis=-1)
        return -jnp.take_along_axis(log_p, self.place[..., None], axis=-1)[..., 0]

    @property
    def right(self) -> jax.Array:
        """[B, R] bool: the best score is the truth's, and it was present."""
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
      hidden: [B, R, M], what the LM head reads.
      latent: [B, R, r], given the true tokens before.
      candidates: [B, R, k] int32, likeliest first, in the draft vocabulary.
      truth: [B, R] int32, likewise.
      missing: "inject": a truth that is no candidate takes the place of the last one; "skip":
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
    """Slots before the first that is not: bool [..., P] -> int32 [...]."""
    return jnp.cumprod(good.astype(jnp.int32), axis=-1).sum(axis=-1)
