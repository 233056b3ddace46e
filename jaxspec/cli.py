"""`python -m jaxspec`: what the library does, from a shell.

Exit codes: 0 done, 1 a check found a fault, 2 bad input (one line on standard error).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxspec.commands import Convert, Plan
from jaxspec.evaluation.commands import Evaluate, OverlapCheck, Report
from jaxspec.jsonl import numbered_lines
from jaxspec.options import DrafterOptions
from jaxspec.serving.commands import Calibrate, Serve
from jaxspec.training.commands import Regenerate, Train

FAULT, BAD_INPUT = 1, 2


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer prompts with a target model, speculatively; the output is the target's own.

    Examples:
      python -m jaxspec generate --prompt "Why is the sky blue?"
      python -m jaxspec generate --prompts prompts.jsonl --drafter ngram --budget 8 --json
      python -m jaxspec generate --target Qwen/Qwen3-8B --drafter JetSpec/jetspec-qwen3-8b \\
          --tree best_first --width 7 --budget 128 --prompt "Prove that 2 is prime."
    """

    drafter: Annotated[DrafterOptions, tyro.conf.arg(name="")] = DrafterOptions()
    target: str = "smollm2-135m"
    """Name in the catalog, GGUF file, Hugging Face folder, or hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and cache. float32 is lossless to the token; bfloat16 may flip near-ties."""
    prompt: str | None = None
    """One prompt, a user's turn."""
    prompts: Path | None = None
    """JSON lines, each {"turns": [...]} or {"prompt": ...}; the first turn is used."""
    prompt_ids: Path | None = None
    """A JSON list of lists of token ids; needs no tokenizer."""
    raw: bool = False
    """Give the text to the model as it is, without the chat template."""
    thinking: bool | None = None
    """Turn a Qwen3 chat template's thinking on or off."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    rejection: bool = False
    """Draw chains from a trained drafter and verify them by rejection sampling."""
    batch_size: int = 1
    """Prompts decoded together; `seconds` is then the batch's."""
    devices: int = 1
    """Devices to cut the target and its caches over, those of all processes counted."""
    distributed: bool = False
    """This is one process of several (docs/multi-host.md); the first one prints."""
    json: bool = False
    """One JSON object per prompt on standard output, and nothing else there."""

    def run(self) -> int:
        import jaxspec
        from jaxspec.sharding import join_processes, mesh_of

        prompts = self._prompts()
        if self.distributed:
            join_processes()
        sampling = jaxspec.Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )
        jaxspec.enable_compilation_cache()
        target = jaxspec.load_target(self.target, dtype=self.dtype, devices=self.devices)
        drafter = self.drafter.load(target)
        options = dict(
            drafter=drafter,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            budget=min(self.drafter.budget, drafter.drafter.size),
            batch_size=self.batch_size,
            raw=self.raw,
            thinking=self.thinking,
            rejection=self.rejection,
        )
        with mesh_of(target.params):
            self._decode(target, prompts, options)
        return 0

    def _decode(self, target, prompts: list, options: dict) -> None:
        import jax
        from tqdm import tqdm

        import jaxspec

        leads = jax.process_index() == 0
        capacity = jaxspec.warm_up(target, prompts, **options)
        starts = range(0, len(prompts), self.batch_size)
        hidden = len(starts) == 1 or not leads
        for start in tqdm(starts, unit="batch", disable=hidden, file=sys.stderr):
            batch = prompts[start : start + self.batch_size]
            # Each prompt's seed follows from its place in the file, whatever the batches.
            seeds = [self.seed + start + i for i in range(len(batch))]
            done = jaxspec.generate(target, batch, seed=seeds, capacity=capacity, **options)
            for completion in done if leads else ():
                self._print(completion)

    def _prompts(self) -> list:
        given = [x is not None for x in (self.prompt, self.prompts, self.prompt_ids)]
        if sum(given) != 1:
            raise ValueError(
                f"{sum(given)} of --prompt, --prompts and --prompt-ids were given; expected one"
            )
        if self.prompt is not None:
            if not self.prompt.strip():
                raise ValueError("--prompt is empty; expected some text")
            return [self.prompt]
        return (
            read_prompt_ids(self.prompt_ids)
            if self.prompts is None
            else read_prompts(self.prompts)
        )

    def _print(self, completion) -> None:
        stats = completion.stats
        new_tokens = len(completion.token_ids)
        if self.json:
            row = dict(
                token_ids=completion.token_ids,
                text=completion.text,
                rounds=stats.rounds,
                committed=list(stats.committed),
                tau=stats.tau,
                new_tokens=new_tokens,
                seconds=completion.seconds,
            )
            print(json.dumps(row), flush=True)
            return
        print(completion.text if completion.text is not None else completion.token_ids)
        print(
            f"[{new_tokens} tokens, {stats.rounds} rounds, tau {stats.tau:.2f}, "
            f"{new_tokens / completion.seconds:.1f} tokens/s]\n",
            flush=True,
        )


CHECK_PROMPTS = (
    "Natalia sold 48 clips in April and half as many in May. How many did she sell in all?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Why is the sky blue?",
)


@dataclasses.dataclass(frozen=True)
class Check:
    """Check that a trained drafter fits its target, and that decoding runs it as training did.

    Compares the drafter's logits slot by slot between the two ways, walks the target's own
    answers (or --text) for tau, and tries what is most often wrong: taps off by one, the other
    slot layout, another mask id, the other thinking mode. Exit code 1 when something looks
    wrong.

    Examples:
      python -m jaxspec check --drafter run/drafter
      python -m jaxspec check --target Qwen/Qwen3-8B --drafter JetSpec/jetspec-qwen3-8b
    """

    drafter: str
    """Folder or hub name of a trained drafter (repo::subfolder too)."""
    target: str = "smollm2-135m"
    """Name in the catalog, GGUF file, Hugging Face folder, or hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    text: Path | None = None
    """Text to walk over instead of the target's answers to a few questions."""
    max_new_tokens: int = 96
    """Length of those answers."""
    thinking: bool | None = None
    """Turn a Qwen3 chat template's thinking on or off."""
    json: bool = False
    """The report as one JSON object on standard output."""

    def run(self) -> int:
        import jaxspec
        from jaxspec.check import Text, check, check_answers
        from jaxspec.generation import as_token_ids

        text = None if self.text is None else _read(self.text)
        jaxspec.enable_compilation_cache()
        target = jaxspec.load_target(self.target, dtype=self.dtype)
        drafter = jaxspec.load_drafter(self.drafter, target)
        if text is None:
            report = check_answers(
                target,
                drafter,
                CHECK_PROMPTS,
                max_new_tokens=self.max_new_tokens,
                thinking=self.thinking,
            )
        else:
            (ids,) = as_token_ids(target, [text], raw=True, thinking=None)
            report = check(target, drafter, [Text(tuple(ids))])
        print(json.dumps(dataclasses.asdict(report)) if self.json else report)
        return FAULT if report.findings else 0


def read_prompts(path: Path) -> list[str]:
    """First turns of a JSONL file; rows are {"turns": [...]} or {"prompt": ...}."""
    rows = []
    for number, line in numbered_lines(path):
        row = _parse(line, f"{path}, line {number}")
        text = None
        if isinstance(row, dict):
            turns = row.get("turns")
            text = turns[0] if isinstance(turns, list) and turns else row.get("prompt")
        if not isinstance(text, str):
            raise ValueError(
                f'{path}, line {number}: expected {{"turns": ["text", …]}} or '
                f'{{"prompt": "text"}}, found {line[:60]!r}'
            )
        rows.append(text)
    if not rows:
        raise ValueError(f"{path} holds no prompts; expected one JSON object per line")
    return rows


def read_prompt_ids(path: Path) -> list[list[int]]:
    """A JSON list of lists of token ids."""
    rows = _parse(_read(path), str(path))
    good = (
        isinstance(rows, list)
        and rows
        and all(
            isinstance(row, list) and all(type(token) is int for token in row) for row in rows
        )
    )
    if not good:
        raise ValueError(f"{path}: expected a JSON list of lists of token ids, [[1, 2, …], …]")
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


COMMANDS = {
    "generate": Generate,
    "check": Check,
    "regenerate": Regenerate,
    "train": Train,
    "evaluate": Evaluate,
    "report": Report,
    "calibrate": Calibrate,
    "serve": Serve,
    "overlap": OverlapCheck,
    "convert": Convert,
    "plan": Plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="python -m jaxspec", description=__doc__, args=arguments
    )
    try:
        return command.run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
