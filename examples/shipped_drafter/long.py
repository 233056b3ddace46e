"""What long prompts, to 7,000 tokens, do to a drafter and to lookup: tau, and ms of a round.

    python examples/shipped_drafter/long.py walk   # tau; nothing is timed
    python examples/shipped_drafter/long.py clock  # needs a quiet machine
    python examples/shipped_drafter/long.py draw --into docs/report.md --output docs/evaluation

All but `draw` resume after an interruption. A prompt is a numbered list of public texts and a
task about one of them. The texts: paragraphs of this repository's pages as of `COMMIT`, GSM8K's
questions, HumanEval's functions (evaluation prompts, which no drafter was trained on). The
tasks: `ask`, to explain, solve or complete the text in the middle; `copy`, to write it and the
next one again. A prompt holds as many whole texts as fit into 512 … 7,000 tokens. There are two
of each kind of text, which begin at different ones; one from 4,096 tokens on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draw_limits
import jax
import jax.numpy as jnp
import limits  # the scripts beside this one
import numpy as np
import tyro
from tqdm import tqdm

from jaxspec.data.prompts import spread
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import check_capacity, decoder_for, pack, request_keys, unpack
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.state import DecodeState
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import Together
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation import results
from jaxspec.evaluation.contenders import Entry, load_entries
from jaxspec.evaluation.plots import COLOURS, QUIET
from jaxspec.evaluation.report import table
from jaxspec.evaluation.speed import plain_forms
from jaxspec.evaluation.view import Line, View
from jaxspec.models.target import Target
from jaxspec.prompts import as_token_ids
from jaxspec.results import Completion

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("long.jsonl")
COMMIT = "7f45fac3cb18520a0086831c735119986e2a5fc6"
LENGTHS = {512: 2, 1024: 2, 2048: 2, 4096: 1, 7000: 1}  # and prompts of each kind of text
TASKS = ("ask", "copy")
BUDGETS = (8, 16)
NODES = 16  # of the trees that the table of tau shows
TAU_MARKS = "<!-- long -->", "<!-- end of long -->"
SPEED_MARKS = "<!-- long speed -->", "<!-- end of long speed -->"
ASKED = {
    "Paragraph": "Explain in your own words what {0} says.",
    "Problem": "Solve {0}. Please reason step by step.",
    "Function": "Complete {0} and explain how it works.",
}


def texts(folder: Path) -> dict[str, list[str]]:
    """The texts by what they are called."""
    names = _git("ls-tree", "-r", "--name-only", COMMIT).splitlines()
    pages = [_git("show", f"{COMMIT}:{name}") for name in names if name.endswith(".md")]
    blocks = [
        " ".join(block.split())
        for page in pages
        for block in re.sub(r"```.*?```", "", page, flags=re.S).split("\n\n")
    ]
    functions = [
        re.search(r"```python\n(.*?)```", text, re.S) for text in _turns(folder, "humaneval")
    ]
    return {
        "Paragraph": [x for x in blocks if 120 <= len(x) <= 700 and x[0] not in "|-#<!>*`["],
        "Problem": [text.partition("\nPlease reason")[0] for text in _turns(folder, "gsm8k")],
        "Function": [found[1].strip() for found in functions if found],
    }


def prompt(kind: str, found: list[str], start: int, task: str, length: int, count) -> str:
    """The longest prompt of at most `length` tokens.

    Args:
      found: texts of one kind.
      start: the first one to take.
      count: tokens of a text.
    """
    parts: list[str] = []
    for number in range(1, len(found) + 1):
        text = found[(start + number - 1) % len(found)]
        more = [*parts, f"{kind} {number}:\n{text}"]
        if count(_asked(kind, more, task)) > length:
            break
        parts = more
    return _asked(kind, parts, task)


def _asked(kind: str, parts: list[str], task: str) -> str:
    middle = max(1, len(parts) // 2)
    name = f"{kind} {middle}"
    asked = f"Write {name} and {kind} {middle + 1} again, word for word."
    if task == "ask":
        asked = ASKED[kind].format(name)
    return "\n\n".join([*parts, asked])


def _git(*command: str) -> str:
    return subprocess.run(
        ["git", "-C", ROOT, *command], check=True, capture_output=True, text=True
    ).stdout


def _turns(folder: Path, name: str) -> list[str]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["turns"][0] for line in lines]


@dataclasses.dataclass(frozen=True)
class Walk:
    """Tau along the target's own answers, greedy and sampled."""

    drafters: tuple[str, ...] = ("shipped",)
    """Trained drafters, NAME=FOLDER or a name as for `generate`, without +ngram."""
    prompts: Path = ROOT.parent / "shared" / "prompts"
    """Folder of the evaluation's prompts."""
    output: Path = RESULTS
    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)
    only: tuple[str, ...] = ()
    """Sets to measure, "ask 512" for example; all by default."""
    target: str = "smollm2-135m"
    dtype: str = "bfloat16"

    def run(self) -> None:
        entries = load_entries(self.target, limits.contenders(self.drafters, self.dtype))
        asked, sets = self.sets(entries[0].target)
        setup = limits.setup_of(entries[0], asked, self.max_new_tokens)
        if unknown := [name for name in self.only if name not in sets]:
            raise ValueError(f"--only has {unknown[0]!r}; expected some of {', '.join(sets)}")
        chosen = {name: sets[name] for name in self.only or sets}
        limits.keep(self.output, setup, lambda done: self.rows(entries, chosen, done))

    def rows(self, entries: list[Entry], sets, done: results.Done) -> Iterator[results.Row]:
        for temperature in self.temperatures:
            length = self.max_new_tokens
            yield from limits.walked(entries, sets, temperature, length, done, BUDGETS)

    def sets(self, target: Target):
        """Prompts by the name of their set, as texts and as token ids."""
        found = texts(self.prompts)
        encode = functools.partial(as_token_ids, target, raw=False, thinking=None)
        asked = {
            f"{task} {length}": [
                prompt(kind, own, start, task, length, lambda text: len(encode([text])[0]))
                for kind, own in found.items()
                for start in (0, len(own) // 2)[:windows]
            ]
            for length, windows in LENGTHS.items()
            for task in TASKS
        }
        return asked, {name: encode(rows) for name, rows in asked.items()}


@dataclasses.dataclass(frozen=True)
class Clock(Walk):
    """What a round costs after the prompt, greedy: decoders take turns from one state.

    In bfloat16 their answers part at near-ties, so their own taus are of different texts.
    """

    timed: int = 2
    """Prompts per set, evenly apart."""

    def rows(self, entries: list[Entry], sets, done: results.Done) -> Iterator[results.Row]:
        rivals = {(name, 1): form for name, form in plain_forms().items()}
        for entry in entries:
            for nodes in BUDGETS:
                forms = limits.forms(entry, nodes)
                rivals |= {(name, nodes): form for name, form in forms.items()}
        for name, prompts in sets.items():
            if all(("rounds", "decode", name, 0.0, *key) in done for key in rivals):
                continue
            rows = spread(prompts, self.timed)
            answers, prompt_seconds = race(entries, rivals, rows, self.max_new_tokens)
            plain = next(iter(answers.values()))
            for (decoder, nodes), own in answers.items():
                yield results.Rounds(
                    set=name,
                    temperature=0.0,
                    decoder=decoder,
                    drafter=decoder.partition(",")[0],
                    tree=None,
                    head="own",
                    dtype=self.dtype,
                    budget=nodes,
                    how="decode",
                    tokens=[len(x.token_ids) - 1 for x in own],  # one comes with the prompt
                    seconds=[x.seconds for x in own],
                    equal=[x.token_ids == y.token_ids for x, y in zip(own, plain, strict=True)],
                    prompt_seconds=prompt_seconds,
                    **results.counts([x.stats for x in own]),
                )


Key = tuple[str, int]  # a decoder's name and its nodes


def race(
    entries: list[Entry],
    rivals: dict[Key, LoadedDrafter],
    rows: list[list[int]],
    new_tokens: int,
) -> tuple[dict[Key, list[Completion]], list[float]]:
    """Answers of all rivals, their seconds without the prompt, and the seconds of the prompts.

    A prompt runs once, observed by all drafters; every rival goes on from a copy of the state.
    """
    target, shuffle = entries[0].target, random.Random(0).shuffle
    widest = [limits.forms(entry, BUDGETS[-1])[f"{_name(entry)}, both"] for entry in entries]
    drafters = Together(tuple(x.drafter for x in widest))
    all_of_them = LoadedDrafter(drafters, tuple(x.params for x in widest))
    decoder, params = decoder_for(target, all_of_them)
    capacity = check_capacity(decoder, rows, new_tokens, None)

    def prefilled(row):
        requests = pack(
            decoder,
            [row],
            batch=1,
            capacity=capacity,
            max_new_tokens=new_tokens,
            budget=1,
            sampling=[Sampling()],
            keys=request_keys(0, 1),
        )
        return jax.block_until_ready(prefill(decoder, params, requests)), requests.sampling

    def timed(key, state, sampling, rounds):
        own = decoder_for(target, rivals[key])
        state = _state_of(key, state, entries)
        began = time.perf_counter()
        state = jax.block_until_ready(decode(*own, state, sampling, np.int32(rounds)))
        return state, time.perf_counter() - began

    state, sampling = prefilled(rows[0][:1])  # compiles
    for key in rivals:
        timed(key, state, sampling, 1)
    answers, prompt_seconds = {key: [] for key in rivals}, []
    for row in tqdm(rows):
        began = time.perf_counter()
        state, sampling = prefilled(row)
        prompt_seconds.append(time.perf_counter() - began)
        order = list(rivals)
        shuffle(order)
        for key in order:
            done, seconds = timed(key, state, sampling, new_tokens)
            ((ids, stats),) = unpack(done, [len(row)])
            answers[key].append(Completion(ids, None, stats, seconds, "length"))
    return answers, prompt_seconds


def _state_of(key: Key, state: DecodeState, entries: list[Entry]) -> DecodeState:
    """A copy of the state after a prompt, for one rival."""
    name, nodes = key
    states: dict[str, Any] = {form: () for form in plain_forms()}
    for entry, (own, seen) in zip(entries, state.drafter, strict=True):
        states |= {
            limits.LOOKUP: seen,
            f"{_name(entry)}, drafter": own,
            f"{_name(entry)}, both": (own, seen),
        }
    budget = jnp.full_like(state.budget, nodes)
    own = dataclasses.replace(state, drafter=states[name], budget=budget)
    return jax.block_until_ready(jax.tree.map(jnp.copy, own))


def _name(entry: Entry) -> str:
    return entry.contender.name


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draw the tables and the picture from what was measured."""

    results: tyro.conf.Positional[Path] = RESULTS
    drafter: str = "shipped"
    into: Path | None = None
    """Markdown file that gets the tables between its marks; printed if left out."""
    output: Path | None = None
    """Folder for long.png."""

    def run(self) -> None:
        rows = results.read_rows(self.results)
        view = View(rows)
        tables = {TAU_MARKS: tau_table(rows, view, self.drafter)}
        if view.select("decode", 0.0):
            tables[SPEED_MARKS] = speed_table(view, self.drafter)
        draw_limits.write(tables, self.into)
        if self.output is not None:
            figure = picture(view, self.drafter)
            figure.savefig(self.output / "long.png", dpi=150, facecolor="white")


def lines(view: View, how: str, temperature: float) -> dict[tuple[str, int], Line]:
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


def tau_table(rows: list[results.Row], view: View, drafter: str) -> str:
    """Tau with 16 nodes by task and length, and how much of the answers was copied."""
    cells = []
    copied = {(x.set, x.temperature): x for x in rows if isinstance(x, results.Copies)}
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
    keys = [(name, nodes) for nodes in BUDGETS for name in shown(drafter).values()]
    forms = [(form, 1) for form in plain_forms()]
    sets = next(iter(clocked.values())).sets
    for length in dict.fromkeys(name.split()[1] for name in sets):

        def of_length(key, length=length) -> Line:
            parts = clocked[key].parts
            return Line(tuple(part for part in parts if part.set.split()[1] == length))

        ms = {key: round_ms(of_length(key)) for key in (*forms, *keys)}
        plain = min(ms[form] for form in forms)
        prompt = of_length(forms[0]).column(lambda part: part.prompt_seconds).mean()
        for task in TASKS:
            taus = {key: walked[key].of(f"{task} {length}").tau[0] for key in keys}
            speeds = [f"{taus[key] * plain / ms[key]:.2f}x ({ms[key]:.0f})" for key in keys]
            labels = [task, f"{int(length):,}", f"{prompt:.1f}", f"{plain:.0f}"]
            cells.append([*labels, *speeds])
    cells.sort(key=lambda row: TASKS.index(row[0]))
    heads = [f"{name}, {nodes}" for nodes in BUDGETS for name in shown(drafter)]
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
    grid = figure.subplots(len(temperatures), len(TASKS), sharey="row", squeeze=False)
    for panels, temperature in zip(grid, temperatures, strict=True):
        found = lines(view, "walk", temperature)
        for task, panel in zip(TASKS, panels, strict=True):
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


def _draw(panel, found: dict[Key, Line], task: str, drafter: str) -> None:
    sets = sorted(found[limits.LOOKUP, NODES].sets, key=_order)
    lengths = [length for own, length in map(_order, sets) if own == task]
    for (label, decoder), colour in zip(shown(drafter).items(), COLOURS, strict=False):
        for nodes in BUDGETS:
            line = found[decoder, nodes]
            taus = [m.estimate(line.of(f"{task} {length}").tau) for length in lengths]
            look = dict(color=colour, label=f"{label}, {nodes} nodes", marker="o", ms=4)
            style = "-" if nodes == NODES else ":"
            panel.plot(lengths, [x.value for x in taus], style, **look)
            if nodes == NODES:
                low, high = [x.low for x in taus], [x.high for x in taus]
                panel.fill_between(lengths, low, high, color=colour, alpha=0.12, lw=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(LENGTHS), [f"{length:,}" for length in LENGTHS])
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e3e7eb", lw=0.7)


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(Walk | Clock | Draw, description=__doc__).run())
    except ValueError as error:
        sys.exit(f"error: {error}")
