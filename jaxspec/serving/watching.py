"""Decodes one answer for people to watch: every round's tree, which part of the drafter
proposed each node, and what the target accepted.

It runs beside the engine with its own programs and cache, and shares only the weights: it slows
other requests only while it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.fitting import own_sizes, smallest
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import (
    capacity_for,
    check_positions,
    decoder_for,
    pack,
    request_keys,
)
from jaxspec.decoding.round import commit, judge, propose
from jaxspec.decoding.sampling import NO_TOKEN, Sampling
from jaxspec.decoding.state import Decoder, Params
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.target import Target
from jaxspec.text_stream import TextStream
from jaxspec.trees.tree import NO_PARENT, DraftTree

TARGET, DRAFTER, LOOKUP = "target", "drafter", "lookup"
PLAIN_EVERY = 2  # rounds per timed plain round: interleaved, load slows both alike
USUAL = 128  # default maximum of new tokens
Path = tuple[int, ...]


class Watcher:
    """Decodes one answer at a time, round by round.

    Attributes:
      target: as given.
      room: maximum tokens of a prompt and its answer.
    """

    def __init__(self, target: Target, drafter: LoadedDrafter, room: int):
        self.target, self.room = target, room
        self._decoder, self._params = decoder_for(target, drafter)
        self._plain, self._plain_params = decoder_for(target, PLAIN)
        self._free, self._compiled = threading.Lock(), set()

    def reserve(self) -> bool:
        """Reserves the watcher; returns False if it is taken. The holder must `release` it."""
        return self._free.acquire(blocking=False)

    def release(self) -> None:
        self._free.release()

    def events(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling,
        seed: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """The answer as JSON values: a "start", one "round" per round, an "end".

        A "start" has the first token; a "round" its tree (`nodes`), the new tokens, its
        milliseconds, and in every PLAIN_EVERY-th round those of a plain round (`plain_ms`, else
        None); an "end" the counts.

        Args:
          max_new_tokens: by default `USUAL`, or as many as fit.

        Raises:
          ValueError: the prompt and its answer do not fit.
        """
        if max_new_tokens is None:
            max_new_tokens = max(1, min(USUAL, self.room - len(prompt)))
        check_positions(self.target.config, len(prompt), max_new_tokens)
        if len(prompt) + max_new_tokens > self.room:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"{self.room} tokens that this server allows per request"
            )
        return self._events(list(prompt), max_new_tokens, sampling, seed)

    def _events(self, prompt, max_new_tokens, sampling, seed) -> Iterator[dict[str, Any]]:
        decoder, params = self._decoder, self._params
        capacity = capacity_for(len(prompt) + max_new_tokens, decoder)
        requests = pack(
            decoder,
            [prompt],
            batch=1,
            capacity=capacity,
            max_new_tokens=max_new_tokens,
            budget=decoder.drafter.size,
            sampling=[sampling],
            keys=request_keys([seed], 1),
        )
        state = prefill(decoder, params, requests)
        plain = _PlainRounds(self._plain, self._plain_params, state, requests.sampling)
        if capacity not in self._compiled:
            _watch_round(decoder, params, _copy(state), requests.sampling)
            plain.milliseconds()
            self._compiled.add(capacity)
        pieces, length = TextStream(self.target.tokenizer), len(prompt) + 1
        tokens, done = jax.device_get((state.tokens, state.done))
        first = {"text": pieces.step(int(tokens[0, length - 1])), "source": TARGET}
        yield {"kind": "start", "token": first}
        rounds, spent = 0, 0.0
        while not done[0]:
            began = time.perf_counter()
            seen, state = jax.block_until_ready(
                _watch_round(decoder, params, state, requests.sampling)
            )
            ms = 1e3 * (time.perf_counter() - began)
            seen, tokens, now, done = jax.device_get(
                (seen, state.tokens, state.length, state.done)
            )
            decided, length = tokens[0, length : now[0]].tolist(), int(now[0])
            spent += ms
            nodes = self._nodes(*seen)
            sources = [node["source"] for node in nodes if node["accepted"] and node["index"]]
            yield {
                "kind": "round",
                "nodes": nodes,
                "decided": [
                    {"text": pieces.step(token), "source": source}
                    for token, source in zip(decided, [*sources, TARGET], strict=False)
                ],
                "ms": ms,
                "plain_ms": None if rounds % PLAIN_EVERY else plain.milliseconds(),
            }
            rounds += 1
        yield {
            "kind": "end",
            "rest": pieces.finish(),
            "tokens": length - len(prompt),
            "rounds": rounds,
            "ms": spent,
        }

    def _nodes(self, tree: DraftTree, parts: Sequence[DraftTree], accepted) -> list[dict]:
        """The valid nodes of one row's tree, parents first."""
        names = [
            LOOKUP if isinstance(part, PromptLookup) else DRAFTER
            for part in self._decoder.drafter.parts
        ]
        known = [set(paths(part).values()) for part in parts]
        nodes = []
        for i, path in paths(tree).items():
            pairs = zip(names, known, strict=True)
            proposers = [name for name, found in pairs if path in found]
            proposers = proposers or names[-1:]  # lookup's, behind a drafted node
            nodes.append(
                {
                    "index": i,
                    "text": self.target.tokenizer.decode([path[-1]]),
                    "parent": int(tree.parents[0, i]) if i else None,
                    "probability": float(np.exp(tree.scores[0, i])),
                    "source": proposers[0] if i else TARGET,
                    "accepted": i in accepted,
                }
            )
        return nodes


class _PlainRounds:
    """Rounds of plain decoding from a given state, timed for comparison."""

    def __init__(self, decoder: Decoder, params: Params, state, sampling):
        self._decoder, self._params = decoder, params
        drafter = decoder.drafter.init((), 1, 0)
        self._state = dataclasses.replace(_copy(state), drafter=drafter)
        stops = np.full_like(sampling.stop_ids, NO_TOKEN)
        self._sampling = dataclasses.replace(sampling, stop_ids=stops)

    def milliseconds(self) -> float:
        """Milliseconds of one more round; call it fewer times than there are tokens left."""
        open_end = dict(done=jnp.zeros_like(self._state.done), limit=self._state.length + 2)
        state = dataclasses.replace(self._state, **open_end)
        began = time.perf_counter()
        state = decode(self._decoder, self._params, state, self._sampling, np.int32(1))
        self._state = jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - began)


def paths(tree: DraftTree) -> dict[int, Path]:
    """By node, the tokens from the root to each valid node of the first row."""
    found: dict[int, Path] = {}
    for i in np.flatnonzero(tree.valid[0]).tolist():
        parent = int(tree.parents[0, i])
        above = () if parent == NO_PARENT else found[parent]
        found[i] = (*above, int(tree.tokens[0, i]))
    return found


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def _watch_round(decoder: Decoder, params: Params, state, sampling):
    """`decode_round`, which also returns its tree, the trees of the drafter's parts, and the
    accepted nodes [P + 1], padded with 0."""
    draft, proposed = propose(decoder, params, state, sampling)
    sizes = own_sizes(decoder.drafter, draft.tree)
    size = smallest(sizes, draft.tree, state.done)
    verdict = judge(decoder, params, proposed, sampling, draft, sizes, size)
    path, count = verdict.acceptance.path[0], verdict.acceptance.count[0]
    accepted = jnp.where(jnp.arange(path.shape[0]) < count, path, 0)
    trees = _proposals(decoder, params, state, sampling)
    after = commit(decoder, params, proposed, sampling, verdict)
    return (draft.tree, trees, accepted), after


def _proposals(decoder: Decoder, params: Params, state, sampling) -> tuple[DraftTree, ...]:
    """The tree of each part of the drafter; XLA shares this drafting with the joined tree's."""
    parts = decoder.drafter.parts
    single = len(parts) == 1
    own_params = (params.drafter,) if single else params.drafter
    own_state = (state.drafter,) if single else state.drafter
    found = []
    for part, p, s in zip(parts, own_params, own_state, strict=True):
        whole = jnp.full_like(state.budget, part.size)
        at = state.anchor, state.position, whole, sampling.noise
        found.append(part.draft(p, s, *at)[0])
    return tuple(found)


def _copy(state):
    """A copy, as compiled programs donate their argument."""
    return jax.tree.map(jnp.copy, state)
