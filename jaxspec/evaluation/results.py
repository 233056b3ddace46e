"""Measurements as JSON lines: one object per line, whose `kind` is one of

- ``setup``: target, options, versions, machine.
- ``rounds``: one decoder on one prompt set (`Rounds`). Tau follows from these counts and, with
  `seconds`, speed.
- ``reliability``: a decoder's predicted and actual acceptance (`Reliability`).
- ``branches``: how faithful a drafter's likeliest branch is to the target (`Branches`).
- ``costs``: milliseconds of the phases of a round (`Costs`).
- ``verify``: milliseconds of a forward over n nodes (`Verify`).

A class's `identity` names the fields by which its rows in one run differ. Tables and pictures
can be made from the file alone (`python -m jaxspec report`), and an interrupted run goes on in
it (`resume`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from jaxspec.data.jsonl import numbered_lines
from jaxspec.decoding.stats import DecodeStats

PLAIN = "plain"  # the drafter of plain decoding
PHASES = ("draft", "grow", "verify", "commit")  # of a round


@dataclasses.dataclass(frozen=True)
class Rounds:
    """One decoder on the prompts of one set; lists have one entry per prompt.

    Attributes:
      set, temperature: the prompt set, and the sampling temperature.
      decoder: its name; with `budget` unique per set and temperature.
      drafter, tree, head, dtype: see `contenders.Contender`.
      budget: maximum nodes verified per round, root included.
      how: "walk" (replayed along recorded answers, for tau) or "decode" (timed).
      committed: per prompt, number of rounds that committed 0, 1, 2, … tokens, bonus included.
      nodes: nodes verified in all, roots included, padding excluded.
      tokens: new tokens of the answer.
      seconds: wall-clock time of the answer, prefill included; None for a walk.
      equal: whether the answer equals plain decoding's, token for token; None for a walk.
      prompt_seconds: time of prefill if `seconds` excludes it, else None.
    """

    set: str
    temperature: float
    decoder: str
    drafter: str
    tree: str | None
    head: str
    dtype: str
    budget: int
    how: Literal["walk", "decode"]
    committed: Sequence[Sequence[int]]
    nodes: Sequence[int]
    tokens: Sequence[int]
    seconds: Sequence[float] | None = None
    equal: Sequence[bool] | None = None
    prompt_seconds: Sequence[float] | None = None
    kind: Literal["rounds"] = "rounds"
    identity: ClassVar = ("how", "set", "temperature", "decoder", "budget")

    def histogram(self) -> np.ndarray:
        """[prompts, K]: rounds that committed 0, 1, … K - 1 tokens."""
        width = max(map(len, self.committed))
        return np.array([[*row, *[0] * (width - len(row))] for row in self.committed])

    def rounds(self) -> np.ndarray:
        """Number of rounds, [prompts]."""
        return self.histogram().sum(axis=1)

    def decided(self) -> np.ndarray:
        """Tokens committed, [prompts]; the last round counts in full, as in `DecodeStats`."""
        histogram = self.histogram()
        return histogram @ np.arange(histogram.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """One flat row of a table: labels, and sums over the prompts."""
        labels = ("set", "temperature", "decoder", "drafter", "tree", "head", "dtype", "budget")
        rounds, timed = int(self.rounds().sum()), self.seconds is not None
        seconds = sum(self.seconds) if timed else None
        return {name: getattr(self, name) for name in (*labels, "how")} | {
            "prompts": len(self.nodes),
            "tokens": sum(self.tokens),
            "rounds": rounds,
            "tau": int(self.decided().sum()) / rounds if rounds else 0.0,
            "nodes_per_round": sum(self.nodes) / rounds if rounds else 0.0,
            "seconds": seconds,
            "tokens_per_second": sum(self.tokens) / seconds if timed else None,
            "equal": sum(self.equal) if timed else None,
        }


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How well a decoder's scores predict what the target accepts.

    Attributes:
      bins: [bins, 3], see `metrics.reliability_bins`: drafted nodes, by the drafter's
        probability of their path, and how many were on the target's path.
    """

    set: str
    temperature: float
    decoder: str
    budget: int
    bins: Sequence[Sequence[float]]
    kind: Literal["reliability"] = "reliability"
    identity: ClassVar = ("set", "temperature", "decoder", "budget")


@dataclasses.dataclass(frozen=True)
class Branches:
    """How faithful a drafter's likeliest branch of full depth is to the target.

    Attributes:
      gaps: nats by which the drafter's log-probability of the branch exceeds the target's (at
        temperature 1), at evenly spaced anchors.
    """

    set: str
    temperature: float
    drafter: str
    dtype: str
    gaps: Sequence[float]
    kind: Literal["branches"] = "branches"
    identity: ClassVar = ("set", "temperature", "drafter", "dtype")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Milliseconds of each phase of a round at batch 1, medians.

    Attributes:
      phases: by `PHASES`; grow is None if it cannot be separated from draft.
    """

    decoder: str
    dtype: str
    budget: int
    phases: dict[str, float | None]
    kind: Literal["costs"] = "costs"
    identity: ClassVar = ("decoder", "dtype", "budget")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Milliseconds of one forward of the target over n nodes, logits included, batch 1."""

    dtype: str
    ms: dict[str, float]
    kind: Literal["verify"] = "verify"
    identity: ClassVar = ("dtype",)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings of a run, and the machine."""

    fields: dict[str, Any]
    kind: Literal["setup"] = "setup"
    identity: ClassVar = ()


Row = Rounds | Reliability | Branches | Costs | Verify | RunSettings
KINDS = {cls.kind: cls for cls in Row.__args__}
Key = tuple
Done = Collection[Key]


def key(row: Row) -> Key:
    """The row's kind and identity.

    >>> key(Verify("float32", {"1": 10.0}))
    ('verify', 'float32')
    """
    return (row.kind, *(getattr(row, name) for name in row.identity))


def counts(stats: Sequence[DecodeStats]) -> dict[str, list]:
    """The fields of `Rounds` that follow from decoding's own counts."""
    return {
        "committed": [np.bincount(s.committed, minlength=2).tolist() for s in stats],
        "nodes": [s.nodes for s in stats],
    }


def append(path: Path, row: Row) -> None:
    """Adds a line to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read_rows(path: str | Path, kinds: Mapping[str, type] = KINDS) -> list[Row]:
    """All rows of a file.

    Args: kinds: classes of its rows, by `kind`.

    Raises:
      ValueError: the file cannot be read, or a line is not a row.
    """
    rows = [_parse(path, number, line, kinds) for number, line in numbered_lines(path)]
    if not any(isinstance(row, Rounds) for row in rows):
        raise ValueError(f"{path} has no measurements; run `python -m jaxspec evaluate`")
    return rows


def resume(
    path: Path,
    setup: RunSettings,
    measure: Callable[[Done], Iterable[Row]],
    kinds: Mapping[str, type] = KINDS,
) -> None:
    """Appends the setup and the rows of `measure` that a file does not hold yet, as they come.

    Args:
      measure: yields rows, given the keys of those held, which it may leave out.
      kinds: classes of the rows, by `kind`.

    Raises:
      ValueError: as `held`; the file is then as it was.
    """
    done = held(path, setup, kinds)
    _cut_torn(path)
    for row in itertools.chain([setup], measure(done)):
        if key(row) not in done:
            append(path, row)
            done.add(key(row))


def held(path: Path, setup: RunSettings, kinds: Mapping[str, type] = KINDS) -> set[Key]:
    """Keys of the rows in a file of the same setup; none without a file.

    An incomplete last line, as an interruption leaves it, is ignored.

    Args: kinds: classes of its rows, by `kind`.

    Raises:
      ValueError: the file is another setup's, or no evaluation's. A setup without fingerprints
        of its models, as version 0.1.0 wrote it, is another one.
    """
    if not path.exists() or not path.stat().st_size:
        return set()
    lines = list(numbered_lines(path))
    if _torn(path):
        del lines[-1]
    rows = [_parse(path, number, line, kinds) for number, line in lines]
    found = [row.fields for row in rows if isinstance(row, RunSettings)]
    if not found:
        raise ValueError(
            f"{path} exists already, without the setup of an evaluation; choose another name "
            "or delete it"
        )
    wanted = json.loads(json.dumps(setup.fields))  # a tuple comes back as a list
    for fields in found:
        for name in [*wanted, *fields]:
            if name not in fields or name not in wanted or fields[name] != wanted[name]:
                raise ValueError(
                    f"{path} holds results of another setup: {_change(name, fields, wanted)}; "
                    "choose another name, or give the original options to resume"
                )
    return {key(row) for row in rows}


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What a file says of a field of its setup, and what it is now."""
    if name not in old:
        return (
            f"it does not say {name}, which now is {new[name]!r} (the file is from an earlier "
            "version, or from a run without that option)"
        )
    now = repr(new[name]) if name in new else "not given"
    return f"{name} was {old[name]!r}, now it is {now}"


def _cut_torn(path: Path) -> None:
    if path.exists() and (torn := _torn(path)):
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - len(torn))


def _torn(path: Path) -> bytes:
    """An incomplete last line."""
    last = path.read_bytes().rpartition(b"\n")[2]
    return last if last.strip() else b""


def _parse(path: str | Path, number: int, line: str, kinds: Mapping[str, type]) -> Row:
    try:
        fields = json.loads(line)
        return kinds[fields["kind"]](**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: expected a row written by `python -m jaxspec evaluate`, "
            f"found {line[:60]!r}"
        ) from error
