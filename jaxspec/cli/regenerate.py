"""`regenerate`, from a shell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from jaxspec.cli.exits import DONE, FAULT
from jaxspec.cli.options import MinP, NewTokens, TopK, TopP, target_name


@dataclasses.dataclass(frozen=True)
class Regenerate:
    """Create training data: the target's answers to prompts, or to questions it writes.

    An interrupted run resumes when started again; failed conversations are retried. Exit code 1
    if conversations failed.

    Examples:
      python -m jaxspec regenerate --prompts prompts.jsonl --output data.jsonl
      python -m jaxspec regenerate --questions 500 --temperature 0.7 --output data.jsonl
      python -m jaxspec regenerate --prompts a.jsonl b.jsonl --dtype bfloat16 --rows 64 \\
          --max-new-tokens 256 --max-length 510 --temperature 0.7 --sampled 0.25 \\
          --output data.jsonl
    """

    output: Path
    """File of conversations as JSON lines, with text and tokens; failures go to
    NAME.errors.jsonl beside it."""
    prompts: tuple[str, ...] = ()
    """Prompts or conversations, in any format of docs/training.md; their answers are dropped. A
    row {"opening": ...} begins a question that the target completes."""
    questions: int = 0
    """Without --prompts: number of questions the target writes and answers."""
    question_tokens: int = 96
    """Maximum tokens per generated question."""
    target: str = "smollm2-135m"
    """Name in the catalog, GGUF file, Hugging Face folder, or hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and caches."""
    drafter: str = "none"
    """As for `generate`; changes speed only, not the answers."""
    max_new_tokens: NewTokens = 512
    max_length: int = 1024
    """Maximum tokens per conversation."""
    temperature: float = 0.0
    """Sampling temperature of the answers; 0 is greedy."""
    sampled: float = 1.0
    """Share of the conversations answered at that temperature; the others are greedy."""
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    thinking: bool | None = None
    """Turn a Qwen3 chat template's thinking on or off; written into every row."""
    rows: int = 16
    """Conversations decoded together."""
    seed: int = 0
    """Seed of sampling, 0 … 4294967295."""
    json: bool = False
    """Print one JSON object on standard output: the counts, and how each source was read."""

    def run(self) -> int:
        import jaxspec
        from jaxspec.data.jobs import own_questions, read_jobs
        from jaxspec.data.sources import open_source
        from jaxspec.training.regenerate import RegenerateConfig, regenerate

        if bool(self.prompts) == (self.questions > 0):
            raise ValueError(
                f"--prompts has {len(self.prompts)} sources and --questions is "
                f"{self.questions}; give one of them"
            )
        sources = [open_source(name) for name in self.prompts]
        jobs = read_jobs(*sources) if sources else own_questions(self.questions)
        config = RegenerateConfig(
            max_new_tokens=self.max_new_tokens,
            sampling=jaxspec.Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
            ),
            sampled=self.sampled,
            thinking=self.thinking,
            max_length=self.max_length,
            question_tokens=self.question_tokens,
            seed=self.seed,
            rows=self.rows,
        )
        name = target_name(self.target, self.drafter)
        jaxspec.enable_compilation_cache()
        target = jaxspec.load_target(name, dtype=self.dtype)
        drafter = jaxspec.load_drafter(self.drafter, target)
        outcome = regenerate(config, target, jobs, self.output, drafter=drafter)
        if self.json:
            row = dataclasses.asdict(outcome) | dict(
                output=str(self.output),
                errors=str(outcome.errors) if outcome.failed else None,
                sources=[source.summary() for source in sources],
            )
            print(json.dumps(row))
            return FAULT if outcome.failed else DONE
        line = f"{self.output}: {outcome.rows} conversations, {outcome.answered} of them new"
        if not outcome.failed:
            print(line)
            return DONE
        print(f"{line}; {outcome.failed} failed, see {outcome.errors} (exit code {FAULT})")
        return FAULT
