"""Writes measured rows as tables and pictures into docs/h100.md.

    python examples/gpu/report.py --rows out/gpu

Tables replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; a table
without rows leaves its place as it is. Of rows measured twice the later one counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNSETTLED = ("commit", "at")  # not settings: a later row replaces one with equal settings
SETTINGS = {
    "check": ("check", "target", "drafter", "tree", "case"),
    "steps": ("model", "dtype", "batch", "length", "case"),
    "replay": (
        "model",
        "dtype",
        "batch",
        "length",
        "new_tokens",
        "draft",
        "nodes",
        "asked_tau",
    ),
    "small": ("model", "dtype", "prompts", "new_tokens", "tree", "nodes"),
    "tune": ("kernel", "batch", "nodes", "heads", "kv_heads", "head_dim", "capacity", "dtype"),
    "products": ("model", "product", "nodes", "tile"),
    "peer": ("model", "length", "torch", "transformers", "way", "nodes"),
}


def read(folder: Path, card: str | None) -> tuple[str, dict[str, list[dict]], list[dict]]:
    """The card, its rows by script (each settings' last), and the headers of all runs.

    Args:
      card: by default the GPU that a script ran on last.

    Raises:
      SystemExit: there are no rows, or none of this card.
    """
    found = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    cards = list(dict.fromkeys(row["card"] for row in found))
    starts = [row for row in found if row.get("header") and not row["card"].endswith(" CPU")]
    if card is None and starts:
        card = max(starts, key=lambda row: row["date"])["card"]
    if card not in cards:
        sys.exit(
            f"{folder} has no rows of {card or 'a GPU'}; it has those of {cards}, which "
            "--card takes"
        )
    rows: dict[str, dict] = {script: {} for script in SETTINGS}
    headers = []
    for row in found:
        if row["card"] != card:
            continue
        script = row["script"]
        if row.get("header"):
            headers.append(row)
        elif not {"error", "skipped"} & row.keys():
            rows[script][tuple(str(row.get(name)) for name in SETTINGS[script])] = row
    return card, {script: list(kept.values()) for script, kept in rows.items()}, headers


def table(columns: list[str], lines: Iterable[Iterable]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    body = [["" if cell is None else str(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *body))


def setup(card: str, headers: list[dict]) -> str:
    """How the scripts were run."""
    return table(
        [f"script, on one {card}", "driver", "JAX", "commit", "date", "command"],
        (
            [
                header["script"],
                header["driver"],
                header["jax"],
                header["commit"],
                header["date"][:10],
                f"`{header['command']}`",
            ]
            for header in headers
        ),
    )


def steps(rows: list[dict], wanted: Callable[[str], bool]) -> str:
    """Milliseconds and, in brackets, the share of the floor; a line per batch and length."""
    rows = [row for row in rows if wanted(row["case"])]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    places = dict.fromkeys((row["model"], row["batch"], row["length"]) for row in rows)
    cells = {(row["model"], row["batch"], row["length"], row["case"]): row for row in rows}

    def cell(place, case):
        row = cells.get((*place, case))
        return row and f"{row['ms']:.2f} ({row['share']:.0%})"

    return table(
        ["model, batch, tokens behind", *cases],
        (
            [f"{model}, {batch}, {length:,}", *(cell((model, batch, length), c) for c in cases)]
            for model, batch, length in places
        ),
    )


def is_round(case: str) -> bool:
    return not is_part(case)


def is_part(case: str) -> bool:
    return case.startswith(("prefill", "draft-")) or case == "pass"


def replay(rows: list[dict]) -> str:
    return table(
        [
            "replay: model, nodes, drafting",
            "tau",
            "ms per round",
            "tokens/s",
            "with the prompt",
            "speedup",
            "equals plain",
        ],
        (
            [
                f"{row['model']}, {row['nodes']}, {row['draft']}",
                row["tau"],
                f"{row['ms']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['with_prompt']:.0f}",
                row.get("speedup"),
                {True: "yes", False: "no"}.get(row.get("equal")),
            ]
            for row in rows
        ),
    )


def small(rows: list[dict]) -> str:
    return table(
        ["model, tree", "nodes", "tau", "ms per round", "tokens/s", "speedup", "equals plain"],
        (
            [
                f"{row['model']} {row['dtype']}, {row['tree']}",
                row["nodes"],
                row["tau"],
                f"{row['ms']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                row.get("speedup"),
                row.get("equal"),
            ]
            for row in rows
        ),
    )


def tune(rows: list[dict]) -> str:
    return table(
        ["batch, nodes, context", "ms", "ms as chosen then", "GB/s of cache", "tile"],
        (
            [
                f"{row['batch']}, {row['nodes']}, {row['capacity']:,}",
                row["ms"],
                row["chosen_ms"],
                row["cache_gb_s"],
                ", ".join(f"{value} {name}" for name, value in row["tile"].items()),
            ]
            for row in rows
        ),
    )


def products(rows: list[dict]) -> str:
    """XLA's time of each product beside the kernel's with its fastest tile."""
    best: dict[tuple, dict] = {}
    for row in rows:
        both = best.setdefault((row["model"], row["product"], row["nodes"]), {})
        kind = "kernel" if row["tile"] else "xla"
        if kind not in both or row["us"] < both[kind]["us"]:
            both[kind] = row

    def line(key, both):
        model, product, nodes = key
        xla, kernel = both.get("xla", {}), both.get("kernel", {})
        tile = "{columns} columns, {depth} inputs a step, {steps} in flight, splits: {splits}"
        described = tile.format(**kernel["tile"]) if kernel else None
        return [f"{model}, {product}, {nodes}", xla.get("us"), kernel.get("us"), described]

    columns = ["model, weight, nodes", "us, XLA", "us, kernel", "its tile"]
    return table(columns, (line(*pair) for pair in best.items()))


def peer(rows: list[dict]) -> str:
    return table(
        ["transformers", "nodes", "ms per round"],
        (
            [f"{row['model']}, {row['way']}, torch {row['torch']}", row["nodes"], row["ms"]]
            for row in rows
        ),
    )


def check(rows: list[dict]) -> str:
    """One line per kind of check, with the number that passed; failures have no row."""
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["check"], []).append(row)
    said = {
        "kernels": lambda rows: (
            f"{sum(row['passed'] for row in rows)} cases of `pytest -m gpu`"
        ),
        "ties": lambda rows: "lowest index first",
        "lossless": lambda rows: (
            f"{len(rows)} drafters and trees, {sum(row['tokens'] for row in rows):,} tokens"
        ),
        "golden": lambda rows: (
            f"{len(rows)} cases, {sum(row['prompts'] for row in rows)} prompts"
        ),
    }
    return table(
        ["check", "passed"], ([kind, said[kind](kept)] for kind, kept in kinds.items())
    )


def pictures(rows: dict[str, list[dict]], folder: Path) -> list[Path]:
    """Milliseconds per round against nodes, and tokens per second against tau."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    timed = rows["steps"]
    if timed:
        first = tuple(timed[0][name] for name in ("model", "batch", "length"))
        here = [r for r in timed if (r["model"], r["batch"], r["length"]) == first]
        lines: dict[str, list[tuple]] = {}
        for row in here:
            kind, nodes = re.fullmatch(r"(.*?)(\d*)", row["case"]).groups()
            if is_part(row["case"]):
                continue
            kind = "verify" if kind == "plain" else kind
            lines.setdefault(kind, []).append((int(nodes or 1), row["ms"], row["floor_ms"]))
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for kind, points in lines.items():
            nodes, ms, floor = zip(*sorted(points), strict=True)
            axes.plot(nodes, ms, "o-", label=kind)
            if kind == "verify":
                axes.plot(nodes, floor, "k--", label="floor of verify")
        axes.set(xscale="log", xlabel="nodes", ylabel="ms per round", ylim=(0, None))
        axes.set_title("{}, batch {}, {:,} tokens behind".format(*first))
        axes.legend()
        made.append(_save(figure, folder / "rounds.png"))
    replays = [row for row in rows["replay"] if row["nodes"] > 1]
    if replays:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for nodes in dict.fromkeys(row["nodes"] for row in replays):
            points = [
                (r["tau"], r["tokens_per_second"]) for r in replays if r["nodes"] == nodes
            ]
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=f"{nodes} nodes")
        for row in rows["replay"]:
            if row["nodes"] == 1:
                axes.axhline(row["tokens_per_second"], color="k", ls="--", label="plain")
        axes.set(xlabel="tau, given", ylabel="tokens per second, replayed", ylim=(0, None))
        axes.legend()
        made.append(_save(figure, folder / "replay.png"))
    pyplot.close("all")
    return made


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def put(text: str, tables: dict[str, str]) -> str:
    """The text with each table between its markers, where it has them."""
    for name, made in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, b=begin, m=made, e=end: f"{b}\n{m}\n{e}", text)
    return text


def tables_of(card: str, rows: dict[str, list[dict]], headers: list[dict]) -> dict[str, str]:
    """By marker; those without rows are left out."""
    made = {"setup": setup(card, headers)}
    if rows["steps"]:
        made |= dict(rounds=steps(rows["steps"], is_round), parts=steps(rows["steps"], is_part))
    for name, of in (
        ("check", check),
        ("replay", replay),
        ("small", small),
        ("tune", tune),
        ("products", products),
        ("peer", peer),
    ):
        if rows[name]:
            made[name] = of(rows[name])
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, default=Path("out/gpu"), help="folder of rows")
    parser.add_argument("--card", help="by default the GPU that a script ran on last")
    files = [ROOT / "docs" / "h100.md"]
    parser.add_argument("--into", type=Path, nargs="*", default=files)
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "h100")
    options = parser.parse_args(arguments)
    card, rows, headers = read(options.rows, options.card)
    tables = tables_of(card, rows, headers)
    for path in options.into:
        path.write_text(put(path.read_text(), tables))
    made = [*options.into, *pictures(rows, options.pictures)]
    print("wrote", *made, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
