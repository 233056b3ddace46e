"""One level of a tree in plain XLA, without sorting the vocabulary.

Each of the F best children lies in one of the F pairs of a parent and a chunk of the vocabulary
whose best scores are highest, so one pass for the chunks' maxima and two short searches replace
a search of all parents' vocabularies.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.log_sum_exp import log_sum_exp
from pallas_kernels.tree_level.reference import Levels, live_scores, with_row

STEPS = 4  # a CPU scores 1, 4, 16 … parents, the fewest that suffice


def grow_level_xla(
    levels: Levels, slot: jax.Array, base: jax.Array, latent: jax.Array, output: jax.Array
) -> Levels:
    """See `grow_level_reference`."""
    arrays = (levels, slot, base, latent, output)
    return lax.platform_dependent(*arrays, cpu=_score_the_live, default=_score)


def _score_the_live(levels, slot, base, latent, output) -> Levels:
    """Scores only parents above the floor, which come first in sorted order."""
    most = latent.shape[1]
    counts = [1]
    while counts[-1] < most:
        counts.append(min(most, STEPS * counts[-1]))
    live = jnp.max(jnp.sum(live_scores(levels, slot, most) > -jnp.inf, axis=1))
    branches = [lambda levels, *_: levels]
    branches += [functools.partial(_score_first, count) for count in counts]
    choice = jnp.sum(live > jnp.array([0, *counts[:-1]]))
    return lax.switch(choice, branches, levels, slot, base, latent, output)


def _score_first(count, levels, slot, base, latent, output) -> Levels:
    return _score(levels, slot, base, latent[:, :count], output)


def _score(levels, slot, base, latent, output) -> Levels:
    batch, parents, _ = latent.shape
    vocab, children = output.shape[0], levels.scores.shape[-1]
    above = live_scores(levels, slot, parents)
    if latent.size == latent.shape[-1] and latent.dtype != jnp.float32:
        # XLA widens the whole matrix for a product of one row of narrow operands.
        latent = jnp.repeat(latent, 2, axis=1)
    bias = jnp.einsum("bmr,vr->bmv", latent, output, preferred_element_type=jnp.float32)
    logits = base[:, slot, None] + bias[:, :parents]

    width = chunk_width(vocab, parents, children)
    chunks = logits.reshape(batch, parents * (vocab // width), width)
    maxima = jnp.max(chunks, axis=-1).reshape(batch, parents, -1)
    log_total = log_sum_exp(logits, jnp.max(maxima, axis=-1))
    pairs = min(children, parents * (vocab // width))
    best = _number(above[..., None] + jnp.minimum(maxima - log_total[..., None], 0.0))
    # In ascending order, so that equal children come in the reference's order.
    pair = jnp.sort(lax.top_k(best.reshape(batch, -1), pairs)[1], axis=-1)  # [B, pairs]
    parent = pair // (vocab // width)
    finalists = jnp.take_along_axis(chunks, pair[..., None], axis=1)  # [B, pairs, width]
    pick = functools.partial(jnp.take_along_axis, indices=parent, axis=1)
    gain = jnp.minimum(finalists - pick(log_total)[..., None], 0.0)
    scores = _number(pick(above)[..., None] + gain).reshape(batch, -1)
    missing = max(0, children - scores.shape[1])
    scores = jnp.pad(scores, [(0, 0), (0, missing)], constant_values=-jnp.inf)
    scores, place = lax.top_k(scores, children)
    place = jnp.minimum(place, pairs * width - 1)
    flat = jnp.take_along_axis(pair, place // width, axis=1) * width + place % width
    return with_row(levels, slot, scores, flat // vocab, flat % vocab)


def _number(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def chunk_width(vocab: int, parents: int, children: int) -> int:
    """About sqrt(M V / F), which balances the two searches, as a power of two dividing V."""
    return math.gcd(vocab, 2 ** max(0, round(math.log2(parents * vocab / children) / 2)))
