"""Compares effects of causal masking, sequential heads and trees on tau, at equal training.

Reads what `recipe.sh` measured and draws the table, the ratios that answer the question, and a
picture. Intervals are 95% bootstrap intervals over prompts; ratios are paired by prompt.

    python examples/shipped_drafter/compare.py out/shipped/kinds-0.jsonl --budget 16
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

import numpy as np
import tyro

from jaxspec.cli import exits
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation.plots import COLOURS, QUIET
from jaxspec.evaluation.report import into, table
from jaxspec.evaluation.results import read_rows
from jaxspec.evaluation.view import Line, View

MARKS = "<!-- kinds -->", "<!-- end of kinds -->"
TREES = ("chain", "top_budget", "best_first", "transitions", "path_conditioned", "lookup")
KINDS = {
    "dflash": "DFlash: slots see each other",
    "jetspec": "JetSpec: causal slots",
    "markov": "DSpark, Markov head",
    "rnn": "DSpark, RNN head",
    "ours": "causal slots, RNN head",
    "treeflash": "TreeFlash, MLP head",
    "dflash2": "DFlash2: convolutions, selector",
    "dflash2-data": "DFlash2, labels from the data",
    "eagle3": "EAGLE-3, a pass per depth",
}
KINDS |= {f"{kind}-tv": f"{name}, total variation" for kind, name in KINDS.items()}
TREE = "path_conditioned"
CONTRASTS = (  # what changes, and the decoders whose ratios of tau say what it does
    ("causal masking", "jetspec chain", "dflash chain"),
    ("causal masking", "jetspec top_budget", "dflash top_budget"),
    ("causal masking under an RNN", "ours chain", "rnn chain"),
    ("causal masking under an RNN", f"ours {TREE}", f"rnn {TREE}"),
    ("Markov head", "markov chain", "dflash chain"),
    ("RNN in place of Markov", "rnn chain", "markov chain"),
    ("RNN in place of Markov", f"rnn {TREE}", f"markov {TREE}"),
    ("MLP in place of Markov", "treeflash chain", "markov chain"),
    ("MLP in place of Markov", f"treeflash {TREE}", f"markov {TREE}"),
    ("convolutions, no selector", "dflash2 top_budget", "dflash top_budget"),
    ("convolutions and selector", "dflash2 chain", "dflash chain"),
    ("DFlash2 in place of Markov", "dflash2 chain", "markov chain"),
    ("DFlash2 in place of Markov", f"dflash2 {TREE}", f"markov {TREE}"),
    ("labels from the data", "dflash2-data chain", "dflash2 chain"),
    ("labels from the data", f"dflash2-data {TREE}", f"dflash2 {TREE}"),
    ("EAGLE-3 in place of Markov", "eagle3 chain", "markov chain"),
    ("EAGLE-3 in place of Markov", f"eagle3 {TREE}", f"markov {TREE}"),
    ("a tree, no head", "dflash top_budget", "dflash chain"),
    ("a conditioned tree, Markov", f"markov {TREE}", "markov chain"),
    ("a conditioned tree, RNN", f"rnn {TREE}", "rnn chain"),
    ("a conditioned tree, selector", f"dflash2 {TREE}", "dflash2 chain"),
    ("its nodes conditioned, Markov", f"markov {TREE}", "markov top_budget"),
    ("its nodes conditioned, selector", f"dflash2 {TREE}", "dflash2 top_budget"),
    ("head and conditioned nodes", f"markov {TREE}", "dflash top_budget"),
    ("on the path, not a table", f"treeflash {TREE}", "treeflash transitions"),
    ("lookup behind every node", "markov lookup", f"markov {TREE}"),
    ("KL in place of total variation", "markov chain", "markov-tv chain"),
    ("KL in place of total variation", f"markov {TREE}", f"markov-tv {TREE}"),
)

Lines = dict[str, Line]  # by the decoder's name, "KIND TREE"


@dataclasses.dataclass(frozen=True)
class Compare:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """JSON lines of `python -m jaxspec evaluate`, decoders named "KIND TREE"."""
    again: tuple[Path, ...] = ()
    """The same for drafters trained from another seed, in separate tables."""
    clock: tuple[Path, ...] = ()
    """JSON lines of `python -m jaxspec bench`, drafters in folders KIND-SEED: adds a table of
    each kind's time."""
    budget: int = 16
    """Nodes per round of trees; chains have as many as their drafter's block."""
    short: bool = False
    """Only the taus of the first temperature, for a page that quotes them."""
    output: Path | None = None
    """Picture (PNG)."""
    into: Path | None = None
    """Markdown file whose text between the lines `<!-- kinds -->` and `<!-- end of kinds -->`
    is replaced; printed if left out."""

    def run(self) -> int:
        found = chosen(self.results, self.budget)
        temperature, lines = next(iter(found.items()))
        timed = f"\n\n{times(lines, self.clock)}" if self.clock else ""
        text = tables(found, self.budget) + timed
        if self.short:
            text = taus(lines, self.budget, temperature) + timed
        elif self.again:
            again = chosen(self.again, self.budget)
            text += f"\n\nAnother seed:\n\n{tables(again, self.budget)}"
        if self.into is None:
            print(text)
        else:
            document = self.into.read_text(encoding="utf-8")
            self.into.write_text(into(document, text, MARKS), encoding="utf-8")
        if self.output is not None:
            picture(found, self.budget).savefig(self.output, dpi=150, facecolor="white")
        return 0


def chosen(files: tuple[Path, ...], budget: int) -> dict[float, Lines]:
    """Replayed results of one budget, by temperature."""
    view = View([row for path in files for row in read_rows(path)])
    found = {
        t: {x.label.decoder: x for x in view.select("walk", t) if x.label.budget == budget}
        for t in view.temperatures
    }
    if not any(found.values()):
        raise ValueError(f"no walk with budget {budget} in {', '.join(map(str, files))}")
    return found


def tables(found: dict[float, Lines], budget: int) -> str:
    return "\n\n".join(
        f"{taus(lines, budget, t)}\n\n{contrasts(lines)}" for t, lines in found.items()
    )


def taus(lines: Lines, budget: int, temperature: float) -> str:
    trees = [tree for tree in TREES if any(f"{kind} {tree}" in lines for kind in KINDS)]
    rows = [
        [KINDS[kind], *(cell(lines, kind, tree) for tree in trees)] for kind in kinds(lines)
    ]
    head = [f"tokens per round, {budget} nodes, temperature {temperature:g}", *trees]
    return table(head, rows, left=1)


def cell(lines: Lines, kind: str, tree: str) -> str:
    line = lines.get(f"{kind} {tree}")
    return "" if line is None else f"{m.estimate(line.tau):.2f}"


def kinds(lines: Lines) -> list[str]:
    return [kind for kind in KINDS if f"{kind} chain" in lines]


def times(lines: Lines, clock: tuple[Path, ...]) -> str:
    """Milliseconds of each kind's chain and best tree, and the speed that follows.

    Verifying and committing as many nodes takes the same of all, so their medians over the
    decoders of a file count; only drafting, growth included, is a kind's own.
    """
    rows = []
    for view in (View(read_rows(path)) for path in clock):
        costs = {}
        for row in view.costs:
            if named := re.search(r"([\w-]+)-\d+/drafter,tree=(\w+)", row.decoder):
                costs[" ".join(named.groups())] = row
        if missing := costs.keys() - lines.keys():
            raise ValueError(f"the clock has {sorted(missing)}, which were not walked")
        phases = [row.phases for row in costs.values()]
        rest = np.median([x["verify"] + x["commit"] for x in phases])
        for name, row in costs.items():
            kind, tree = name.split()
            own = row.phases["draft"] + (row.phases["grow"] or 0.0)
            tau = lines[name].tau
            speed = m.estimate(tau * view.plain_ms() / (own + rest))
            ms = f"{own:.1f}", f"{own + rest:.1f}"
            cells = tree, str(row.budget), *ms, f"{m.estimate(tau):.2f}", f"{speed:.2f}"
            rows.append([KINDS[kind], *cells])
    head = ["kind", "tree", "nodes", "ms, drafting", "ms, round", "tau", "times plain decoding"]
    return table(head, rows, left=2)


def contrasts(lines: Lines) -> str:
    rows = [
        [what, over, under, f"{m.estimate(lines[over].tau / lines[under].tau):.3f}"]
        for what, over, under in CONTRASTS
        if over in lines and under in lines
    ]
    return table(["what changes", "tau of", "over that of", "ratio [95%]"], rows, left=3)


def picture(found: dict[float, Lines], budget: int):
    """A panel per temperature: kinds side by side, a dot with its interval per tree."""
    from matplotlib.figure import Figure

    width = max(9, 1.1 * max(len(kinds(lines)) for lines in found.values()))
    figure = Figure(figsize=(width, 3.1 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (temperature, lines) in zip(panels, found.items(), strict=True):
        names = kinds(lines)
        for i, (tree, colour) in enumerate(zip(TREES, COLOURS, strict=False)):
            own = [
                (place + 0.11 * (i - (len(TREES) - 1) / 2), m.estimate(line.tau))
                for place, kind in enumerate(names)
                if (line := lines.get(f"{kind} {tree}")) is not None
            ]
            if own:
                x, found_taus = zip(*own, strict=True)
                y = [e.value for e in found_taus]
                below = [e.value - e.low for e in found_taus]
                above = [e.high - e.value for e in found_taus]
                look = dict(fmt="o", color=colour, ms=5, lw=1.4)
                panel.errorbar(x, y, [below, above], label=tree, **look)
        labels = [textwrap.fill(KINDS[kind], 13) for kind in names]
        panel.set_xticks(range(len(names)), labels, fontsize=8)
        panel.set_title(f"temperature {temperature:g}", loc="left", fontsize=10, color=QUIET)
        panel.set_ylabel("tokens per round (tau)")
        panel.grid(axis="y", color="#e3e7eb", lw=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle(
        f"Kinds of drafter at equal training, {budget} nodes",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


if __name__ == "__main__":
    exits.script(Compare.run, Compare, __doc__)
