"""Measurements of contenders on prompt sets, as rows of `results`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from jaxspec.decoding.requests import capacity_for
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.state import Decoder
from jaxspec.drafters.joined import Together
from jaxspec.evaluation import walk as w
from jaxspec.evaluation.contenders import Contender, Entry
from jaxspec.evaluation.metrics import reliability_bins
from jaxspec.evaluation.phases import phase_costs, verify_costs
from jaxspec.evaluation.results import (
    PLAIN,
    Branches,
    Costs,
    Done,
    Reliability,
    Rounds,
    Verify,
    counts,
)
from jaxspec.evaluation.speed import Run, plain_forms, runner, take_turns
from jaxspec.models.target import Target

Sets = Mapping[str, Sequence[list[int]]]  # prompts as token ids, by the name of their set


def tau(
    entries: Sequence[Entry],
    sets: Sets,
    *,
    sampling: Sampling = Sampling(),
    budgets: Sequence[int] = (),
    max_new_tokens: int = 256,
    batch_size: int = 8,
    done: Done = (),
) -> Iterator[Rounds | Reliability | Branches]:
    """Measures tau of every contender along the target's own answers; nothing is timed.

    Contenders that differ only in name and budget are replayed once; each has a row at its own
    budget.

    Args:
      budgets: further budgets, besides each contender's own; of contenders that differ only in
        name and budget, the first has their rows.
      done: keys of known rows (`results.key`); a set whose rounds are all known is left out.
    """
    for dtype in dict.fromkeys(entry.contender.dtype for entry in entries):
        group = [entry for entry in entries if entry.contender.dtype == dtype]
        yield from _Walks(group, sets, budgets, max_new_tokens, batch_size).rows(sampling, done)


def spare_tokens(entries: Sequence[Entry], budgets: Sequence[int] = ()) -> int:
    """Tokens past an answer's limit that `tau` needs positions for, see `walk.record`."""
    sized = (e.sized(max([e.contender.budget, *budgets])) for e in entries)
    return max(loaded.drafter.depth for loaded in sized) + 1


class _Walks:
    """Contenders of one target, walked set by set."""

    def __init__(self, entries, sets: Sets, budgets, max_new_tokens: int, batch_size: int):
        self.entries, self.sets = entries, sets
        alike: dict[tuple, list[Entry]] = {}  # they differ in name and budget; one walk each
        for e in entries:
            shape = dataclasses.replace(e.contender, name="", budget=1)
            alike.setdefault((shape, id(e.drafter)), []).append(e)
        self.first = {e: same[0] for same in alike.values() for e in same}
        self.budgets = {
            e: sorted({e.contender.budget, *(budgets if e is self.first[e] else ())})
            for e in entries
        }
        self.target: Target = entries[0].target
        self.max_new_tokens, self.batch = max_new_tokens, batch_size
        self.walked = {
            same[0]: same[0].sized(max(self.budgets[e][-1] for e in same))
            for same in alike.values()
        }
        # One observation serves all trees of a drafter.
        self.drafters = {id(e.drafter): self.walked[e] for e in reversed(self.walked)}
        self.spare = spare_tokens(entries, budgets)
        longest = max(len(row) for rows in sets.values() for row in rows)
        together = Together(tuple(d.drafter for d in self.drafters.values()))
        self.capacity = capacity_for(
            longest + max_new_tokens + self.spare, Decoder(self.target.config, together)
        )

    def rows(self, sampling: Sampling, done: Done):
        temperature, dtype = sampling.temperature, self.entries[0].contender.dtype
        walks = [(e.contender.name, budget) for e in self.entries for budget in self.budgets[e]]
        for name, rows in self.sets.items():
            if _known(done, "walk", name, temperature, walks):
                continue
            answers = w.record(
                self.target,
                rows,
                max_new_tokens=self.max_new_tokens,
                spare=self.spare,
                sampling=sampling,
                batch_size=self.batch,
                capacity=self.capacity,
            )
            tables, gaps = self._tables(answers, name)
            # Rounds come last: if they are known, all rows of the set are.
            for entry in self.entries:
                bins = self._bins(entry, answers, tables[self.first[entry]])
                if bins is not None:
                    c = entry.contender
                    budget = self.budgets[entry][-1]
                    yield Reliability(name, temperature, c.name, budget, bins.tolist())
            for drafter, found in gaps.items():
                yield Branches(name, temperature, drafter, dtype, found)
            for entry in self.entries:
                own = tables[self.first[entry]]
                for budget in self.budgets[entry]:
                    yield self._rounds(entry, name, temperature, budget, answers, own)

    def _tables(self, answers: list[w.RecordedAnswer], name: str):
        """The tables of all answers per walk, and the branch gaps per drafter."""
        tables: dict[Entry, list[w.Table]] = {entry: [] for entry in self.walked}
        gaps: dict[str, list[float]] = {}
        chains = {
            e.contender.drafter: (e, e.sized(e.drafter.drafter.depth + 1, tree="chain"))
            for e in self.walked
            if e.contender.tree and e.contender.head == "own"
            if not self.target.config.delta_layers  # see `walk.branch_gaps`
            if len(e.drafter.drafter.parts) == 1
        }
        options = dict(batch=self.batch, capacity=self.capacity)
        batches = w.observe_batches(self.target, [*self.drafters.values()], answers, **options)
        total = -(-len(answers) // self.batch)
        for batch, observed in tqdm(
            batches, desc=f"walk {name}", unit="batch", total=total, leave=False
        ):
            states = dict(zip(self.drafters, observed.states, strict=True))
            for entry, walked in self.walked.items():
                tables[entry] += w.tabulate(observed, batch, walked, states[id(entry.drafter)])
            for drafter, (entry, chain) in chains.items():
                state = states[id(entry.drafter)]
                found = w.branch_gaps(self.target, observed, batch, chain, state)
                gaps.setdefault(drafter, []).extend(found)
        return tables, gaps

    def _rounds(self, entry: Entry, name, temperature, budget, answers, tables) -> Rounds:
        pairs = zip(answers, tables, strict=True)
        stats = [w.walk(answer, table, budget)[0] for answer, table in pairs]
        return Rounds(
            **_labels(name, temperature, entry.contender, budget),
            how="walk",
            tokens=[answer.new_tokens for answer in answers],
            **counts(stats),
        )

    def _bins(self, entry: Entry, answers, tables) -> np.ndarray | None:
        """None for a drafter without informative scores (prompt lookup's are all zero)."""
        budget, bins, informed = self.budgets[entry][-1], 0, False
        for answer, table in zip(answers, tables, strict=True):
            _, visited = w.walk(answer, table, budget)
            predicted, accepted = w.predictions(table, visited, budget)
            informed |= bool((predicted < 1).any())
            bins = bins + reliability_bins(predicted, accepted)
        return bins if informed else None


def speed(
    entries: Sequence[Entry],
    sets: Sets,
    *,
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 256,
    plain_targets: Mapping[str, Target] | None = None,
    others: Mapping[str, Run] | None = None,
    done: Done = (),
) -> Iterator[Rounds]:
    """Times every contender, and every form of plain decoding, taking turns.

    Args:
      plain_targets: further targets to decode plainly, by dtype.
      others: further decoders to time, for example another library's.
      done: keys of known rows (`results.key`); a set whose rounds are all known is left out. If
        a row is missing, all decoders run the set again, in turn.
    """
    targets = {**(plain_targets or {}), **{e.contender.dtype: e.target for e in entries}}
    # What is decoded: a contender, its target, its drafter and its budget.
    decoders = [
        (plain(f"{name}, {dtype}", dtype), target, form, 1)
        for dtype, target in targets.items()
        for name, form in plain_forms().items()
    ]
    decoders += [(e.contender, e.target, e.sized(), e.contender.budget) for e in entries]
    timed = [(c.name, c.budget) for c, *_ in decoders] + [(name, 1) for name in others or {}]
    missing = {
        name: rows
        for name, rows in sets.items()
        if not _known(done, "decode", name, sampling.temperature, timed)
    }
    if not missing:
        return
    runs = {
        contender: runner(
            target,
            drafter,
            [row for rows in sets.values() for row in rows],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            budget=budget,
        )
        for contender, target, drafter, budget in decoders
    }
    runs |= {plain(name, "float32"): run for name, run in (others or {}).items()}
    for name, rows in missing.items():
        yield from _timed(runs, name, rows, sampling.temperature)


def _timed(
    runs: Mapping[Contender, Run], name: str, rows: Sequence[list[int]], temperature: float
) -> Iterator[Rounds]:
    """Decodes one set with every contender, in turn."""
    answers = take_turns(
        runs, rows, progress=lambda x: tqdm(x, desc=f"decode {name}", leave=False)
    )
    reference = {}
    for c, completions in answers.items():
        own = reference.setdefault(c.dtype, completions)  # its target's plain decoding
        yield Rounds(
            **_labels(name, temperature, c, c.budget),
            how="decode",
            tokens=[len(x.token_ids) for x in completions],
            seconds=[x.seconds for x in completions],
            equal=[x.token_ids == y.token_ids for x, y in zip(completions, own, strict=True)],
            **counts([x.stats for x in completions]),
        )


def costs(
    entries: Sequence[Entry], *, sampling: Sampling = Sampling(), done: Done = ()
) -> Iterator[Costs | Verify]:
    """Phases of a round of every contender, and of verifying n nodes.

    Args:
      done: keys of rows that are known (`results.key`), and left out.
    """
    targets = {entry.contender.dtype: entry.target for entry in entries}
    for dtype, target in targets.items():
        if ("verify", dtype) not in done:
            yield Verify(dtype, {str(n): ms for n, ms in verify_costs(target).items()})
        if ("costs", PLAIN, dtype, 1) in done:
            continue
        plain_ms = [
            phase_costs(target, form, sampling=sampling) for form in plain_forms().values()
        ]
        best = min(plain_ms, key=lambda phases: phases["verify"] + phases["commit"])
        yield Costs(PLAIN, dtype, 1, best)
    for entry in tqdm(entries, desc="phases", leave=False):
        c = entry.contender
        if ("costs", c.name, c.dtype, c.budget) in done:
            continue
        phases = phase_costs(entry.target, entry.sized(), budget=c.budget, sampling=sampling)
        yield Costs(c.name, c.dtype, c.budget, phases)


def _known(done: Done, how: str, set: str, temperature: float, decoders) -> bool:
    """Whether the rounds of all `decoders`, each a (name, budget), are known."""
    return all(("rounds", how, set, temperature, *decoder) in done for decoder in decoders)


def plain(name: str, dtype: str) -> Contender:
    """A contender that verifies one node."""
    return Contender(name, PLAIN, tree="chain", budget=1, dtype=dtype)


def _labels(set: str, temperature: float, c: Contender, budget: int) -> dict:
    return {
        "set": set,
        "temperature": temperature,
        "decoder": c.name,
        "drafter": c.drafter,
        "tree": None if c.drafter in (PLAIN, "ngram") else c.tree,
        "head": c.head,
        "dtype": c.dtype,
        "budget": budget,
    }
