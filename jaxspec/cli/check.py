"""`check`, from a shell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from jaxspec.cli import exits
from jaxspec.cli.options import NewTokens, TargetName, Thinking, check_least, target_name
from jaxspec.data.jsonl import read_text

CHECK_PROMPTS = (
    "Natalia sold 48 clips in April and half as many in May. How many did she sell in all?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Why is the sky blue?",
    "Explain what a hash table is to somebody who has never written a program.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Write a short letter to a neighbour about the noise at night.",
    "List five things to check before buying a used bicycle, with a reason for each.",
    "Translate into French: the shop on the corner opens at eight and closes at six.",
    "What are the three states of matter, and how does one turn into another?",
    "A rectangle is 7 cm long and 4 cm wide. What are its area and its perimeter?",
    "Write a haiku about the first snow, then explain what a haiku is.",
    "Give me a recipe for pancakes for four people.",
    "How do I undo the last commit in git without losing my changes?",
    "Who was Marie Curie, and what is she known for?",
    "Summarise in two sentences why the dinosaurs are thought to have died out.",
    "Sort the numbers 31, 4, 15, 9, 26 and 5, and say what their median is.",
)


@dataclasses.dataclass(frozen=True)
class Check:
    """Check that a trained drafter fits its target and decodes as it was trained.

    Compares the drafter's logits in training and in decoding, slot by slot; replays the
    target's own answers (or --text) for tau; and tries the usual mistakes: taps off by one, the
    other slot layout, another mask id, the other thinking mode. Exit code 1 when something
    looks wrong.

    Examples:
      python -m jaxspec check --drafter run/drafter
      python -m jaxspec check --target Qwen/Qwen3-8B --drafter JetSpec/jetspec-qwen3-8b
      python -m jaxspec check --target Qwen/Qwen3-8B-FP8 --beside Qwen/Qwen3-8B \\
          --drafter JetSpec/jetspec-qwen3-8b
    """

    drafter: str
    """Folder or hub name of a trained drafter (repo::subfolder too)."""
    target: TargetName = None
    beside: str | None = None
    """Second target to measure tau on; the unquantised original of an fp8 target shows what
    quantisation costs the drafter."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and caches."""
    text: Path | None = None
    """File whose text is replayed instead of the target's answers to a few questions."""
    max_new_tokens: NewTokens = 48
    thinking: Thinking = None
    json: bool = False
    """Print the report as one JSON object on standard output."""

    def run(self) -> int:
        import jaxspec
        from jaxspec import checkpoints

        check_least(self, max_new_tokens=1)
        text = None if self.text is None else read_text(self.text)
        name = target_name(self.target, self.drafter)
        if self.beside is not None:
            checkpoints.target_path(self.beside)
        jaxspec.enable_compilation_cache()
        report = self._report(name, text)
        other = None if self.beside is None else self._report(self.beside, text)
        if self.json:
            row = dataclasses.asdict(report)
            if other is not None:
                row["beside"] = {"target": self.beside, "tau": other.tau}
            print(json.dumps(row))
        else:
            print(report)
            if other is not None:
                print(
                    f"tau {other.tau:.2f} over {other.rounds} rounds on {self.beside}: "
                    f"{report.tau - other.tau:+.2f} here"
                )
        return exits.FAULT if report.findings else exits.DONE

    def _report(self, name: str, text: str | None):
        """The drafter's `Report` on one target."""
        import jaxspec
        from jaxspec.check.report import check, check_answers
        from jaxspec.evaluation.walk import RecordedAnswer
        from jaxspec.prompts import as_token_ids

        target = jaxspec.load_target(name, dtype=self.dtype)
        drafter = jaxspec.load_drafter(self.drafter, target)
        if text is not None:
            (ids,) = as_token_ids(target, [text], raw=True, thinking=None)
            return check(target, drafter, [RecordedAnswer(tuple(ids), 1, len(ids))])
        return check_answers(
            target,
            drafter,
            CHECK_PROMPTS,
            max_new_tokens=self.max_new_tokens,
            thinking=self.thinking,
        )
