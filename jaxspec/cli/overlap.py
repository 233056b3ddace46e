"""`overlap`, from a shell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jaxspec.cli import exits
from jaxspec.cli.options import check_least, check_writable


@dataclasses.dataclass(frozen=True)
class OverlapCheck:
    """Check that training data and evaluation prompts are disjoint; exit code 1 if not, or if
    rows could not be read.

    Examples:
      python -m jaxspec overlap --data data.jsonl --prompts evaluation/*.jsonl
      python -m jaxspec overlap --data saved_dataset::train --prompts openai/gsm8k::main/test
    """

    data: tuple[str, ...]
    """Conversations or prompts, in any format of docs/training.md."""
    prompts: tuple[str, ...]
    """Evaluation prompts; every turn of a user counts, answers do not."""
    ngram: int = 13
    """Number of consecutive words in both texts that counts as overlap. Each character of
    Chinese and Japanese is a word."""
    clean: Path | None = None
    """Write the rows without overlap here, as JSON lines."""
    json: bool = False
    """Print one JSON object on standard output: the overlaps, and how each source was read."""

    def run(self) -> int:
        from jaxspec.data.sources import open_source
        from jaxspec.evaluation.overlap import overlaps, texts_of

        if not self.data or not self.prompts:
            raise ValueError("nothing to compare: give --data and --prompts, at least one each")
        if self.clean is not None and self.clean.exists():
            raise ValueError(f"--clean {self.clean} exists already; choose another name")
        check_writable("clean", self.clean)
        check_least(self, ngram=1)
        refused: list[str] = []
        data, asked = (tuple(map(open_source, x)) for x in (self.data, self.prompts))
        prompts = [
            turn
            for x in asked
            for row in texts_of(x, refused, answers=False)
            for turn in row.parts
        ]
        rows = [row for x in data for row in texts_of(x, refused)]
        found = list(overlaps((row.parts for row in rows), prompts, ngram=self.ngram))
        if self.clean is not None:
            bad = {overlap.text for overlap in found}
            kept = [row.row for number, row in enumerate(rows) if number not in bad]
            self.clean.write_text("".join(map(_line, kept)), encoding="utf-8")
        named = [
            dict(where=rows[x.text].where, words=x.words, prompt=prompts[x.prompt])
            for x in found
        ]
        if self.json:
            sources = [source.summary() for source in (*data, *asked)]
            counts = dict(rows=len(rows), prompts=len(prompts))
            print(json.dumps(dict(overlaps=named, **counts, refused=refused, sources=sources)))
        else:
            for overlap in named:
                prompt = " ".join(overlap["prompt"].split())[:90]
                print(f"{overlap['where']}: {overlap['words']!r}\n  prompt: {prompt!r}")
            print(f"{len(found)} of {len(rows)} rows overlap with {len(prompts)} prompts")
        return max(exits.left_out(refused), exits.FAULT if found else exits.DONE)


def _line(row: dict) -> str:
    """A row as a line of JSON; lone surrogates, which UTF-8 cannot encode, are escaped."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    if any("\ud800" <= character <= "\udfff" for character in line):
        line = json.dumps(row, default=str)
    return f"{line}\n"
