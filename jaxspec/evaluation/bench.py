"""Compares drafters of one target, to choose one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxspec.decoding.sampling import Sampling
from jaxspec.evaluation import measure
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation.contenders import Contender, Entry, load_entries
from jaxspec.evaluation.report import table
from jaxspec.evaluation.results import PHASES, PLAIN, Row
from jaxspec.evaluation.view import ALL, Line, View, best_plain, is_plain, total


def bench_entries(
    target: str, drafters: Sequence[str], budgets: Sequence[int], *, dtype: str
) -> list[Entry]:
    """Every drafter with every budget.

    Args:
      drafters: each DRAFTER with options of `Contender.parse`, not budget, dtype.
      budgets: nodes verified per round, root included.

    Raises:
      ValueError: a drafter cannot be loaded, does not fit, or is given twice.
    """
    contenders = []
    for text in drafters:
        if "budget=" in text or "dtype=" in text:
            raise ValueError(
                f"drafter {text!r} sets budget or dtype, which all drafters share; use "
                "--budgets and --dtype"
            )
        one = Contender.parse(f"drafter={text}", dtype=dtype)
        for budget in budgets:
            name = f"{text}, {budget} nodes"
            contenders.append(dataclasses.replace(one, name=name, budget=budget))
    return load_entries(target, contenders)


def bench(
    entries: Sequence[Entry],
    sets: measure.Sets,
    *,
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 128,
) -> Iterator[Row]:
    """Decodes every prompt with every drafter and plainly, in turn, and times the phases."""
    yield from measure.speed(entries, sets, sampling=sampling, max_new_tokens=max_new_tokens)
    # The cost of verifying other numbers of nodes is not needed.
    forwards = {("verify", entry.contender.dtype) for entry in entries}
    yield from measure.costs(entries, sampling=sampling, done=forwards)


def bench_rows(view: View) -> list[dict[str, Any]]:
    """A row per drafter and budget, after a row of the fastest plain decoding.

    Each has the drafter, its tree and nodes; `tau` by set and over all prompts (null if every
    answer ended at its first token, without a round); milliseconds of each phase of a round at
    batch 1 (null if a drafter lacks the phase or it cannot be separated); `tokens_per_second`;
    `speedup` over the plain row with its 95 % interval over prompts; and the number of answers
    equal to plain decoding's.
    """
    (temperature,) = view.temperatures
    lines = view.select("decode", temperature)
    best, rows = best_plain(lines), []
    for line in [best, *(line for line in lines if not is_plain(line))]:
        cost = view.cost(line)
        if line is best:
            cost = next(c for c in view.costs if c.decoder == PLAIN)
        speedup = m.estimate(line.rate / best.rate)
        rows.append(
            {
                "drafter": line.label.drafter,
                "tree": line.label.tree,
                "nodes": line.label.budget,
                "tau": {name: _tau(line.of(name)) for name in (*view.sets, ALL)},
                "ms": {phase: cost.phases[phase] for phase in PHASES} | {"round": total(cost)},
                "tokens_per_second": float(line.rate[0]),
                "speedup": speedup.value,
                "speedup_95": [speedup.low, speedup.high],
                "same_output": line.equal,
            }
        )
    return rows


def _tau(line: Line) -> float | None:
    return None if np.isnan(line.tau[0]) else float(line.tau[0])


def bench_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `bench_rows` as Markdown."""
    cells = []
    for row in rows:
        speedup = m.Estimate(row["speedup"], *row["speedup_95"])
        cells.append(
            [
                row["drafter"],
                row["tree"] or "",
                str(row["nodes"]),
                *("" if tau is None else f"{tau:.2f}" for tau in row["tau"].values()),
                *("" if ms is None else f"{ms:.1f}" for ms in row["ms"].values()),
                f"{row['tokens_per_second']:.1f}",
                f"{speedup:.2f}",
                row["same_output"],
            ]
        )
    head = ["drafter", "tree", "nodes", *(f"tau, {name}" for name in rows[0]["tau"])]
    head += [*(f"ms, {phase}" for phase in rows[0]["ms"])]
    return table([*head, "tokens/s", "speedup [95%]", "same output"], cells, left=2) + (
        "\n\ntau: tokens committed per round; ms: medians at batch 1; speedup: prompt "
        "included, over the first row, the fastest plain decoding of the run."
    )
