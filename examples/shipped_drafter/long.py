"""Measures a drafter and lookup on prompts of up to 7,000 tokens: tau, and ms per round.

    cd examples/shipped_drafter
    python long.py walk   # tau; nothing is timed
    python long.py clock  # needs a quiet machine
    python draw_long.py --into ../../docs/report.md --output ../../docs/evaluation

The first two resume after an interruption. A prompt is a numbered list of public texts and a
task about one of them. The texts: paragraphs of this repository's pages as of `COMMIT`, GSM8K's
questions, HumanEval's functions (evaluation prompts, which no drafter was trained on). The
tasks: `ask`, to explain, solve or complete the text in the middle; `copy`, to write it and the
next one again. A prompt holds as many whole texts as fit into 512 … 7,000 tokens. There are two
of each kind of text, which begin at different ones; one from 4,096 tokens on.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import limits  # the scripts beside this one
import numpy as np
from tqdm import tqdm

from jaxspec.cli import exits
from jaxspec.data.prompts import read_prompts, spread
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import check_capacity, decoder_for, pack, request_keys, unpack
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.state import DecodeState
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import Together
from jaxspec.evaluation import results
from jaxspec.evaluation.contenders import Entry, load_entries
from jaxspec.evaluation.speed import plain_forms
from jaxspec.models.target import Target
from jaxspec.prompts import as_token_ids
from jaxspec.results import Completion

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("long.jsonl")
COMMIT = "7f45fac3cb18520a0086831c735119986e2a5fc6"
LENGTHS = {512: 2, 1024: 2, 2048: 2, 4096: 1, 7000: 1}  # and prompts of each kind of text
TASKS = ("ask", "copy")
BUDGETS = (8, 16)
ASKED = {
    "Paragraph": "Explain in your own words what {0} says.",
    "Problem": "Solve {0}. Please reason step by step.",
    "Function": "Complete {0} and explain how it works.",
}


def texts(folder: Path) -> dict[str, list[str]]:
    """The texts by name."""
    names = _git("ls-tree", "-r", "--name-only", COMMIT).splitlines()
    pages = [_git("show", f"{COMMIT}:{name}") for name in names if name.endswith(".md")]
    blocks = [
        " ".join(block.split())
        for page in pages
        for block in re.sub(r"```.*?```", "", page, flags=re.S).split("\n\n")
    ]
    functions = [
        re.search(r"```python\n(.*?)```", text, re.S)
        for text in read_prompts(folder / "humaneval.jsonl")
    ]
    return {
        "Paragraph": [x for x in blocks if 120 <= len(x) <= 700 and x[0] not in "|-#<!>*`["],
        "Problem": [
            text.partition("\nPlease reason")[0]
            for text in read_prompts(folder / "gsm8k.jsonl")
        ],
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


@dataclasses.dataclass(frozen=True)
class Walk:
    """Tau along the target's own answers, greedy and sampled."""

    drafters: tuple[str, ...] = ("shipped",)
    """Trained drafters, NAME=FOLDER or a name as for `generate`, without +ngram."""
    prompts: Path = ROOT.parent / "shared" / "prompts"
    """Folder of the evaluation's prompts: see Prompts in README.md."""
    output: Path = RESULTS
    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)
    only: tuple[str, ...] = ()
    """Sets to measure, "ask 512" for example; all by default."""
    target: str = "smollm2-135m"
    dtype: str = "bfloat16"

    def run(self) -> None:
        found = texts(self.prompts)
        entries = load_entries(self.target, limits.contenders(self.drafters, self.dtype))
        asked, sets = self.sets(entries[0].target, found)
        setup = limits.setup_of(entries[0], asked, self.max_new_tokens)
        if unknown := [name for name in self.only if name not in sets]:
            raise ValueError(f"--only has {unknown[0]!r}; expected some of {', '.join(sets)}")
        chosen = {name: sets[name] for name in self.only or sets}
        results.resume(
            self.output,
            setup,
            lambda done: self.rows(entries, chosen, done),
            limits.KINDS,
        )

    def rows(self, entries: list[Entry], sets, done: results.Done) -> Iterator[limits.Row]:
        for temperature in self.temperatures:
            length = self.max_new_tokens
            yield from limits.walked(entries, sets, temperature, length, done, BUDGETS)

    def sets(self, target: Target, found: dict[str, list[str]]):
        """Prompts by the name of their set, as texts and as token ids."""
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
    """Times rounds after the prompt, greedy: decoders take turns from one state.

    In bfloat16 their answers part at near-ties, so their own taus are of different texts.
    """

    timed: int = 2
    """Prompts per set, evenly apart."""

    def rows(self, entries: list[Entry], sets, done: results.Done) -> Iterator[limits.Row]:
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
    """Answers of all decoders, their seconds without prefill, and the seconds of prefill.

    A prompt runs once, observed by all drafters; every decoder continues from a copy of the
    state.
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


if __name__ == "__main__":
    exits.script(Walk.run, Walk | Clock, __doc__)
