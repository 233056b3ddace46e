"""TreeFlash's table: likely tokens of every slot after likely tokens of the slot before.

Source: TreeFlash (arXiv 2606.03819).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxspec.drafters.head import DraftHead, Vocabulary
from jaxspec.trees.candidates import top_log_probs


def transition_table(
    head: DraftHead,
    vocabulary: Vocabulary,
    stream: Float[Array, "B P M"],
    base: Float[Array, "B P V"],
    added: Float[Array, "_ P _"],
    anchor: Int[Array, " B"],
    *,
    parents: int,
    children: int,
) -> tuple[Int[Array, "B P C W"], Float[Array, "B P C W"], Int[Array, "B P C W"]]:
    """The likeliest children of the likeliest parents of every depth.

    The parents of slot 0 are all the anchor; those of slot k are the likeliest tokens of slot
    k - 1 by base logits. To the logits of both `added` is added (`noise.bias`). `parents` and
    `children` are cut to the draft vocabulary's size.

    Returns:
      tokens int32, their log-probabilities given the parent, and the child's index among the
      next slot's parents (-1: none, a leaf), for C parents of W children.
    """
    vocab = base.shape[-1]
    parents, children = min(parents, vocab), min(children, vocab)
    likely, _ = top_log_probs((base + added)[:, :-1], parents)  # [B, P - 1, parents]
    first = jnp.broadcast_to(anchor[:, None, None], (*anchor.shape, 1, parents))
    previous = jnp.concatenate([first, vocabulary.ids(likely)], axis=1)
    latent, _ = head.advance(vocabulary, stream[:, :, None], previous, ())
    logits = head.correct(vocabulary, base[:, :, None], latent)
    chosen, log_probs = top_log_probs(logits + added[:, :, None], children)

    same = chosen[:, :-1, :, :, None] == likely[:, :, None, None, :]
    index = jnp.where(same.any(-1), jnp.argmax(same, axis=-1), -1)
    leaves = jnp.full_like(chosen[:, :1], -1)
    following = jnp.concatenate([index, leaves], axis=1)
    return vocabulary.ids(chosen), log_probs, following
