"""Changes to the target's logits before a choice: token biases, a minimum length, and penalties
for tokens that the text already has.

The text before a node is its row's decided tokens and the nodes above it. Its token counts are
therefore those of plain decoding at that position, and output stays lossless. Source: the
`repetition_penalty` is that of Keskar et al., "CTRL" (2019), section 4.1, with negative logits
multiplied; the others are OpenAI's. They apply in vLLM's order: bias, minimum length,
repetition, frequency and presence.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxspec.decoding.sampling import SamplingRows
from jaxspec.trees.tree import DraftTree, unpack_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """The text before each of R x N choices.

    Attributes:
      tokens: [B, S] int32, decided tokens of every row.
      start, length: [B] int32, lengths of the prompt and of the decided tokens.
      drafted: [B, N'] int32, tokens of a tree whose root is decided.
      ancestors: uint32 bits [B, N', ceil(N' / 32)], of the tree.
      row: [R] int32, row of the choices.
      node: [R, N] int32, node before each choice.
    """

    tokens: jax.Array
    start: jax.Array
    length: jax.Array
    drafted: jax.Array
    ancestors: jax.Array
    row: jax.Array
    node: jax.Array

    @classmethod
    def before(
        cls,
        tokens: jax.Array,
        start: jax.Array,
        length: jax.Array,
        tree: DraftTree,
        ancestors: jax.Array,
    ) -> Written:
        """The text before the choice after each node of a tree."""
        row, node = jnp.arange(tree.tokens.shape[0]), jnp.arange(tree.size)
        node = jnp.broadcast_to(node, tree.tokens.shape)
        return cls(tokens, start, length, tree.tokens, ancestors, row, node)

    def counts(self, row: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
        """For some rows [R]: whether each token is in the prompt, bool [R, V], and how often it
        is in the answer, float32 [R, V]."""
        tokens, at = self.tokens[row], jnp.arange(self.tokens.shape[1])
        prompt = at < self.start[row, None]
        answer = (at < self.length[row, None]) & ~prompt
        zeros, every = jnp.zeros((row.shape[0], vocab)), jnp.arange(row.shape[0])[:, None]
        in_prompt = zeros.at[every, tokens].max(prompt.astype(zeros.dtype))
        return in_prompt > 0, zeros.at[every, tokens].add(answer.astype(zeros.dtype))

    def drafted_above(self, row: jax.Array, node: jax.Array, counts: jax.Array) -> jax.Array:
        """Adds the tokens on the path to each node [R, N] to counts [R, V]: [R, N, V]."""
        above = unpack_bits(self.ancestors[row[:, None], node], self.drafted.shape[1])
        above = above.at[..., 0].set(False)  # the root is decided
        counts = jnp.broadcast_to(counts[:, None], (*node.shape, counts.shape[-1]))
        every, at = jnp.arange(row.shape[0])[:, None, None], jnp.arange(node.shape[1])[:, None]
        return counts.at[every, at, self.drafted[row][:, None]].add(above.astype(counts.dtype))


def changes_logits(rows: SamplingRows) -> jax.Array:
    """Whether a request has biases, penalties or a minimum length: [B] bool."""
    penalties = (rows.repetition != 1) | (rows.presence != 0) | (rows.frequency != 0)
    return penalties | (rows.min_tokens > 0) | jnp.any(rows.biased >= 0, axis=-1)


def adjusted(
    logits: jax.Array,
    rows: SamplingRows,
    written: Written,
    row: jax.Array,
    node: jax.Array,
    position: jax.Array,
) -> jax.Array:
    """The logits [R, N, V] after biases and penalties, from which a request chooses.

    Args:
      rows: [R], options already gathered by `row`.
      row, node: [R] and [R, N] int32, of the choices, as in `Written`.
      position: [R, N] int32, position of the chosen token.
    """
    vocab = logits.shape[-1]
    every = jnp.arange(row.shape[0])[:, None]

    def over_vocabulary(ids, values):  # [R, n], padded with -1, -> [R, 1, V]
        ids = jnp.where(ids < 0, vocab, ids)
        empty = jnp.zeros((row.shape[0], 1, vocab), values.dtype)
        return empty.at[every, 0, ids].add(values, mode="drop")

    per_row = lambda x: x[:, None, None]  # noqa: E731
    logits = logits + over_vocabulary(rows.biased, rows.bias)
    stops = over_vocabulary(rows.stop_ids, jnp.ones(rows.stop_ids.shape, jnp.int32)) > 0
    early = position - written.start[row, None] < rows.min_tokens[:, None]
    logits = jnp.where(stops & early[..., None], -jnp.inf, logits)

    in_prompt, in_answer = written.counts(row, vocab)
    times = written.drafted_above(row, node, in_answer)
    repetition = per_row(rows.repetition)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt[:, None] | (times > 0), repeated, logits)
    return logits - per_row(rows.frequency) * times - per_row(rows.presence) * (times > 0)
