"""The noise of sampled choices, known before the target's logits are.

A row samples by Gumbel-max: its next token is argmax(logits + temperature * noise). The noise
depends only on the request and the token's absolute position, so plain and speculative decoding
draw equal tokens. A drafter that adds it to its own logits proposes what the target will draw
wherever the two agree; the output does not change, as the target alone decides.

Source: Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant
Speculative Decoding" (arXiv 2408.07978), for chains.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of a batch.

    Attributes:
      key: [B] typed threefry keys, one per request.
      scale: [B] float32, by which a drafter multiplies it (`drafting_scale`); 0: greedy.
    """

    key: Key[Array, " B"]
    scale: Float[Array, " B"]

    def at(
        self,
        positions: Int[Array, " B"],
        count: int,
        vocab: int,
        kept: Int[Array, " _"] | None = None,
    ) -> Float[Array, "B {count} _"]:
        """Standard Gumbel noise of the tokens at `count` positions from `positions` on.

        Args:
          vocab: V.
          kept: the ids of tokens whose noise is asked for, V' of them; None for all.

        Returns:
          [B, count, V'].
        """
        tokens = jnp.arange(vocab) if kept is None else kept
        along = jax.vmap(_gumbel, in_axes=(None, 0, None))
        rows = jax.vmap(along, in_axes=(0, 0, None))
        return rows(self.key, positions[:, None] + jnp.arange(count), tokens)


@functools.partial(jax.jit, inline=True)  # traced once for all numbers of rows and positions
def _gumbel(
    key: Key[Array, ""], position: Int[Array, ""], tokens: Int[Array, " V"]
) -> Float[Array, " V"]:
    """`jax.random.gumbel(fold_in(key, position), (vocab,))[tokens]`, drawn for `tokens` only.

    On a CPU JAX draws random bits in a loop over whole arrays, which takes three times as long.
    """
    key = jax.random.key_data(jax.random.fold_in(key, position))
    high, low = _threefry(key, jnp.zeros_like(tokens, jnp.uint32), tokens.astype(jnp.uint32))
    one = jnp.float32(1).view(jnp.uint32)  # its exponent, above 23 bits
    uniform = (((high ^ low) >> 9) | one).view(jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def _threefry(
    key: UInt32[Array, " 2"], x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of counters x, y (uint32), 20 rounds.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for i in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = ((y << bits) | (y >> (32 - bits))) ^ x
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


def drafting_scale(
    temperature: Float[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, " B"]:
    """How much of the noise a drafter adds to its logits: [B].

    A drafter that knew the target's logits would add temperature * noise. Its own are flatter
    where it is unsure which token the target prefers, and there the noise misleads it. So it
    adds 3/4 of that, and less where a small top_p leaves the target little choice
    (docs/results.md has what the factors give).
    """
    choice = jnp.clip((top_p - 0.7) / (0.95 - 0.7), 0.0, 1.0)
    return 0.75 * choice * temperature


def bias(
    noise: Noise | None,
    anchor: Int[Array, " B"],
    depth: int,
    vocab: int,
    kept: Int[Array, " _"] | None = None,
) -> Float[Array, "_ {depth} _"]:
    """What a drafter adds to its logits of the tokens 1 … P behind the anchor.

    Args:
      noise: of the target's choices; None where all are greedy.
      anchor: absolute position of the anchor.
      depth: P.
      vocab: V, of the target.
      kept: the ids that the drafter scores, V' of them; None for all.

    Returns:
      [B, P, V'], scale times noise; without noise zeros [1, P, 1].
    """
    if noise is None:
        return jnp.zeros((1, depth, 1))
    width = vocab if kept is None else kept.shape[0]

    def drawn(_):
        return noise.scale[:, None, None] * noise.at(anchor + 1, depth, vocab, kept)

    def none(_):
        return jnp.zeros((anchor.shape[0], depth, width))

    return jax.lax.cond(jnp.any(noise.scale > 0), drawn, none, None)
