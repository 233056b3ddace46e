"""`report`, from a shell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the tables and plots of an evaluation from its files of results.

    Examples:
      python -m jaxspec report results.jsonl --output docs/evaluation
      python -m jaxspec report checkpoints/smollm2-135m/evaluation.jsonl --into docs/results.md
    """

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files that `evaluate` wrote; several are merged."""
    output: Path | None = None
    """Folder for tables.md and the plots; without it the tables are printed."""
    against: tuple[str, ...] = ()
    """Baselines: decoders that all others are compared with, at equal budget."""
    into: Path | None = None
    """Markdown file to update: the summary replaces what is between the lines
    `<!-- results -->` and `<!-- end of results -->`, and tau by budget what is between
    `<!-- taus -->` and `<!-- end of taus -->` if present."""

    def run(self) -> int:
        from jaxspec.evaluation.plots import save_all
        from jaxspec.evaluation.report import TAU_MARKS, into, markdown, summary, tau_by_budget
        from jaxspec.evaluation.results import read_rows
        from jaxspec.evaluation.view import View

        if not self.results:
            raise ValueError("no results: give at least one file that `evaluate` wrote")
        view = View([row for path in self.results for row in read_rows(path)])
        tables = markdown(view, against=self.against)
        if self.into is not None:
            try:
                text = into(self.into.read_text(encoding="utf-8"), summary(view))
                if any(mark in text for mark in TAU_MARKS):
                    text = into(text, tau_by_budget(view), TAU_MARKS)
            except (OSError, ValueError) as error:
                raise ValueError(f"--into {self.into}: {error}") from None
            self.into.write_text(text, encoding="utf-8")
        if self.output is None:
            print(self.into or tables)
            return 0
        self.output.mkdir(parents=True, exist_ok=True)
        pictures = save_all(view, self.output)
        text = self.output / "tables.md"
        text.write_text(tables, encoding="utf-8")
        for path in (text, *pictures):
            print(path)
        return 0
