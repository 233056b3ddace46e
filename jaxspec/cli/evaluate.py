"""`evaluate`, from a shell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal

from jaxspec.checkpoints import Weights
from jaxspec.cli import exits
from jaxspec.cli.options import (
    Count,
    MinP,
    NewTokens,
    PromptSets,
    TargetName,
    Thinking,
    TopK,
    TopP,
    check_least,
    check_writable,
    target_name,
)
from jaxspec.cli.prompt_sets import chosen, encoded


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Compare decoders on prompt sets: tokens per round, speed, and what each phase costs.

    A decoder is NAME=DRAFTER[,tree=KIND][,head=none][,scores=confidence][,budget=N]
    [,width=W][,candidates=C][,dtype=D], with drafters and default trees as for `generate`: of 8
    nodes, path_conditioned for drafters with a sequential head, chain for others. The default
    dtype is float32. head=none drops the sequential head, which gives the trees of DDTree and
    JetSpec; scores=confidence ranks nodes by the confidence head. Plain decoding is always
    timed too.

    An interrupted run resumes when started again: it keeps the results in its output, if they
    are of the same options, prompts and models.

    Examples:
      python -m jaxspec evaluate --prompts gsm8k.jsonl humaneval.jsonl --output results.jsonl \\
          --decoders lookup=ngram chain=run/drafter,tree=chain \\
          ddtree=run/drafter,tree=top_budget,head=none,budget=16 \\
          ours=run/drafter,tree=path_conditioned,budget=16
      python -m jaxspec evaluate --tau-only --budgets 2 4 8 16 32 64 128 …   # no clock
    """

    prompts: PromptSets
    decoders: tuple[str, ...]
    """Decoders to compare, in the form above."""
    output: Path
    """File of results as JSON lines, which `report` draws. An existing file must hold results
    of the same setup."""
    target: TargetName = None
    weights: Weights = "dequantised"
    """How to hold an fp8 target's weights: dequantised to the decoders' dtypes, or stored in 8
    bits with their scales."""
    count: Count = 16
    max_new_tokens: NewTokens = 256
    temperatures: tuple[float, ...] = (0.0,)
    """Sampling temperatures; 0 is greedy."""
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    budgets: tuple[int, ...] = ()
    """Further budgets to report tau for, besides each decoder's own; 1 is plain decoding."""
    tau_only: bool = False
    """Skip timing: report tau, acceptance and calibration from recorded answers alone."""
    batch_size: int = 8
    """Answers recorded and replayed together; timed decoding runs one prompt at a time."""
    timed: int | None = None
    """Prompts per set to time; all of `count` by default."""
    plain_dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Time plain decoding in these dtypes too, besides the decoders' own."""
    thinking: Thinking = None

    def run(self) -> int:
        import jaxspec
        from jaxspec.evaluation.comparison import measurements
        from jaxspec.evaluation.contenders import Contender, load_entries
        from jaxspec.evaluation.measure import spare_tokens
        from jaxspec.evaluation.report import markdown
        from jaxspec.evaluation.results import read_rows, resume
        from jaxspec.evaluation.view import View

        contenders = [Contender.parse(text) for text in self.decoders]
        self._check(contenders)
        filters = dict(top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        samplings = [jaxspec.Sampling(temperature=t, **filters) for t in self.temperatures]
        unread: list[str] = []
        texts = chosen(self.prompts, self.count, unread)
        jaxspec.enable_compilation_cache()
        target = target_name(self.target, *(contender.drafter for contender in contenders))
        entries = load_entries(target, contenders, weights=self.weights)
        sets, refused = encoded(
            entries[0].target,
            texts,
            thinking=self.thinking,
            max_new_tokens=self.max_new_tokens,
            spare=spare_tokens(entries, self.budgets),
        )
        code = exits.left_out(unread + refused)

        def measure(done):
            return measurements(
                entries,
                sets,
                samplings=samplings,
                budgets=self.budgets,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                timed=0 if self.tau_only else self.timed or None,
                plain_dtypes=self.plain_dtypes,
                weights=self.weights,
                done=done,
            )

        resume(self.output, self._setup(entries, sets, filters), measure)
        print(markdown(View(read_rows(self.output))))
        return code

    def _check(self, contenders) -> None:
        if not contenders or not self.prompts:
            raise ValueError("nothing to compare: give --decoders and --prompts, at least one")
        check_least(self, count=0, max_new_tokens=2, batch_size=1, timed=0)
        if any(budget < 1 for budget in self.budgets):
            raise ValueError(
                f"--budgets has {min(self.budgets)}; expected at least 1 (the root)"
            )
        check_writable("output", self.output)

    def _setup(self, entries, sets: dict[str, list[list[int]]], filters):
        """Settings that all results of one file share; temperatures and timings may differ."""
        from jaxspec.evaluation.comparison import run_settings

        options = {"prompts_sha256": hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:16]}
        names = ("thinking", "timed", "max_new_tokens", "budgets", "batch_size", "plain_dtypes")
        options |= {name: getattr(self, name) for name in names}
        if self.weights != "dequantised":
            options["weights"] = self.weights
        return run_settings(entries, sets, filters, decoders=self.decoders, **options)
