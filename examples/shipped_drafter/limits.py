"""What limits tau: a drafter's candidates, the nodes verified, or what lookup sees already.

Walks along the target's own answers (nothing is timed):

    cd examples/shipped_drafter
    python limits.py measure --drafters shipped
    python limits.py draw --into ../../docs/report.md --output ../../docs/evaluation

`measure` resumes after an interruption, and adds drafters given later (their names are what
tables show: NAME=FOLDER) to what the file holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import DEEPEST_MATCH
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation import oracle, results
from jaxspec.evaluation import walk as w
from jaxspec.evaluation.comparison import machine
from jaxspec.evaluation.contenders import Contender, Entry, load_entries
from jaxspec.evaluation.measure import Sets
from jaxspec.evaluation.plots import COLOURS, QUIET
from jaxspec.evaluation.report import into, table
from jaxspec.evaluation.view import Line, View

RESULTS = Path(__file__).with_name("limits.jsonl")
SETS = ("gsm8k", "math500", "humaneval", "mbpp", "mt-bench")
BUDGETS = (8, 16, 32, 64, 128)
CANDIDATES = (1, 2, 4, 8, 16)
ANY = 1 << 30  # candidates: all that the drafter drafts
JOINT_BUDGET = 16
SHOWN_DEPTHS = 7
LOOKUP = "lookup"
GRAM = 8  # tokens that are the same by copying, hardly by chance
TAU_MARKS = "<!-- limits -->", "<!-- end of limits -->"
TITLE = dict(loc="left", fontsize=10, color=QUIET)
DEPTH_MARKS = "<!-- depths -->", "<!-- end of depths -->"
SHARE_MARKS = "<!-- shares -->", "<!-- end of shares -->"


@dataclasses.dataclass(frozen=True)
class Measure:
    """Walk the answers to the evaluation prompts."""

    drafters: tuple[str, ...] = ("shipped",)
    """Trained drafters, NAME=FOLDER or a name as for `generate`, without +ngram."""
    prompts: Path = Path(__file__).parents[3] / "shared" / "prompts"
    """Folder of the evaluation's prompts."""
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
        keep(self.output, setup, lambda done: walked(entries, sets, at, length, done))


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


def keep(
    output: Path,
    setup: results.RunSettings,
    measure: Callable[[results.Done], Iterable[results.Row]],
) -> None:
    """Appends the rows that a file does not have yet, as they come."""
    done = results.held(output, setup)
    results.cut_torn(output)
    for row in itertools.chain([setup], measure(done)):
        if results.key(row) not in done:
            results.append(output, row)
            done.add(results.key(row))


def walked(
    entries: list[Entry],
    sets: Sets,
    temperature: float,
    length: int,
    done: results.Done,
    budgets: Sequence[int] = BUDGETS,
) -> Iterator[results.Row]:
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
    conditioned = entry.drafter.drafter.parts[0].path_conditioned
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
) -> Iterator[results.Row]:
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


def _last(name: str, temperature: float, entry: Entry) -> results.Joint:
    """The last row of a set, without its counts: where it is known, all of the set is."""
    named = entry.contender.name
    return results.Joint(name, temperature, f"{named}, both", JOINT_BUDGET, named, LOOKUP, ())


def joint(answer: w.RecordedAnswer, both: w.Table, first: w.Table, second: w.Table):
    """Counts of `results.Joint` for one answer."""
    _, visited = w.walk(answer, both, JOINT_BUDGET)
    accepted = [(t.nodes[visited] < JOINT_BUDGET).sum(axis=1) for t in (first, second)]
    counts = np.zeros([t.nodes.shape[1] + 1 for t in (first, second)], int)
    np.add.at(counts, tuple(accepted), 1)
    return counts.tolist()


def copies(
    name: str, temperature: float, answers: Sequence[w.RecordedAnswer]
) -> results.Copies:
    """How much of the answers stands in their prompts, or stood in themselves before."""
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
    return results.Copies(name, temperature, GRAM, tokens, from_prompt, from_answer)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draw tables and pictures from what was measured."""

    results: tyro.conf.Positional[Path] = RESULTS
    into: Path | None = None
    """Markdown file that gets the tables between its marks; printed if left out."""
    output: Path | None = None
    """Folder for limits.png."""
    temperature: float = 0.0

    def run(self) -> None:
        rows = results.read_rows(self.results)
        found = Found(rows, self.temperature)
        tables = {
            TAU_MARKS: tau_table(found),
            DEPTH_MARKS: depth_table(found),
            SHARE_MARKS: share_table(found),
        }
        write(tables, self.into)
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            picture(found).savefig(self.output / "limits.png", dpi=150, facecolor="white")


def write(tables: dict[tuple[str, str], str], document: Path | None) -> None:
    """Puts tables between their marks in a document, or prints them."""
    if document is None:
        print("\n\n".join(tables.values()))
        return
    text = document.read_text(encoding="utf-8")
    for marks, drawn in tables.items():
        text = into(text, drawn, marks)
    document.write_text(text, encoding="utf-8")


class Found:
    """Rows of one temperature by decoder and budget, and of all sets."""

    def __init__(self, rows: list[results.Row], temperature: float):
        lines = View(rows).select("walk", temperature)
        self.lines: dict[str, dict[int, Line]] = {}
        for line in lines:
            own = self.lines.setdefault(line.label.decoder, {})
            own[line.label.budget] = line
        self.joint: dict[str, list[results.Joint]] = {}
        for row in rows:
            if isinstance(row, results.Joint) and row.temperature == temperature:
                self.joint.setdefault(row.first, []).append(row)
        if not self.joint:
            raise ValueError(f"nothing was walked at temperature {temperature:g}")

    def tau(self, decoder: str, budget: int) -> m.Estimate:
        return m.estimate(self.lines[decoder][budget].tau)


def tau_table(found: Found) -> str:
    """What trees get, and what oracles over candidates would get."""
    rows = []
    for named in found.joint:
        for shown, tree, best in (
            (named, "drafter", "oracle"),
            (f"{named} and lookup", "both", "oracle and lookup"),
        ):
            cells = [found.tau(f"{named}, {tree}", budget) for budget in (16, 128)]
            cells += [found.tau(f"{named}, {best}", k) for k in (*CANDIDATES, ANY)]
            rows.append([shown, *(f"{cell:.2f}" for cell in cells)])
    heads = ["16 nodes", "128 nodes", *(f"best of {k}" for k in CANDIDATES), "of all"]
    return table(["tokens per round", *heads], rows, left=1)


def depth_table(found: Found) -> str:
    """Share of rounds accepted at a depth, of those that accepted all before."""
    rows = []
    for named in found.joint:
        for label, (decoder, budget) in by_depth(named).items():
            rates = conditional(found.lines[decoder][budget])[:SHOWN_DEPTHS]
            cells = ["" if np.isnan(rate) else f"{rate:.2f}" for rate in rates]
            cells += [""] * (SHOWN_DEPTHS - len(cells))
            row = [label, str(budget), *cells]
            if row not in rows:  # lookup is the same beside every drafter
                rows.append(row)
    depths = [f"depth {depth}" for depth in range(1, SHOWN_DEPTHS + 1)]
    return table(["accepted, given all before", "nodes", *depths], rows, left=1)


def by_depth(named: str) -> dict[str, tuple[str, int]]:
    """Decoders and their nodes whose acceptance by depth is shown, by what they are called."""
    return {
        LOOKUP: (LOOKUP, 16),
        named: (f"{named}, drafter", 16),
        f"{named} and lookup": (f"{named}, both", 16),
        f"{named}, 128 nodes": (f"{named}, drafter", 128),
    }


def conditional(line: Line) -> np.ndarray:
    """By depth; nan where fewer than 100 rounds came so far, whose rates say nothing."""
    survival, rounds = line.survival, line.column(results.Rounds.rounds).sum()
    enough = np.concatenate([[1.0], survival[:-1]]) * rounds >= 100
    return np.where(enough, m.conditional(survival), np.nan)


def share_table(found: Found) -> str:
    """Share of rounds in which drafter and lookup would each have accepted enough."""
    rows = []
    for named, own in found.joint.items():
        for least in (1, 2, 4):
            cells = [f"{100 * share.value:.0f}% [{100 * share.low:.0f}, {100 * share.high:.0f}]"
                     for share in shares(own, least).values()]  # fmt: skip
            rows.append([named, f"{least} or more", *cells])
    heads = ["both", "the drafter alone", "lookup alone", "neither"]
    return table(["drafter", "drafted tokens", *heads], rows, left=2)


def shares(rows: list[results.Joint], least: int) -> dict[str, m.Estimate]:
    """Share of rounds by who would have accepted at least so many drafted tokens."""
    counts = [np.asarray(own) for row in rows for own in row.counts]
    weights = m.resamplings([len(row.counts) for row in rows])
    rounds = np.array([own.sum() for own in counts])
    parts = {
        "both": [own[least:, least:].sum() for own in counts],
        "drafter": [own[least:, :least].sum() for own in counts],
        "lookup": [own[:least, least:].sum() for own in counts],
        "neither": [own[:least, :least].sum() for own in counts],
    }
    return {
        who: m.estimate(m.ratio(np.array(own), rounds, weights)) for who, own in parts.items()
    }


def picture(found: Found):
    """A row of panels per drafter: depth, budget against candidates, overlap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 3.6 * len(found.joint)), layout="constrained")
    grid = figure.subplots(len(found.joint), 3, squeeze=False)
    for (by_depth, by_budget, overlap), named in zip(grid, found.joint, strict=True):
        _draw_depths(by_depth, found, named)
        _draw_budgets(by_budget, found, named)
        _draw_shares(overlap, found.joint[named])
        for panel in (by_depth, by_budget, overlap):
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(fontsize=8, framealpha=1, edgecolor="none")
        overlap.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8,
                       frameon=False, handlelength=1, columnspacing=1)  # fmt: skip
    return figure


def _draw_depths(panel, found: Found, named: str) -> None:
    looks = dict(zip(by_depth(named), ("o-", "s-", "D-", "s:"), strict=True))
    colours = (*COLOURS[:3], COLOURS[1])
    for (label, (decoder, budget)), colour in zip(
        by_depth(named).items(), colours, strict=True
    ):
        rates = conditional(found.lines[decoder][budget])
        depths = np.arange(1, len(rates) + 1)
        panel.plot(depths, rates, looks[label], label=label, color=colour, ms=4)
    panel.set(ylim=(0, 1), xlabel="depth", ylabel="share of rounds")
    panel.set_title("Accepted, given all before; 16 nodes", **TITLE)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(color="#e3e7eb", lw=0.7)


def _draw_budgets(panel, found: Found, named: str) -> None:
    curves = (
        (named, "drafter", "oracle", COLOURS[1], "s"),
        (f"{named} and lookup", "both", "oracle and lookup", COLOURS[2], "D"),
    )
    for label, tree, best, colour, marker in curves:
        found_taus = [found.tau(f"{named}, {tree}", budget) for budget in BUDGETS]
        low, high = [e.low for e in found_taus], [e.high for e in found_taus]
        panel.fill_between(BUDGETS, low, high, color=colour, alpha=0.12, lw=0)
        values = [e.value for e in found_taus]
        panel.plot(BUDGETS, values, color=colour, marker=marker, ms=4, label=label)
        for k in (2, 4, 16):
            bound = found.tau(f"{named}, {best}", k).value
            panel.axhline(bound, color=colour, ls=":", lw=1)
            at = dict(transform=panel.get_yaxis_transform(), va="center", fontsize=7)
            panel.text(1.01, bound, f"best of {k}", color=colour, **at)
    panel.set_xscale("log", base=2)
    panel.set_xticks(BUDGETS, BUDGETS)
    panel.set(xlabel="nodes verified per round", ylabel="tokens per round (tau)")
    panel.set_title("Trees, and what their candidates allow", **TITLE)


def _draw_shares(panel, rows: list[results.Joint]) -> None:
    least = (1, 2, 3, 4, 6)
    bottom = np.zeros(len(least))
    looks = {
        "both": COLOURS[2],
        "drafter": COLOURS[1],
        "lookup": COLOURS[0],
        "neither": "#d5dade",
    }
    labels = {"drafter": "the drafter alone", "lookup": "lookup alone"}
    for who, colour in looks.items():
        height = np.array([shares(rows, n)[who].value for n in least])
        panel.bar(
            range(len(least)), height, 0.75, bottom, color=colour, label=labels.get(who, who)
        )
        bottom += height
    panel.set_xticks(range(len(least)), [f"{n}+" for n in least])
    panel.set(xlabel="drafted tokens accepted", ylabel="share of rounds", ylim=(0, 1))
    panel.set_title(f"Who would have accepted; {JOINT_BUDGET} nodes each", **TITLE)


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(Measure | Draw, description=__doc__).run())
    except ValueError as error:
        sys.exit(f"error: {error}")
