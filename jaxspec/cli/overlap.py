"""`overlap`, from a shell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxspec.cli import exits


@dataclasses.dataclass(frozen=True)
class OverlapCheck:
    """Check that training data and evaluation prompts are disjoint; exit code 1 if not.

    Examples:
      python -m jaxspec overlap --data data.jsonl --prompts ../shared/prompts/*.jsonl
    """

    data: tuple[Path, ...]
    """JSON lines: conversations, or prompts."""
    prompts: tuple[Path, ...]
    """JSON lines of evaluation prompts; every turn counts."""
    ngram: int = 13
    """Shortest run of words in common that counts as overlap."""
    clean: Path | None = None
    """Write the lines without overlap here."""

    def run(self) -> int:
        from jaxspec.evaluation.overlap import overlaps, texts_of

        if self.clean is not None and self.clean.exists():
            raise ValueError(f"--clean {self.clean} exists already; choose another name")
        if self.ngram < 1:
            raise ValueError(f"--ngram is {self.ngram}; expected at least 1")
        prompts = [
            part for path in self.prompts for _, parts in texts_of(path) for part in parts
        ]
        rows = [row for path in self.data for row in texts_of(path)]
        found = list(overlaps((parts for _, parts in rows), prompts, ngram=self.ngram))
        for overlap in found:
            prompt = " ".join(prompts[overlap.prompt].split())
            print(f"line {overlap.text + 1}: {overlap.words!r}\n  prompt: {prompt[:90]!r}")
        if self.clean is not None:
            bad = {overlap.text for overlap in found}
            kept = [line for number, (line, _) in enumerate(rows) if number not in bad]
            self.clean.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        print(f"{len(found)} of {len(rows)} rows overlap with {len(prompts)} prompts")
        return exits.FAULT if found else exits.DONE
