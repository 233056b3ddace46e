"""Pictures of an evaluation (extra `plots`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxspec.evaluation import metrics as m
from jaxspec.evaluation.results import Rounds
from jaxspec.evaluation.view import ALL, View, best_plain, is_plain, largest_budgets

# Okabe and Ito's colours, which are safe for colour-blind readers; then dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
QUIET = "#5f6b76"


def check_matplotlib() -> None:
    """Raises ValueError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from error


def save_all(view: View, folder: Path) -> list[Path]:
    """Writes every picture that the rows have data for.

    Raises:
      ValueError: matplotlib is not installed.
    """
    check_matplotlib()
    written = []

    def save(name: str, figure):
        if figure is not None:
            written.append(folder / name)
            figure.savefig(written[-1], dpi=150, bbox_inches="tight", facecolor="white")

    for temperature in view.temperatures:
        end = f"-t{temperature:g}.png"
        save("tau-by-budget" + end, draw_tau_by_budget(view, temperature))
        save("acceptance-by-depth" + end, acceptance_by_depth(view, temperature))
        save("speedup" + end, speedup(view, temperature))
        save("reliability" + end, reliability(view, temperature))
    return written


def draw_tau_by_budget(view: View, temperature: float):
    """A panel for all prompts and one per set; None without a sweep."""
    lines = view.tau_lines(temperature)
    budgets = sorted({line.label.budget for line in lines})
    if len(budgets) < 2:
        return None
    names = [ALL, *view.sets]
    columns = min(3, len(names))
    figure, panels = _panels(math.ceil(len(names) / columns), columns, (3.6, 2.9), sharey=True)
    styles = _styles(view, (line.label.decoder for line in lines))
    for panel, name in zip(panels, names, strict=False):
        for decoder, style in styles.items():
            own = [
                x
                for x in lines
                if x.label.decoder == decoder and (name == ALL or name in x.sets)
            ]
            own.sort(key=lambda line: line.label.budget)
            x = [line.label.budget for line in own]
            found = [m.estimate(line.of(name).tau) for line in own]
            panel.plot(x, [e.value for e in found], label=decoder, markersize=4, **style)
            panel.fill_between(
                x,
                [e.low for e in found],
                [e.high for e in found],
                alpha=0.1,
                color=style["color"],
                lw=0,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, budgets)
        panel.set_title("all prompts" if name == ALL else name)
    for panel in panels[len(names) :]:
        panel.axis("off")
    for panel in panels[: len(names)][-columns:]:
        panel.set_xlabel("nodes verified per round")
    for panel in panels[::columns]:
        panel.set_ylabel("tokens per round (tau)")
    _legend(figure, panels[0], f"Tau by budget, temperature {temperature:g}")
    return figure


def acceptance_by_depth(view: View, temperature: float):
    """Survival and conditional acceptance, each decoder at its largest budget."""
    largest = {
        line.label.decoder: line for line in largest_budgets(view.tau_lines(temperature))
    }
    if not largest:
        return None
    figure, (left, right) = _panels(1, 2, (4.2, 3.3), sharex=True, sharey=True)
    for decoder, style in _styles(view, largest).items():
        line = largest[decoder]
        survival = line.survival
        depth = np.arange(1, len(survival) + 1)
        label = f"{decoder} (budget {line.label.budget})"
        left.plot(depth, survival, label=label, markersize=4, **style)
        # Rates of a handful of rounds are noise.
        before = np.concatenate([[1], survival[:-1]]) * line.column(Rounds.rounds).sum()
        rates = np.where(before >= 30, m.conditional(survival), np.nan)
        right.plot(depth, rates, markersize=4, **style)
    left.set(title="accepted at least this deep", ylabel="share of rounds", ylim=(0, 1))
    right.set(title="accepted, given all before", ylim=(0, 1))
    for panel in (left, right):
        panel.set_xlabel("depth")
        panel.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, left, f"Acceptance by depth, temperature {temperature:g}")
    return figure


def speedup(view: View, temperature: float):
    """Bars of wall-clock speed over the best plain decoding; None without a clock."""
    lines = view.select("decode", temperature)
    shown = [line for line in lines if not is_plain(line)]
    if not shown:
        return None
    best, names = best_plain(lines), [ALL, *view.sets]
    figure, (panel,) = _panels(1, 1, (1.2 + 1.5 * len(names), 3.4))
    width = 0.8 / len(shown)
    for i, (line, style) in enumerate(
        zip(shown, _styles(view, (x.label.decoder for x in shown)).values(), strict=True)
    ):
        found = [m.estimate(line.of(name).rate / best.of(name).rate) for name in names]
        values = np.array([e.value for e in found])
        whiskers = np.abs(np.array([[e.low, e.high] for e in found]).T - values)
        place = np.arange(len(names)) + (i - (len(shown) - 1) / 2) * width
        panel.bar(
            place,
            values,
            0.92 * width,
            yerr=whiskers,
            color=style["color"],
            edgecolor="white",
            lw=0,
            hatch="" if style["ls"] == "-" else "////",
            label=f"{line.label.decoder} (budget {line.label.budget})",
            error_kw={"lw": 0.9, "ecolor": QUIET},
        )
    panel.axhline(1, color="black", lw=1, ls="--")
    panel.set_xticks(range(len(names)), ["all prompts", *view.sets])
    panel.set_ylabel(f"times {best.label.decoder}")
    panel.grid(False, axis="x")
    _legend(figure, panel, f"Wall-clock speed, temperature {temperature:g}")
    return figure


def reliability(view: View, temperature: float):
    """Share of drafted nodes that were accepted, by the probability their drafter gave."""
    rows = [row for row in view.reliability if row.temperature == temperature]
    if not rows:
        return None
    groups: dict[str, np.ndarray] = {}
    for row in rows:
        groups[row.decoder] = groups.get(row.decoder, 0) + np.asarray(row.bins)
    figure, (panel,) = _panels(1, 1, (4.4, 4.0))
    panel.plot([0, 1], [0, 1], color=QUIET, lw=1, ls="--")
    for decoder, style in _styles(view, groups).items():
        nodes, predicted, accepted = groups[decoder].T
        enough = nodes >= 30
        x = predicted[enough] / nodes[enough]
        label = f"{decoder} (error {m.calibration_error(groups[decoder]):.3f})"
        panel.plot(x, accepted[enough] / nodes[enough], label=label, markersize=4, **style)
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set(xlabel="probability of the path, by the drafter", ylabel="share accepted")
    panel.text(0.97, 0.9, "calibrated", color=QUIET, rotation=45, ha="right", fontsize=8)
    _legend(figure, panel, f"Reliability of tree scores, temperature {temperature:g}")
    return figure


def _panels(rows: int, columns: int, size: tuple[float, float], **shared):
    """A figure and its axes, left to right, top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    panels = list(np.ravel(figure.subplots(rows, columns, **shared)))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e3e7eb", lw=0.7)
        panel.set_axisbelow(True)
    return figure, panels


def _styles(view: View, names: Iterable[str]) -> dict[str, dict]:
    """Colour, marker and dash of each name; a decoder has the same in every picture."""
    known = list(dict.fromkeys(x.label.decoder for x in view.lines if not is_plain(x)))
    return {
        name: {
            "color": COLOURS[known.index(name) % len(COLOURS)],
            "marker": MARKERS[known.index(name) % len(MARKERS)],
            "ls": "-" if known.index(name) < len(COLOURS) else "--",
        }
        for name in dict.fromkeys(names)
    }


def _legend(figure, panel, title: str) -> None:
    handles, labels = panel.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 4 else min(4, math.ceil(len(labels) / 2))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
