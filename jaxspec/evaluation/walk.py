"""Measures tau without decoding, by replaying rounds along recorded answers of the target.

Sample-then-match commits exactly what plain decoding writes, so a round accepts the longest
path of the drafted tree that is a prefix of the rest of the recorded answer. That gives the
next anchor without running the target. A drafter's tree depends only on its anchor and the
noise of the choices, and a larger budget's tree contains a smaller one's with the same node
numbers. So one pass drafts the largest tree at every token of an answer and records the nodes
on the true path; every budget is then replayed on that table, exactly as decoding would
(`tests/evaluation/test_walk.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.api import generate
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import capacity_for, pack, request_keys
from jaxspec.decoding.sampling import NO_TOKEN, Sampling
from jaxspec.decoding.state import Decoder, Params
from jaxspec.decoding.stats import DecodeStats
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import Together
from jaxspec.models.decoder import forward, unembed
from jaxspec.models.state import LayerStates
from jaxspec.models.target import Target
from jaxspec.noise import Noise
from jaxspec.trees.tree import DraftTree, ancestors

ANCHORS = 32  # anchors drafted from by one call of a compiled program


@dataclasses.dataclass(frozen=True)
class RecordedAnswer:
    """An answer that the target wrote to a prompt.

    Attributes:
      tokens: prompt and answer, up to a stop id or some tokens past `limit`, which the last
        round may accept.
      start: position of the answer's first token.
      limit: maximum of new tokens.
      sampling, seed: how it was chosen; the noise of the choices follows from them.
    """

    tokens: tuple[int, ...]
    start: int
    limit: int
    sampling: Sampling = Sampling()
    seed: int = 0

    @property
    def new_tokens(self) -> int:
        return min(len(self.tokens) - self.start, self.limit)


def record(
    target: Target,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    spare: int,
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    capacity: int | None = None,
) -> list[RecordedAnswer]:
    """The target's own answers, by plain decoding.

    Args:
      rows: prompts, token ids.
      spare: tokens beyond `max_new_tokens`, at least the depth of the trees to replay + 1.
      seeds: one per prompt; 0, 1, … by default.
    """
    seeds = list(range(len(rows))) if seeds is None else list(seeds)
    done = generate(
        target,
        rows,
        max_new_tokens=max_new_tokens + spare,
        sampling=sampling,
        seed=seeds,
        batch_size=batch_size,
        capacity=capacity,
    )
    return [
        RecordedAnswer((*row, *completion.token_ids), len(row), max_new_tokens, sampling, seed)
        for row, completion, seed in zip(rows, done, seeds, strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """A batch of answers that the target and some drafters have run over.

    Attributes:
      tokens: [B, S] int32.
      truth: [B, S] int32, the same tokens, but `NO_TOKEN` past each answer's end.
      start: [B] int32, position of each answer's first token.
      noise: of the target's choices.
      cache: the target's.
      states: the drafters' states after observing all tokens; drafts at a position depend only
        on the rows before it.
    """

    tokens: jax.Array
    truth: jax.Array
    start: jax.Array
    noise: Noise
    cache: LayerStates
    states: Any


def observe(
    target: Target,
    drafters: Sequence[LoadedDrafter],
    answers: Sequence[RecordedAnswer],
    *,
    batch: int,
    capacity: int | None = None,
) -> Observed:
    """Runs the target once over up to `batch` answers, for all drafters.

    Args:
      capacity: see `jaxspec.generate`; calls that share it share compiled programs.
    """
    together = Together(tuple(drafter.drafter for drafter in drafters))
    decoder = Decoder(target.config, together)
    rows = [answer.tokens for answer in answers]
    longest = max(map(len, rows))
    requests = pack(
        decoder,
        rows,
        batch=batch,
        capacity=capacity or capacity_for(longest, decoder),
        max_new_tokens=1,
        budget=1,
        sampling=[answer.sampling for answer in answers],
        keys=request_keys([answer.seed for answer in answers], len(rows)),
    )
    state = prefill(
        decoder, Params(target.params, tuple(drafter.params for drafter in drafters)), requests
    )
    truth = np.full(requests.tokens.shape, NO_TOKEN, np.int32)
    start = np.ones(batch, np.int32)
    for i, answer in enumerate(answers):
        truth[i, : len(answer.tokens)] = answer.tokens
        start[i] = answer.start
    noise = requests.sampling.noise
    return Observed(requests.tokens, truth, start, noise, state.cache, state.drafter)


def observe_batches(
    target: Target,
    drafters: Sequence[LoadedDrafter],
    answers: Sequence[RecordedAnswer],
    *,
    batch: int,
    capacity: int | None = None,
) -> Iterator[tuple[Sequence[RecordedAnswer], Observed]]:
    """`observe` on `batch` answers at a time, with these answers."""
    for start in range(0, len(answers), batch):
        some = answers[start : start + batch]
        yield some, observe(target, drafters, some, batch=batch, capacity=capacity)


@dataclasses.dataclass(frozen=True)
class Table:
    """A drafter's trees at every anchor of one answer.

    Attributes:
      nodes: [A, P] int32, index of the node at depth 1 … P of the true path; `size` from the
        first depth that the tree lacks.
      sizes: [A] int32, number of nodes of the tree.
      scores: [A, N] float32, see `DraftTree`.
    """

    nodes: np.ndarray
    sizes: np.ndarray
    scores: np.ndarray


def tabulate(
    observed: Observed, answers: Sequence[RecordedAnswer], drafter: LoadedDrafter, state: Any
) -> list[Table]:
    """Drafts the drafter's whole tree at every anchor of the answers.

    Args:
      state: the drafter's, one of `observed.states`.
    """
    nodes, sizes, scores = at_every_anchor(drafted, observed, answers, drafter, state)
    return [Table(nodes[i], sizes[i], scores[i]) for i in range(len(answers))]


# Function evaluated at an anchor: (drafter, its params, its state, anchor [B], position [B],
# true path [B, P], the noise of the choices) -> arrays [B, ...].
AtAnchor = Callable[..., Any]


def at_every_anchor(
    find: AtAnchor,
    observed: Observed,
    answers: Sequence[RecordedAnswer],
    drafter: LoadedDrafter,
    state: Any,
) -> Any:
    """The results of `find` at every anchor of the answers, as NumPy arrays [B, A, ...].

    Args:
      find: a static function, compiled with the drafter.
      state: the drafter's, one of `observed.states`; other arrays that `find` reads may be
        beside it.
    """
    anchors = max(answer.new_tokens for answer in answers)
    parts = []
    for first in range(0, anchors, ANCHORS):
        part = _at_anchors(
            find,
            drafter.drafter,
            drafter.params,
            state,
            observed.tokens,
            observed.truth,
            observed.start + first,
            observed.noise,
        )
        parts.append(jax.device_get(part))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)


@functools.partial(jax.jit, static_argnames=("find", "drafter"))
def _at_anchors(find, drafter, params, state, tokens, truth, first, noise):
    """`find`'s arrays with a leading B, at `ANCHORS` anchors from position `first` [B] on."""
    last = tokens.shape[1] - drafter.depth - 1

    def at(offset):
        position = jnp.minimum(first + offset, last)  # anchors past the end are never read
        anchor = _take(tokens, position[:, None])[:, 0]
        path = _take(truth, position[:, None] + 1 + jnp.arange(drafter.depth))
        return find(drafter, params, state, anchor, position, path, noise)

    found = jax.lax.map(at, jnp.arange(ANCHORS))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def drafted(drafter, params, state, anchor, position, path, noise):
    """`Table`'s arrays for the drafter's whole tree."""
    budget = jnp.full(anchor.shape, drafter.size, jnp.int32)
    tree, _ = drafter.draft(params, state, anchor, position, budget, noise)
    return nodes_of_path(tree, path), tree.valid.sum(axis=1), tree.scores


def nodes_of_path(tree: DraftTree, path: jax.Array) -> jax.Array:
    """Node at each depth of a known continuation.

    Args:
      path: [B, P] int32, tokens after the anchor.

    Returns:
      [B, P] int32; N from the first depth on that the tree lacks.
    """
    size = tree.size

    def deeper(above, token):
        here = (tree.parents == above[:, None]) & (tree.tokens == token[:, None]) & tree.valid
        node = jnp.where(here.any(axis=1), jnp.argmax(here, axis=1), size).astype(jnp.int32)
        return node, node

    root = jnp.zeros(path.shape[0], jnp.int32)
    return jax.lax.scan(deeper, root, path.swapaxes(0, 1))[1].swapaxes(0, 1)


def walk(answer: RecordedAnswer, table: Table, budget: int) -> tuple[DecodeStats, list[int]]:
    """Replays the rounds that decoding would have taken.

    Returns:
      The counts of decoding, and the anchor of each round as an index into the table.
    """
    nodes, committed, visited = 0, [], []
    end = len(answer.tokens) - answer.start

    def accepted_at(anchor):
        return int((table.nodes[anchor] < budget).sum())

    for anchor, accepted in rounds_along(accepted_at, 0, answer.new_tokens):
        visited.append(anchor)
        # A stop id ends the answer without a bonus.
        committed.append(min(accepted + 1, end - anchor - 1))
        nodes += min(budget, int(table.sizes[anchor]))
    return DecodeStats(tuple(committed), nodes), visited


def rounds_along(
    accepted_at: Callable[[int], int], anchor: int, end: int
) -> Iterator[tuple[int, int]]:
    """(anchor, drafts accepted) of every round along a known text.

    Args:
      accepted_at: number of drafts that the text accepts after an anchor.
      anchor: the first anchor.
      end: end of the text, past which no round starts.

    >>> list(rounds_along(lambda anchor: 2, 0, 7))
    [(0, 2), (3, 2)]
    """
    while anchor + 1 < end:
        accepted = accepted_at(anchor)
        yield anchor, accepted
        anchor += accepted + 1


def predictions(
    table: Table, visited: Sequence[int], budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the nodes drafted in a walk, and which were accepted (both flat)."""
    scores = table.scores[visited, 1:budget]  # node 0 is the anchor
    number = np.arange(1, 1 + scores.shape[1])
    accepted = (table.nodes[visited][:, None, :] == number[:, None]).any(axis=-1)
    real = scores > -np.inf
    return np.exp(scores[real]), accepted[real]


def branch_gaps(
    target: Target,
    observed: Observed,
    answers: Sequence[RecordedAnswer],
    drafter: LoadedDrafter,
    state: Any,
    *,
    stride: int = 16,
) -> list[float]:
    """Nats by which the drafter overestimates the log-probability of its likeliest branch.

    At every `stride`-th anchor the drafter's greedy chain of full depth is run through the
    target; the gap is the drafter's log-probability of the chain minus the target's. JetSpec
    calls a branch faithful when it is below 5 (arXiv 2606.18394).

    Args:
      drafter: a drafter whose tree is a chain.

    Raises:
      ValueError: the target is a hybrid, whose state, unlike keys and values, cannot be
        truncated to the tokens before an anchor.
    """
    if target.config.delta_layers:
        raise ValueError(
            f"gaps need the target's state at every anchor; {target.name!r} has gated delta "
            "nets, which keep only the last state: leave the gaps out"
        )
    gaps = []
    for offset in range(0, max(answer.new_tokens for answer in answers), stride):
        found = _branch_gap(
            target.config,
            drafter.drafter,
            target.params,
            drafter.params,
            state,
            observed,
            observed.start + offset,
        )
        inside = [offset + 1 < answer.new_tokens for answer in answers]
        gaps += np.asarray(found)[: len(answers)][inside].tolist()
    return gaps


@functools.partial(jax.jit, static_argnames=("config", "drafter"))
def _branch_gap(config, drafter, params, drafter_params, state, observed, position):
    position = jnp.minimum(position, observed.tokens.shape[1] - drafter.depth - 1)
    anchor = _take(observed.tokens, position[:, None])[:, 0]
    budget = jnp.full(position.shape, drafter.size, jnp.int32)
    tree, _ = drafter.draft(drafter_params, state, anchor, position, budget)
    output = forward(
        params, config, tree.tokens, tree.depths, ancestors(tree), observed.cache, position
    )
    laws = jax.nn.log_softmax(unembed(params, output.hidden), axis=-1)
    drawn = jnp.take_along_axis(laws[:, :-1], tree.tokens[:, 1:, None], axis=-1)[..., 0]
    own = jnp.max(jnp.where(tree.valid, -tree.scores, -jnp.inf), axis=1)  # the deepest node's
    return -own - jnp.sum(jnp.where(tree.valid[:, 1:], drawn, 0.0), axis=1)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, index, axis=1)
