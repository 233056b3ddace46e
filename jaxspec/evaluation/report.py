"""The tables of an evaluation, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxspec.evaluation import metrics as m
from jaxspec.evaluation.results import PHASES
from jaxspec.evaluation.view import (
    ALL,
    Line,
    View,
    best_plain,
    is_plain,
    largest_budgets,
    mean_of_sets,
    pairs,
    total,
)

FAITHFUL = 5.0  # nats; JetSpec's bound
SHOWN_DEPTHS = 8
MARKS = "<!-- results -->", "<!-- end of results -->"  # around the summary in a document
TAU_MARKS = "<!-- taus -->", "<!-- end of taus -->"  # around tau by budget
SHOWN_BUDGETS = 5  # the largest


def markdown(view: View, *, against: Sequence[str] = ()) -> str:
    """Every table that the rows have data for.

    Args:
      against: names of decoders that all others are compared with, besides the comparisons of
        trees within each drafter.
    """
    parts = []
    for temperature in view.temperatures:
        at = f"temperature {temperature:g}"
        walked = view.tau_lines(temperature)
        if walked:
            parts += [f"## Tokens per round (tau), {at}", tau_table(view, walked)]
            compared = pairs(walked, against)
            if compared:
                parts += [f"## Ratios of tau, paired by prompt, {at}", pair_table(compared)]
            parts += [f"## Acceptance, {at}", acceptance_table(walked)]
        decoded = view.select("decode", temperature)
        if decoded:
            parts += [f"## Speed, {at}", speed_table(view, decoded)]
    if view.costs:
        parts += ["## Milliseconds of a round, batch 1", cost_table(view)]
    if view.verify:
        parts += ["## Milliseconds of verifying n nodes, batch 1", verify_table(view)]
    if view.branches or view.reliability:
        parts += ["## Drafters' own probabilities", drafter_table(view)]
    parts += [_setup(view)] if view.setups else []
    return "\n\n".join(parts) + "\n"


def summary(view: View) -> str:
    """The headline results by set: speedup over the best plain decoding, and tau.

    Raises:
      ValueError: nothing was decoded with a clock.
    """
    temperature = view.temperatures[0]
    lines = view.select("decode", temperature)
    if not lines:
        raise ValueError("the results have no timed decoding; evaluate without --tau-only")
    best, rows = best_plain(lines), []
    for line in lines:
        cells = []
        for name in view.sets:
            times = (line.of(name).rate / best.of(name).rate)[0]
            cells.append(f"{times:.2f}x ({line.of(name).tau[0]:.2f})")
        overall = f"{m.estimate(line.rate / best.rate):.2f} ({line.tau[0]:.2f})"
        rate = f"{line.rate[0]:.1f}"
        names = line.label.decoder, line.label.dtype, str(line.label.budget)
        rows.append([*names, rate, *cells, overall, line.equal])
    head = ["decoder", "dtype", "nodes", "tokens/s", *view.sets, "all [95%]", "same output"]
    return table(head, rows, left=2)


def tau_by_budget(view: View) -> str:
    """Tau over all prompts at the first temperature: a decoder per line, a column for
    each of the largest budgets."""
    found: dict[str, dict[int, str]] = {}
    for line in view.tau_lines(view.temperatures[0]):
        cells = found.setdefault(line.label.decoder, {})
        cells[line.label.budget] = f"{m.estimate(line.tau):.2f}"
    budgets = sorted({b for cells in found.values() for b in cells})[-SHOWN_BUDGETS:]
    rows = [[name, *(cells.get(b, "") for b in budgets)] for name, cells in found.items()]
    return table(["nodes", *map(str, budgets)], rows, left=1)


def into(text: str, tables: str, marks: tuple[str, str] = MARKS) -> str:
    """A Markdown text with `tables` between its marks.

    Raises:
      ValueError: it does not have both marks, once each.
    """
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin!r} and, after it, one line {end!r}")
    return text[: text.index(begin) + len(begin)] + f"\n{tables}\n" + text[text.index(end) :]


def tau_table(view: View, lines: Sequence[Line]) -> str:
    """Pooled over rounds, bonus counted; 95% intervals over prompts."""
    rows = []
    for line in lines:
        cells = [
            f"{m.estimate(line.of(name).tau):.2f}" if name in line.sets else ""
            for name in view.sets
        ]
        overall = f"{m.estimate(line.tau):.2f}"
        rows.append([*_names(line), *cells, overall, f"{mean_of_sets(line):.2f}"])
    head = ["decoder", "tree", "budget", *(f"{name} [95%]" for name in view.sets)]
    head += ["all [95%]", "mean of sets"]
    return table(head, rows, left=2)


def pair_table(compared: Sequence[tuple[Line, Line]]) -> str:
    """Tau of a line over tau of another on the same prompts."""
    rows = []
    for line, other in compared:
        cells = [f"{m.estimate(line.of(s).tau / other.of(s).tau):.2f}" for s in line.sets]
        overall = f"{m.estimate(line.tau / other.tau):.2f}"
        rows.append([*_names(line), other.label.decoder, *cells, overall])
    head = ["decoder", "tree", "budget", "over", *compared[0][0].sets, ALL]
    return table(head, rows, left=2)


def acceptance_table(lines: Sequence[Line]) -> str:
    """Survival and conditional acceptance by depth: every budget over all prompts, and each
    decoder's largest by set."""
    largest, rows = largest_budgets(lines), []
    for line in lines:
        names = [ALL, *line.sets] if line in largest else [ALL]
        for name in names:
            own = line.of(name)
            survival = own.survival[:SHOWN_DEPTHS]
            rates = m.conditional(survival)
            cells = [
                "" if np.isnan(rate) else f"{alive:.2f} ({rate:.2f})"
                for alive, rate in zip(survival, rates, strict=True)
            ]
            cells += [""] * (SHOWN_DEPTHS - len(cells))
            alpha = f"{own.alpha:.2f}" if own.nodes > 1 else ""
            numbers = [f"{own.nodes:.1f}", f"{own.verify_rate:.2f}", alpha]
            rows.append([*_names(line), name, *numbers, *cells])
    depths = [f"depth {depth}" for depth in range(1, SHOWN_DEPTHS + 1)]
    head = ["decoder", "tree", "budget", "set", "nodes", "verify rate", "alpha", *depths]
    return table(head, rows, left=2) + (
        "\n\nnodes: verified per round; verify rate: tokens committed per node; alpha: the "
        "acceptance rate of a chain of as many drafted tokens with the same tau; depth k: "
        "share of rounds that accept at least k drafted tokens, and in brackets among those "
        "that accept k - 1."
    )


def speed_table(view: View, lines: Sequence[Line]) -> str:
    """Tokens per second, and speedup over the run's best plain decoding, by set and overall."""
    best, rows = best_plain(lines), []
    for line in lines:
        for name in (ALL, *line.sets):
            own, plain = line.of(name), best.of(name)
            theory = None if is_plain(line) else view.theoretical(own)
            rows.append(
                [
                    *_names(line),
                    name,
                    f"{own.rate[0]:.1f}",
                    f"{m.estimate(own.rate / plain.rate):.2f}",
                    "" if theory is None else f"{theory:.2f}",
                    f"{own.tau[0]:.2f}",
                    own.equal,
                ]
            )
    head = ["decoder", "tree", "budget", "set", "tokens/s", "speedup [95%]", "theory", "tau"]
    return table([*head, "same output"], rows, left=2) + (
        f"\n\nspeedup: prompt included, over *{best.label.decoder}*, the fastest plain "
        "decoding of the run; same output: answers equal, token for token, to plain decoding's "
        "in the same dtype; theory: (1 - α^(γ+1)) / ((1 - α)(γc + 1)), which takes verifying "
        "to cost one plain round."
    )


def cost_table(view: View) -> str:
    rows = []
    for cost in view.costs:
        cells = [cost.phases[phase] for phase in PHASES]
        shown = ["" if ms is None else f"{ms:.1f}" for ms in cells]
        rows.append([cost.decoder, cost.dtype, str(cost.budget), *shown, f"{total(cost):.1f}"])
    return table(["decoder", "dtype", "budget", *PHASES, "round"], rows, left=2)


def verify_table(view: View) -> str:
    sizes = list(view.verify[0].ms)
    rows = []
    for verify in view.verify:
        first = verify.ms[sizes[0]]
        rows.append(
            [verify.dtype, *(f"{verify.ms[n]:.1f} ({verify.ms[n] / first:.2f})" for n in sizes)]
        )
    return table(["dtype", *sizes], rows, left=1)


def drafter_table(view: View) -> str:
    """Calibration of tree scores, and faithfulness of the likeliest branches."""
    rows = []
    groups: dict[tuple, np.ndarray] = {}
    for row in view.reliability:
        key = row.decoder, f"{row.temperature:g}", str(row.budget)
        groups[key] = groups.get(key, 0) + np.asarray(row.bins)
    for key, bins in groups.items():
        rows.append([*key, ALL, f"{m.calibration_error(bins):.3f}", "", ""])
    gaps: dict[tuple, list[float]] = {}
    for row in view.branches:
        for name in (ALL, row.set):
            key = row.drafter, f"{row.temperature:g}", "", name
            gaps.setdefault(key, []).extend(row.gaps)
    for key, found in gaps.items():
        share, middle = np.mean(np.array(found) < FAITHFUL), np.median(found)
        rows.append([*key, "", f"{share:.2f} of {len(found)}", f"{middle:.1f}"])
    head = ["decoder or drafter", "temperature", "budget", "set"]
    head += ["calibration error", "faithful branches", "median gap"]
    return table(head, rows, left=1) + (
        "\n\ncalibration error: mean |predicted - accepted| of a tree's nodes in ten bins of "
        "their path's probability; faithful: the drafter's log-probability of its likeliest "
        f"full-depth branch exceeds the target's by less than {FAITHFUL:g} nats."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _names(line: Line) -> list[str]:
    return [line.label.decoder, line.label.tree or "", str(line.label.budget)]


def _setup(view: View) -> str:
    lines = [", ".join(f"{k}: {v}" for k, v in fields.items()) for fields in view.setups]
    return "\n\n".join(f"*{line}*" for line in lines)
