"""`bench`, from a shell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jaxspec.cli import exits
from jaxspec.cli.options import (
    Count,
    Dtype,
    MinP,
    NewTokens,
    PromptSets,
    TargetName,
    Thinking,
    TopK,
    TopP,
    check_least,
    check_writable,
    chosen_dtype,
    target_name,
)
from jaxspec.cli.prompt_sets import chosen, encoded


@dataclasses.dataclass(frozen=True)
class Bench:
    """Choose a drafter: tokens per round, milliseconds by phase, and speed against plain.

    All drafters answer the same prompts, interleaved with plain decoding; one table compares
    them. Name a drafter as for `generate --drafter`; its own options follow after commas:
    DRAFTER[,tree=KIND][,head=none][,scores=confidence][,width=W][,candidates=C]. `evaluate`
    explains them, and runs larger comparisons, which can be resumed.

    Examples:
      python -m jaxspec bench --drafters ngram shipped shipped+ngram --prompts prompts.jsonl
      python -m jaxspec bench --target Qwen/Qwen3-8B --budgets 8 64 --prompts gsm8k.jsonl \\
          --drafters RedHatAI/Qwen3-8B-speculator.eagle3 z-lab/Qwen3-8B-DFlash,tree=top_budget
    """

    drafters: tuple[str, ...]
    """ngram, mtp, mtp:NAME, small:NAME, python:MODULE:FUNCTION, shipped, or the folder or hub
    name of a trained drafter. DRAFTER+ngram adds prompt lookup to all but ngram."""
    prompts: PromptSets
    target: TargetName = None
    dtype: Dtype = "auto"
    """Dtype of weights and caches; see `generate`."""
    budgets: tuple[int, ...] = (8,)
    """Nodes verified per round, root included; every drafter is measured at each budget."""
    count: Count = 4
    max_new_tokens: NewTokens = 128
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    thinking: Thinking = None
    output: Path | None = None
    """Write the measurements to this new file, as JSON lines that `report` draws."""
    json: bool = False
    """Print one JSON object per row of the table on standard output, and nothing else."""

    def run(self) -> int:
        import jaxspec
        from jaxspec.evaluation.bench import bench, bench_entries, bench_rows, bench_table
        from jaxspec.evaluation.comparison import Evaluation, run_settings
        from jaxspec.evaluation.view import View

        self._check()
        filters = dict(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        sampling = jaxspec.Sampling(temperature=self.temperature, **filters)
        unread: list[str] = []
        texts = chosen(self.prompts, self.count, unread)
        jaxspec.enable_compilation_cache()
        name = target_name(self.target, *(text.partition(",")[0] for text in self.drafters))
        dtype = chosen_dtype(self.dtype)
        entries = bench_entries(name, self.drafters, self.budgets, dtype=dtype)
        options = dict(max_new_tokens=self.max_new_tokens)
        sets, refused = encoded(entries[0].target, texts, thinking=self.thinking, **options)
        code = exits.left_out(unread + refused)
        setup = run_settings(
            entries, sets, filters, decoders=self.drafters, dtype=dtype, **options
        )
        rows = (setup, *bench(entries, sets, sampling=sampling, **options))
        if self.output is not None:
            Evaluation(rows).save(self.output)
        found = bench_rows(View(rows))
        print("\n".join(map(json.dumps, found)) if self.json else bench_table(found))
        return code

    def _check(self) -> None:
        if not self.drafters or not self.prompts:
            raise ValueError("nothing to compare: give --drafters and --prompts, one or more")
        if not self.budgets or min(self.budgets) < 2:
            raise ValueError(
                f"--budgets is {self.budgets}; expected at least 2 each (1, the root alone, is "
                "plain decoding, which is measured too)"
            )
        check_least(self, count=0, max_new_tokens=2)
        if self.output is not None and self.output.exists():
            raise ValueError(f"{self.output} exists already; choose another name or delete it")
        check_writable("output", self.output)
