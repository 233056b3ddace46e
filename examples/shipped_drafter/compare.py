"""Compares effects of causal masking, sequential heads and trees on tau, at equal training.

Reads what `recipe.sh` measured and draws the table, the ratios that answer the question, and a
picture. Intervals are 95% bootstrap intervals over prompts; ratios are paired by prompt.

    python examples/shipped_drafter/compare.py out/shipped/kinds-0.jsonl --budget 16
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import tyro

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
    "markov-kl": "DSpark, Markov head, trained by KL",
    "rnn": "DSpark, RNN head",
    "rnn-kl": "DSpark, RNN head started as Markov, KL",
    "treeflash": "TreeFlash, MLP head",
    "ours": "causal slots, RNN head",
    "dflash2": "DFlash2: convolutions, selector",
    "dflash2-data": "DFlash2, labels from the data",
    "eagle3": "EAGLE-3, a pass per depth",
}
CONTRASTS = (  # what changes, and the two decoders whose ratio of tau says what it does
    ("causal masking, chain", "jetspec chain", "dflash chain"),
    ("causal masking, tree", "jetspec top_budget", "dflash top_budget"),
    ("causal masking under an RNN, chain", "ours chain", "rnn chain"),
    ("causal masking under an RNN, tree", "ours path_conditioned", "rnn path_conditioned"),
    ("Markov head, chain", "markov chain", "dflash chain"),
    ("RNN head, chain", "rnn chain", "dflash chain"),
    ("MLP head, chain", "treeflash chain", "dflash chain"),
    ("RNN in place of Markov, tree", "rnn path_conditioned", "markov path_conditioned"),
    ("causal RNN in place of Markov, chain", "ours chain", "markov chain"),
    ("causal RNN in place of Markov, tree", "ours path_conditioned", "markov path_conditioned"),
    ("a tree, no head", "dflash top_budget", "dflash chain"),
    ("a conditioned tree, Markov", "markov path_conditioned", "markov chain"),
    ("a conditioned tree, RNN", "rnn path_conditioned", "rnn chain"),
    ("a conditioned tree, causal RNN", "ours path_conditioned", "ours chain"),
    ("its nodes conditioned, Markov", "markov path_conditioned", "markov top_budget"),
    ("its nodes conditioned, causal RNN", "ours path_conditioned", "ours top_budget"),
    ("head and conditioned nodes", "markov path_conditioned", "dflash top_budget"),
    ("on the path, not a table", "treeflash path_conditioned", "treeflash transitions"),
    ("lookup in the same tree", "markov lookup", "markov path_conditioned"),
    ("convolutions, no selector, tree", "dflash2 top_budget", "dflash top_budget"),
    ("convolutions and selector, chain", "dflash2 chain", "dflash chain"),
    ("DFlash2 in place of Markov, tree", "dflash2 path_conditioned", "markov path_conditioned"),
    ("a conditioned tree, selector", "dflash2 path_conditioned", "dflash2 chain"),
    ("KL in place of total variation, chain", "markov-kl chain", "markov chain"),
    (
        "KL in place of total variation, tree",
        "markov-kl path_conditioned",
        "markov path_conditioned",
    ),
    ("DFlash2 in place of Markov, both KL, chain", "dflash2 chain", "markov-kl chain"),
    (
        "DFlash2 in place of Markov, both KL, tree",
        "dflash2 path_conditioned",
        "markov-kl path_conditioned",
    ),
    ("labels from the data, chain", "dflash2-data chain", "dflash2 chain"),
    ("labels from the data, tree", "dflash2-data path_conditioned", "dflash2 path_conditioned"),
    ("RNN in place of Markov, both KL, chain", "rnn-kl chain", "markov-kl chain"),
    (
        "RNN in place of Markov, both KL, tree",
        "rnn-kl path_conditioned",
        "markov-kl path_conditioned",
    ),
    ("EAGLE-3 in place of Markov, both KL, chain", "eagle3 chain", "markov-kl chain"),
    (
        "EAGLE-3 in place of Markov, both KL, tree",
        "eagle3 path_conditioned",
        "markov-kl path_conditioned",
    ),
)

Lines = dict[str, Line]  # by the decoder's name, "KIND TREE"


@dataclasses.dataclass(frozen=True)
class Compare:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """JSON lines of `python -m jaxspec evaluate`, decoders named "KIND TREE"."""
    again: tuple[Path, ...] = ()
    """The same for drafters trained from another seed, in separate tables."""
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
        text = tables(found, self.budget)
        if self.short:
            temperature, lines = next(iter(found.items()))
            text = taus(lines, self.budget, temperature)
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
    try:
        sys.exit(tyro.cli(Compare, description=__doc__).run())
    except ValueError as error:
        sys.exit(f"error: {error}")
