"""Draws what `curves.sh` measured: tau of drafters that differ from `base` in one thing each.

python draw_curves.py curves.jsonl --into README.md
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from jaxspec.cli import exits
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation.plots import COLOURS, QUIET
from jaxspec.evaluation.report import into, table
from jaxspec.evaluation.results import read_rows
from jaxspec.evaluation.view import Line, View

MARKS = "<!-- curves -->", "<!-- end of curves -->"
NAMES = {  # what is drawn together, in the order of its axis; and what it is compared with
    "layers": (("layers-1", "1"), ("base", "2"), ("layers-3", "3")),
    "taps": (("taps-1", "1"), ("taps-3", "3"), ("base", "5")),
    "draft vocabulary": (
        ("vocab-4096", "4,096"),
        ("base", "16,384"),
        ("vocab-32768", "32,768"),
    ),
    "rank of the Markov head": (("rank-16", "16"), ("base", "64")),
    "steps": (("base", "500"), ("long", "1,400")),
    "conversations, 1,400 steps": (("data-16", "284"), ("data-4", "1,137"), ("long", "4,546")),
}
TREES = {"chain": "chain", "path": "tree of 16 nodes"}


@dataclasses.dataclass(frozen=True)
class Draw:
    results: tyro.conf.Positional[Path]
    """JSON lines that `curves.sh` wrote."""
    into: Path | None = None
    """Markdown file that gets the table between its marks; printed if left out."""
    output: Path | None = None
    """Folder for curves.png."""

    def run(self) -> int:
        view = View(read_rows(self.results))
        lines = {line.label.decoder: line for line in view.select("walk", 0.0)}
        text = tau_table(lines)
        if self.into is None:
            print(text)
        else:
            document = self.into.read_text(encoding="utf-8")
            self.into.write_text(into(document, text, MARKS), encoding="utf-8")
        if self.output is not None:
            path = self.output / "curves.png"
            picture(lines).savefig(path, dpi=150, facecolor="white")
        return 0


def measured(lines: dict[str, Line]) -> dict[str, list[tuple[str, str]]]:
    """Names and values of each curve of which two or more were measured."""
    found = {
        what: [(name, value) for name, value in names if f"{name} path" in lines]
        for what, names in NAMES.items()
    }
    return {what: names for what, names in found.items() if len(names) > 1}


def tau_table(lines: dict[str, Line]) -> str:
    """Tau of every drafter, and its ratio to the one that has all: the last of its curve
    for steps and data, `base` for the others."""
    rows = []
    for what, names in measured(lines).items():
        against = names[-1][0] if names[-1][0] == "long" else "base"
        for name, value in names:
            taus = [m.estimate(lines[f"{name} {tree}"].tau) for tree in TREES]
            ratio = ""
            if name != against:
                ratio = lines[f"{name} path"].tau / lines[f"{against} path"].tau
                ratio = f"{m.estimate(ratio):.3f}"
            rows.append([what, value, *(f"{tau:.2f}" for tau in taus), ratio])
    heads = ["what differs", "value", *TREES.values(), "ratio of trees [95%]"]
    return table(heads, rows, left=1)


def picture(lines: dict[str, Line]):
    from matplotlib.figure import Figure

    curves = measured(lines)
    figure = Figure(figsize=(2.2 * len(curves) + 0.8, 2.9), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (what, names) in zip(panels, curves.items(), strict=True):
        for (tree, label), colour in zip(TREES.items(), COLOURS, strict=False):
            found = [m.estimate(lines[f"{name} {tree}"].tau) for name, _ in names]
            panel.plot([e.value for e in found], "o-", color=colour, label=label, ms=5, lw=1.4)
        panel.set_xticks(range(len(names)), [value for _, value in names])
        panel.set_xlim(-0.3, len(names) - 0.7)
        panel.set_title(what, loc="left", fontsize=9, color=QUIET)
        panel.grid(axis="y", color="#e3e7eb", lw=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens per round (tau)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    exits.script(Draw.run, Draw, __doc__)
