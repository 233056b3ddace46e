"""Draws three tables and a picture of what limits tau, from the results of `limits.py`.

python draw_limits.py --into ../../docs/report.md --output ../../docs/evaluation
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import limits  # the script beside this one
import numpy as np
import tyro

from jaxspec.cli import exits
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation import results
from jaxspec.evaluation.plots import COLOURS, QUIET
from jaxspec.evaluation.report import into, table
from jaxspec.evaluation.view import Line, View

SHOWN_DEPTHS = 7
TITLE = dict(loc="left", fontsize=10, color=QUIET)
TAU_MARKS = "<!-- limits -->", "<!-- end of limits -->"
DEPTH_MARKS = "<!-- depths -->", "<!-- end of depths -->"
SHARE_MARKS = "<!-- shares -->", "<!-- end of shares -->"


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draw tables and pictures from what was measured."""

    results: tyro.conf.Positional[Path] = limits.RESULTS
    into: Path | None = None
    """Markdown file that gets the tables between its marks; printed if left out."""
    output: Path | None = None
    """Folder for limits.png."""
    temperature: float = 0.0

    def run(self) -> None:
        rows = results.read_rows(self.results, limits.KINDS)
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

    def __init__(self, rows: list[limits.Row], temperature: float):
        lines = View(rows).select("walk", temperature)
        self.lines: dict[str, dict[int, Line]] = {}
        for line in lines:
            own = self.lines.setdefault(line.label.decoder, {})
            own[line.label.budget] = line
        self.joint: dict[str, list[limits.Joint]] = {}
        for row in rows:
            if isinstance(row, limits.Joint) and row.temperature == temperature:
                self.joint.setdefault(row.first, []).append(row)
        if not self.joint:
            raise ValueError(f"nothing was walked at temperature {temperature:g}")

    def tau(self, decoder: str, budget: int) -> m.Estimate:
        return m.estimate(self.lines[decoder][budget].tau)


def tau_table(found: Found) -> str:
    """Tau of trees, and of oracles over candidates."""
    rows = []
    for named in found.joint:
        for shown, tree, best in (
            (named, "drafter", "oracle"),
            (f"{named} and lookup", "both", "oracle and lookup"),
        ):
            cells = [found.tau(f"{named}, {tree}", budget) for budget in (16, 128)]
            cells += [
                found.tau(f"{named}, {best}", k) for k in (*limits.CANDIDATES, limits.ANY)
            ]
            rows.append([shown, *(f"{cell:.2f}" for cell in cells)])
    heads = ["16 nodes", "128 nodes", *(f"best of {k}" for k in limits.CANDIDATES), "of all"]
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
        limits.LOOKUP: (limits.LOOKUP, 16),
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


def shares(rows: list[limits.Joint], least: int) -> dict[str, m.Estimate]:
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
        found_taus = [found.tau(f"{named}, {tree}", budget) for budget in limits.BUDGETS]
        low, high = [e.low for e in found_taus], [e.high for e in found_taus]
        panel.fill_between(limits.BUDGETS, low, high, color=colour, alpha=0.12, lw=0)
        values = [e.value for e in found_taus]
        panel.plot(limits.BUDGETS, values, color=colour, marker=marker, ms=4, label=label)
        for k in (2, 4, 16):
            bound = found.tau(f"{named}, {best}", k).value
            panel.axhline(bound, color=colour, ls=":", lw=1)
            at = dict(transform=panel.get_yaxis_transform(), va="center", fontsize=7)
            panel.text(1.01, bound, f"best of {k}", color=colour, **at)
    panel.set_xscale("log", base=2)
    panel.set_xticks(limits.BUDGETS, limits.BUDGETS)
    panel.set(xlabel="nodes verified per round", ylabel="tokens per round (tau)")
    panel.set_title("Trees, and what their candidates allow", **TITLE)


def _draw_shares(panel, rows: list[limits.Joint]) -> None:
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
    panel.set_title(f"Who would have accepted; {limits.JOINT_BUDGET} nodes each", **TITLE)


if __name__ == "__main__":
    exits.script(Draw.run, Draw, __doc__)
