"""Measures what limits tau: a drafter's candidates, nodes verified, or overlap with lookup.

Walks along the target's own answers (nothing is timed):

    cd examples/shipped_drafter
    python limits.py --drafters shipped
    python draw_limits.py --into ../../docs/report.md --output ../../docs/evaluation

The first resumes after an interruption, and adds drafters given later (their names are what
tables show: NAME=FOLDER) to what the file holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import oracle  # the script beside this one
from tqdm import tqdm

from jaxspec.cli import exits
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import DEEPEST_MATCH
from jaxspec.evaluation import results
from jaxspec.evaluation import walk as w
from jaxspec.evaluation.comparison import machine
from jaxspec.evaluation.contenders import Contender, Entry, load_entries
from jaxspec.evaluation.measure import Sets

RESULTS = Path(__file__).with_name("limits.jsonl")
SETS = ("gsm8k", "math500", "humaneval", "mbpp", "mt-bench")
BUDGETS = (8, 16, 32, 64, 128)
CANDIDATES = (1, 2, 4, 8, 16)
ANY = 1 << 30  # candidates: the whole draft vocabulary
JOINT_BUDGET = 16
LOOKUP = "lookup"
GRAM = 8  # run of equal tokens that counts as copied rather than chance


@dataclasses.dataclass(frozen=True)
class Joint:
    """What two decoders would have accepted in the rounds of a third.

    Attributes:
      decoder: the third decoder; `budget` is that of all three.
      first, second: names of the other two.
      counts: [prompts, P + 1, P' + 1], rounds in which the first would have accepted 0, 1, …
        drafted tokens and the second 0, 1, ….
    """

    set: str
    temperature: float
    decoder: str
    budget: int
    first: str
    second: str
    counts: Sequence[Sequence[Sequence[int]]]
    kind: Literal["joint"] = "joint"
    identity: ClassVar = ("set", "temperature", "decoder", "budget", "first", "second")


@dataclasses.dataclass(frozen=True)
class Copies:
    """How much of the target's answers repeats earlier text; lists have one entry per prompt.

    Attributes:
      gram: a token counts as copied if the last `gram` tokens occurred before.
      tokens: tokens of the answer.
      from_prompt: tokens copied from the prompt.
      from_answer: further tokens copied from earlier in the answer.
    """

    set: str
    temperature: float
    gram: int
    tokens: Sequence[int]
    from_prompt: Sequence[int]
    from_answer: Sequence[int]
    kind: Literal["copies"] = "copies"
    identity: ClassVar = ("set", "temperature", "gram")


KINDS = results.KINDS | {cls.kind: cls for cls in (Joint, Copies)}
Row = results.Row | Joint | Copies


@dataclasses.dataclass(frozen=True)
class Measure:
    """Walk the answers to the evaluation prompts."""

    drafters: tuple[str, ...] = ("shipped",)
    """Trained drafters, NAME=FOLDER or a name as for `generate`, without +ngram."""
    prompts: Path = Path(__file__).parents[3] / "shared" / "prompts"
    """Folder of the evaluation's prompts: see Prompts in README.md."""
    output: Path = RESULTS
    count: int = 8
    """Prompts per set, evenly apart."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    target: str = "smollm2-135m"
    dtype: str = "bfloat16"

    def run(self) -> None:
        import jaxspec
        from jaxspec.cli.prompt_sets import chosen, encoded

        texts = chosen([str(self.prompts / f"{name}.jsonl") for name in SETS], self.count, [])
        jaxspec.enable_compilation_cache()
        entries = load_entries(self.target, contenders(self.drafters, self.dtype))
        length, at = self.max_new_tokens, self.temperature
        sets, _ = encoded(entries[0].target, texts, thinking=None, max_new_tokens=length)
        setup = setup_of(entries[0], texts, length)
        results.resume(
            self.output, setup, lambda done: walked(entries, sets, at, length, done), KINDS
        )


def contenders(drafters: Sequence[str], dtype: str) -> list[Contender]:
    """Drafters given as NAME=FOLDER or a name, each joined with lookup."""
    found = []
    for text in drafters:
        name, _, drafter = text.rpartition("=")
        found.append(Contender(name or text, f"{drafter}+ngram", tree="chain", dtype=dtype))
    return found


def setup_of(entry: Entry, texts: dict[str, list[str]], length: int) -> results.RunSettings:
    """What the rows of a file have in common; drafters may be added."""
    return results.RunSettings(
        {
            "target": entry.target.name,
            "dtype": entry.contender.dtype,
            "prompts": {name: len(rows) for name, rows in texts.items()},
            "prompts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
            "max_new_tokens": length,
            **machine(),
        }
    )


def walked(
    entries: list[Entry],
    sets: Sets,
    temperature: float,
    length: int,
    done: results.Done,
    budgets: Sequence[int] = BUDGETS,
) -> Iterator[Row]:
    """Rows of all drafters on all sets, `length` new tokens each, at one temperature.

    Args:
      entries: drafters joined with lookup, by `contenders`.
      budgets: nodes of the trees, ascending.
      done: what is known; a set is left out for the drafters that have walked it.
    """
    for name, prompts in sets.items():
        missing = [e for e in entries if results.key(_last(name, temperature, e)) not in done]
        if not missing:
            continue
        answers = w.record(
            missing[0].target,
            prompts,
            max_new_tokens=length,
            spare=DEEPEST_MATCH + 1,
            sampling=Sampling(temperature=temperature),
            batch_size=len(prompts),
        )
        yield copies(name, temperature, answers)
        for entry in tqdm(missing, desc=f"{name}, temperature {temperature:g}"):
            yield from limits(entry, name, temperature, answers, budgets)


def forms(entry: Entry, nodes: int) -> dict[str, LoadedDrafter]:
    """Lookup, a drafter and both, each with the trees of so many nodes that serve it best.

    Args:
      entry: the drafter joined with lookup.
    """
    conditioned = entry.drafter.drafter.parts[0].best_tree == "path_conditioned"
    both = entry.sized(nodes, tree="path_conditioned" if conditioned else "top_budget")
    drafter, lookup = map(LoadedDrafter, both.drafter.parts, both.params)
    named = entry.contender.name
    return {LOOKUP: lookup, f"{named}, drafter": drafter, f"{named}, both": both}


def limits(
    entry: Entry,
    name: str,
    temperature: float,
    answers: list[w.RecordedAnswer],
    budgets: Sequence[int] = BUDGETS,
) -> Iterator[Row]:
    """Rows of one drafter on one set.

    Args:
      entry: a drafter joined with lookup.
    """
    trees = forms(entry, budgets[-1])
    named = entry.contender.name
    alone, both = trees[f"{named}, drafter"], trees[f"{named}, both"]
    observed = w.observe(entry.target, [both], answers, batch=len(answers))
    ((own, seen),) = observed.states
    states = dict(zip(trees, (seen, own, (own, seen)), strict=True))
    tables = {
        what: w.tabulate(observed, answers, tree, states[what]) for what, tree in trees.items()
    }
    ranks = oracle.ranks(observed, answers, alone, own)
    better = [
        oracle.with_other(a, b, budgets[-1]) for a, b in zip(ranks, tables[LOOKUP], strict=True)
    ]
    bounds = {f"{named}, oracle": ranks, f"{named}, oracle and lookup": better}

    def rounds(what: str, own_tables, budget: int) -> results.Rounds:
        pairs = zip(answers, own_tables, strict=True)
        stats = [w.walk(answer, own, budget)[0] for answer, own in pairs]
        return results.Rounds(
            set=name,
            temperature=temperature,
            decoder=what,
            drafter="ngram" if what == LOOKUP else named,
            tree=None if what == LOOKUP or what in bounds else alone.drafter.tree.kind,
            head="own",
            dtype=entry.contender.dtype,
            budget=budget,
            how="walk",
            tokens=[answer.new_tokens for answer in answers],
            **results.counts(stats),
        )

    for what, own_tables in tables.items():
        yield from (rounds(what, own_tables, budget) for budget in budgets)
    for what, own_tables in bounds.items():
        yield from (rounds(what, own_tables, k) for k in (*CANDIDATES, ANY))
    counts = [
        joint(answer, *found)
        for answer, *found in zip(answers, *reversed(tables.values()), strict=True)
    ]
    yield dataclasses.replace(_last(name, temperature, entry), counts=counts)


def _last(name: str, temperature: float, entry: Entry) -> Joint:
    """The last row of a set, without its counts: if it is known, the whole set is."""
    named = entry.contender.name
    return Joint(name, temperature, f"{named}, both", JOINT_BUDGET, named, LOOKUP, ())


def joint(answer: w.RecordedAnswer, both: w.Table, first: w.Table, second: w.Table):
    """Counts of `Joint` for one answer."""
    _, visited = w.walk(answer, both, JOINT_BUDGET)
    accepted = [(t.nodes[visited] < JOINT_BUDGET).sum(axis=1) for t in (first, second)]
    counts = np.zeros([t.nodes.shape[1] + 1 for t in (first, second)], int)
    np.add.at(counts, tuple(accepted), 1)
    return counts.tolist()


def copies(name: str, temperature: float, answers: Sequence[w.RecordedAnswer]) -> Copies:
    """How much of the answers is copied from their prompts, or from earlier in themselves."""
    tokens, from_prompt, from_answer = [], [], []
    for answer in answers:
        end = answer.start + answer.new_tokens
        seen = {answer.tokens[i : i + GRAM] for i in range(answer.start - GRAM + 1)}
        own, counts = set(), [0, 0]
        for last in range(answer.start + GRAM, end + 1):
            gram = answer.tokens[last - GRAM : last]
            counts[0] += gram in seen
            counts[1] += gram in own and gram not in seen
            own.add(gram)
        tokens.append(answer.new_tokens)
        from_prompt.append(counts[0])
        from_answer.append(counts[1])
    return Copies(name, temperature, GRAM, tokens, from_prompt, from_answer)


if __name__ == "__main__":
    exits.script(Measure.run, Measure, __doc__)
