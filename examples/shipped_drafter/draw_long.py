"""Draws what long prompts do to a drafter, from what `long.py` measured: two tables, a picture.

python draw_long.py --into ../../docs/report.md --output ../../docs/evaluation
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import limits  # the scripts beside this one
import long
import tyro
from draw_limits import write

from jaxspec.cli import exits
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation import results
from jaxspec.evaluation.plots import COLOURS, QUIET
from jaxspec.evaluation.report import table
from jaxspec.evaluation.speed import plain_forms
from jaxspec.evaluation.view import Line, View

NODES = 16  # of the trees that the table of tau shows
TAU_MARKS = "<!-- long -->", "<!-- end of long -->"
SPEED_MARKS = "<!-- long speed -->", "<!-- end of long speed -->"


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draw the tables and the picture from what was measured."""

    results: tyro.conf.Positional[Path] = long.RESULTS
    drafter: str = "shipped"
    into: Path | None = None
    """Markdown file that gets the tables between its marks; printed if left out."""
    output: Path | None = None
    """Folder for long.png."""

    def run(self) -> None:
        rows = results.read_rows(self.results, limits.KINDS)
        view = View(rows)
        tables = {TAU_MARKS: tau_table(rows, view, self.drafter)}
        if view.select("decode", 0.0):
            tables[SPEED_MARKS] = speed_table(view, self.drafter)
        write(tables, self.into)
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            figure = picture(view, self.drafter)
            figure.savefig(self.output / "long.png", dpi=150, facecolor="white")


def lines(view: View, how: str, temperature: float) -> dict[long.Key, Line]:
    """By decoder and budget."""
    found = view.select(how, temperature)
    return {(line.label.decoder, line.label.budget): line for line in found}


def shown(drafter: str) -> dict[str, str]:
    """Decoders by what tables and pictures call them."""
    return {
        "lookup": limits.LOOKUP,
        "drafter": f"{drafter}, drafter",
        "both": f"{drafter}, both",
    }


def tau_table(rows: list[limits.Row], view: View, drafter: str) -> str:
    """Tau with 16 nodes by task and length, and how much of the answers was copied."""
    cells = []
    copied = {(x.set, x.temperature): x for x in rows if isinstance(x, limits.Copies)}
    for temperature in view.temperatures:
        found = lines(view, "walk", temperature)
        for name in sorted(found[limits.LOOKUP, NODES].sets, key=_order):
            own = copied[name, temperature]
            shares = [sum(x) / sum(own.tokens) for x in (own.from_prompt, own.from_answer)]
            taus = [
                f"{m.estimate(found[decoder, NODES].of(name).tau):.2f}"
                for decoder in shown(drafter).values()
            ]
            best = found[f"{drafter}, oracle", 16].of(name)
            shares = [f"{100 * share:.0f}%" for share in shares]
            task, length = name.split()
            labels = [f"{temperature:g}", task, f"{int(length):,}"]
            cells.append([*labels, *taus, f"{m.estimate(best.tau):.2f}", *shares])
    heads = ["temperature", "task", "prompt", *shown(drafter), "drafter, best of 16"]
    return table([*heads, "copied of the prompt", "of the answer"], cells, left=2)


def _order(name: str) -> tuple[str, int]:
    task, length = name.split()
    return task, int(length)


def speed_table(view: View, drafter: str) -> str:
    """What rounds cost, and the speed over plain decoding that follows with walked taus."""
    clocked, walked, cells = lines(view, "decode", 0.0), lines(view, "walk", 0.0), []
    keys = [(name, nodes) for nodes in long.BUDGETS for name in shown(drafter).values()]
    forms = [(form, 1) for form in plain_forms()]
    sets = next(iter(clocked.values())).sets
    for length in dict.fromkeys(name.split()[1] for name in sets):

        def of_length(key, length=length) -> Line:
            parts = clocked[key].parts
            return Line(tuple(part for part in parts if part.set.split()[1] == length))

        ms = {key: round_ms(of_length(key)) for key in (*forms, *keys)}
        plain = min(ms[form] for form in forms)
        prompt = of_length(forms[0]).column(lambda part: part.prompt_seconds).mean()
        for task in long.TASKS:
            taus = {key: walked[key].of(f"{task} {length}").tau[0] for key in keys}
            speeds = [f"{taus[key] * plain / ms[key]:.2f}x ({ms[key]:.0f})" for key in keys]
            labels = [task, f"{int(length):,}", f"{prompt:.1f}", f"{plain:.0f}"]
            cells.append([*labels, *speeds])
    cells.sort(key=lambda row: long.TASKS.index(row[0]))
    heads = [f"{name}, {nodes}" for nodes in long.BUDGETS for name in shown(drafter)]
    return table(["task", "prompt", "its seconds", "plain, ms", *heads], cells, left=1)


def round_ms(line: Line) -> float:
    """Milliseconds of a round after the prompt."""
    seconds = line.column(lambda part: part.seconds).sum()
    return 1e3 * seconds / line.column(results.Rounds.rounds).sum()


def picture(view: View, drafter: str):
    """Tau by length: a row for each temperature, a panel for each task."""
    from matplotlib.figure import Figure

    temperatures = view.temperatures
    figure = Figure(figsize=(8.5, 0.6 + 2.7 * len(temperatures)), layout="constrained")
    grid = figure.subplots(len(temperatures), len(long.TASKS), sharey="row", squeeze=False)
    for panels, temperature in zip(grid, temperatures, strict=True):
        found = lines(view, "walk", temperature)
        for task, panel in zip(long.TASKS, panels, strict=True):
            _draw(panel, found, task, drafter)
            title = f"{task}, temperature {temperature:g}"
            panel.set_title(title, loc="left", fontsize=10, color=QUIET)
        panels[0].set_ylabel("tokens per round (tau)")
    for panel in grid[-1]:
        panel.set_xlabel("tokens of the prompt")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    place = dict(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.legend(handles, labels, **place)
    return figure


def _draw(panel, found: dict[long.Key, Line], task: str, drafter: str) -> None:
    sets = sorted(found[limits.LOOKUP, NODES].sets, key=_order)
    lengths = [length for own, length in map(_order, sets) if own == task]
    for (label, decoder), colour in zip(shown(drafter).items(), COLOURS, strict=False):
        for nodes in long.BUDGETS:
            line = found[decoder, nodes]
            taus = [m.estimate(line.of(f"{task} {length}").tau) for length in lengths]
            look = dict(color=colour, label=f"{label}, {nodes} nodes", marker="o", ms=4)
            style = "-" if nodes == NODES else ":"
            panel.plot(lengths, [x.value for x in taus], style, **look)
            if nodes == NODES:
                low, high = [x.low for x in taus], [x.high for x in taus]
                panel.fill_between(lengths, low, high, color=colour, alpha=0.12, lw=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(long.LENGTHS), [f"{length:,}" for length in long.LENGTHS])
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e3e7eb", lw=0.7)


if __name__ == "__main__":
    exits.script(Draw.run, Draw, __doc__)
