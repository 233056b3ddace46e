"""The file to which `regenerate` appends conversations, and its file of errors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxspec.data.identity import same_model
from jaxspec.data.jobs import Job
from jaxspec.locks import lock
from jaxspec.whole_files import replace_text

BEGINNING = b'{"id": '  # of every row
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Written:
    """The fields of a row that identify its run."""

    line: int
    conversation: list[dict[str, str]]
    fields: Fields


class AnswersFile:
    """Appends rows atomically, from one process at a time.

    Attributes:
      errors: the file `NAME.errors.jsonl`, of rows that failed in the last run.
    """

    def __init__(self, path: str | Path):
        """Opens and locks the file, and removes an incomplete row at its end.

        Raises:
          ValueError: another process has it open, or `regenerate` did not write it.
        """
        self.path = Path(path)
        self.errors = self.path.with_name(self.path.stem + ".errors.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("ab+")
        try:
            remedy = "wait until it is done, or give another output"
            lock(self._stream.fileno(), str(self.path), remedy)
            self.rows: dict[Any, Written] = {}
            for number, row in _rows(self.path):
                fields = row["metadata"] | {"thinking": row.get("thinking")}
                self.rows[row["id"]] = Written(number, row["conversations"], fields)
            self._failed = [row for _, row in _rows(self.errors)]
        except BaseException:
            self._stream.close()
            raise
        self._stream.truncate(_whole(self.path))

    def waiting(self, jobs: Sequence[Job], fields: Callable[[Job | None], Fields]) -> list[Job]:
        """The jobs without a row; existing rows must match the jobs and settings.

        Errors of the jobs are deleted, as they are tried again.

        Args:
          fields: metadata of a job's row, or with None those that all rows share.

        Raises:
          ValueError: a row answers another prompt, or was made with other settings.
        """
        known = {job.id: job for job in jobs}
        for name, row in self.rows.items():
            where, job = f"{self.path}, line {row.line}", known.get(name)
            if job is not None and not job.error and not job.asked(row.conversation):
                first = next(
                    (x["content"] for x in row.conversation if x["role"] == "user"), ""
                )
                raise ValueError(
                    f"{where}: row {name!r} answers {first[:60]!r}, but this id has another "
                    "prompt now; give another output, or the original prompts"
                )
            if other := _differences(row.fields, fields(job)):
                raise ValueError(
                    f"{where} was made with other settings ({'; '.join(other)}); give another "
                    "output, or the same options"
                )
        kept = [row for row in self._failed if row["id"] not in known]
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in kept)
        if kept:
            replace_text(self.errors, text)
        else:
            self.errors.unlink(missing_ok=True)
        return [job for job in jobs if job.id not in self.rows]

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row and syncs it to disk."""
        _append(self._stream, row)

    def fail(self, row: dict[str, Any]) -> None:
        """Appends a row to the errors."""
        with self.errors.open("ab") as stream:
            _append(stream, row)

    def close(self) -> None:
        """Releases the lock; removes the file if it has no rows."""
        if not self.path.stat().st_size:
            self.path.unlink()
        self._stream.close()


def _differences(found: Fields, expected: Fields) -> list[str]:
    """Fields whose values differ; a field that only one row has is ignored."""
    if same_model(found, expected["target"], expected["fingerprint"]):
        found = found | {"target": expected["target"]}
    return [
        f"{name} {found[name]!r}, now {value!r}"
        for name, value in expected.items()
        if name in found and found[name] != value
    ]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole rows of a file, numbered from 1."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            row = _parse(line)
            if row is not None:
                yield number, row
            elif line.endswith(b"\n") or line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                raise ValueError(
                    f"{path}, line {number} was not written by regenerate; give another output"
                )


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole row, or None."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    good = (
        isinstance(row, dict)
        and type(row.get("id")) in (str, int)
        and isinstance(row.get("conversations"), list)
        and ("error" in row or isinstance(row.get("metadata"), dict))
    )
    return row if good else None


def _whole(path: Path) -> int:
    """Bytes of the whole rows."""
    with path.open("rb") as stream:
        return sum(len(line) for line in stream if line.endswith(b"\n"))


def _append(stream, row: dict[str, Any]) -> None:
    stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    stream.flush()
    os.fsync(stream.fileno())
