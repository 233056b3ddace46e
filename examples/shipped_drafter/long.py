"""How drafters fade and lookup gains as prompts become longer, to 7,000 tokens.

    python examples/shipped_drafter/long.py walk   # tau; nothing is timed
    python examples/shipped_drafter/long.py clock  # tokens/s; needs a quiet machine
    python examples/shipped_drafter/long.py draw --into docs/report.md --output docs/pictures

All but `draw` resume after an interruption. A prompt is a numbered list of public texts and a
task about one of them. The texts: paragraphs of this repository's pages as of `COMMIT`, GSM8K's
questions, HumanEval's functions (evaluation prompts, which no drafter was trained on); two
prompts of each, which begin at different texts. The tasks: `ask`, to explain, solve or complete
the text in the middle; `copy`, to write it and the next one again. A prompt holds as many whole
texts as fit into 512 … 7,000 tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tyro

import jaxspec
from jaxspec.data.prompts import spread
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import decoder_for, pack, request_keys, unpack
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.evaluation import metrics as m
from jaxspec.evaluation import results
from jaxspec.evaluation.contenders import Entry, load_entries
from jaxspec.evaluation.plots import COLOURS, QUIET
from jaxspec.evaluation.report import table
from jaxspec.evaluation.speed import plain_forms, take_turns
from jaxspec.evaluation.view import Line, View, is_plain
from jaxspec.models.target import Target
from jaxspec.prompts import as_token_ids
from jaxspec.results import Completion

sys.path.insert(0, str(Path(__file__).parent))
import limits  # noqa: E402  (the script beside this one)

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("long.jsonl")
COMMIT = "7f45fac3cb18520a0086831c735119986e2a5fc6"
LENGTHS = (512, 1024, 2048, 4096, 7000)
TASKS = ("ask", "copy")
BUDGETS = (8, 16)
NODES = 16  # of the trees that the table of tau shows
TAU_MARKS = "<!-- long -->", "<!-- end of long -->"
SPEED_MARKS = "<!-- long speed -->", "<!-- end of long speed -->"
WINDOWS = 2  # prompts of each kind of text
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


def prompt(kind: str, found: list[str], window: int, task: str, length: int, count) -> str:
    """The longest prompt of at most `length` tokens.

    Args:
      found: texts of one kind.
      count: tokens of a text.
    """
    start = window * len(found) // WINDOWS
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
    target: str = "smollm2-135m"
    dtype: str = "bfloat16"

    def run(self) -> None:
        entries = load_entries(self.target, limits.contenders(self.drafters, self.dtype))
        asked, sets = self.sets(entries[0].target)
        setup = limits.setup_of(entries[0], asked, self.max_new_tokens)
        limits.keep(self.output, setup, lambda done: self.rows(entries, sets, done))

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
                prompt(kind, own, window, task, length, lambda text: len(encode([text])[0]))
                for kind, own in found.items()
                for window in range(WINDOWS)
            ]
            for task in TASKS
            for length in LENGTHS
        }
        return asked, {name: encode(rows) for name, rows in asked.items()}


@dataclasses.dataclass(frozen=True)
class Clock(Walk):
    """Tokens per second after the prompt, greedy, decoders taking turns on each prompt."""

    timed: int = 3
    """Prompts per set, evenly apart."""
    nodes: tuple[int, ...] = BUDGETS
    only: tuple[str, ...] = ()
    """Sets to time, "ask 512" for example; all by default."""

    def rows(self, entries: list[Entry], sets, done: results.Done) -> Iterator[results.Row]:
        target = entries[0].target
        decoders = {(name, 1): form for name, form in plain_forms().items()}
        for entry in entries:
            for nodes in self.nodes:
                forms = limits.forms(entry, nodes)
                decoders |= {(name, nodes): drafter for name, drafter in forms.items()}
        for name in self.only or sets:
            if name not in sets:
                raise ValueError(f"--only has {name!r}; expected some of {', '.join(sets)}")
            if all(("rounds", "decode", name, 0.0, *key) in done for key in decoders):
                continue
            rows = spread(sets[name], self.timed)
            runs = {
                key: Run(target, drafter, rows, self.max_new_tokens)
                for key, drafter in decoders.items()
            }
            answers = take_turns(runs, rows)
            plain = next(iter(answers.values()))
            for key, own in answers.items():
                yield _timed(name, self.dtype, *key, own, runs[key].prompt_seconds, plain)


class Run:
    """A decoder whose clock starts after the prompt (`evaluation.speed.Run`).

    Attributes:
      prompt_seconds: of every prompt so far.
    """

    def __init__(self, target: Target, drafter: LoadedDrafter, rows, new_tokens: int):
        self.decoder, self.params = decoder_for(target, drafter)
        self.new_tokens, self.prompt_seconds = new_tokens, []
        options = dict(drafter=drafter, max_new_tokens=new_tokens, batch_size=1)
        self.capacity = jaxspec.warm_up(target, rows, **options)

    def __call__(self, row: list[int], seed: int) -> Completion:
        requests = pack(
            self.decoder,
            [row],
            batch=1,
            capacity=self.capacity,
            max_new_tokens=self.new_tokens,
            budget=self.decoder.drafter.size,
            sampling=[Sampling()],
            keys=request_keys(seed, 1),
        )
        began = time.perf_counter()
        state = jax.block_until_ready(prefill(self.decoder, self.params, requests))
        prompt = time.perf_counter()
        rounds = np.int32(self.new_tokens)
        state = decode(self.decoder, self.params, state, requests.sampling, rounds)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - prompt
        self.prompt_seconds.append(prompt - began)
        ((ids, stats),) = unpack(state, [len(row)])
        return Completion(ids, None, stats, seconds, "length")


def _timed(name, dtype, decoder, nodes, own, prompt_seconds, plain) -> results.Rounds:
    """A row of one decoder's answers to a set; `plain` are plain decoding's."""
    return results.Rounds(
        set=name,
        temperature=0.0,
        decoder=decoder,
        drafter=decoder.partition(",")[0],
        tree=None,
        head="own",
        dtype=dtype,
        budget=nodes,
        how="decode",
        tokens=[len(x.token_ids) - 1 for x in own],  # the first comes with the prompt
        seconds=[x.seconds for x in own],
        equal=[x.token_ids == y.token_ids for x, y in zip(own, plain, strict=True)],
        prompt_seconds=prompt_seconds,
        **results.counts([x.stats for x in own]),
    )


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
        limits.write(tables, self.into)
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
        for name in view.sets:
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


def speed_table(view: View, drafter: str) -> str:
    """Tokens per second after the prompt, over the fastest plain decoding's of each set."""
    found, cells = lines(view, "decode", 0.0), []
    heads, decoders = zip(*((f"{n}, {b}", (d, b)) for n, d in shown(drafter).items()
                            for b in BUDGETS), strict=True)  # fmt: skip
    plain = [line for line in found.values() if is_plain(line)]
    for name in next(iter(found.values())).sets:
        best = max((line.of(name) for line in plain), key=lambda line: line.rate[0])
        seconds = best.column(lambda part: part.prompt_seconds).mean()
        speeds = [found[key].of(name) for key in decoders]
        task, length = name.split()
        cells.append(
            [
                task,
                f"{int(length):,}",
                f"{seconds:.1f}",
                f"{best.rate[0]:.1f}",
                *(f"{(x.rate / best.rate)[0]:.2f}x ({x.tau[0]:.2f})" for x in speeds),
            ]
        )
    labels = ["task", "prompt", "seconds of the prompt", "plain, tokens/s"]
    return table([*labels, *heads], cells, left=1)


def picture(view: View, drafter: str):
    """Tau by length: a panel for each task and temperature."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(3.4 * len(TASKS) * len(view.temperatures), 3.4), layout="constrained"
    )
    panels = iter(figure.subplots(1, len(TASKS) * len(view.temperatures), sharey=True))
    for temperature in view.temperatures:
        found = lines(view, "walk", temperature)
        for task, panel in zip(TASKS, panels, strict=False):
            for (label, decoder), colour in zip(shown(drafter).items(), COLOURS, strict=False):
                for nodes, look in ((NODES, "o-"), (8, "o:")):
                    taus = [found[decoder, nodes].of(f"{task} {n}").tau for n in LENGTHS]
                    values = [m.estimate(tau) for tau in taus]
                    named = f"{label}, {nodes} nodes"
                    y = [x.value for x in values]
                    panel.plot(LENGTHS, y, look, color=colour, label=named, ms=4)
                    if nodes == NODES:
                        low, high = [x.low for x in values], [x.high for x in values]
                        panel.fill_between(LENGTHS, low, high, color=colour, alpha=0.12, lw=0)
            panel.set_xscale("log", base=2)
            panel.set_xticks(LENGTHS, [f"{n / 1000:.1f}k" for n in LENGTHS], fontsize=8)
            panel.minorticks_off()
            title = f"{task}, temperature {temperature:g}"
            panel.set_title(title, loc="left", fontsize=10, color=QUIET)
            panel.set_xlabel("tokens of the prompt")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#e3e7eb", lw=0.7)
    first = figure.axes[0]
    first.set_ylabel("tokens per round (tau)")
    handles, labels = first.get_legend_handles_labels()
    place = dict(loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.legend(handles, labels, **place)
    return figure


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(Walk | Clock | Draw, description=__doc__).run())
    except ValueError as error:
        sys.exit(f"error: {error}")
