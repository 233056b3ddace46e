"""A whole evaluation: every contender on every prompt set, with tau, speed and costs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxspec.arguments import integer, sequence
from jaxspec.data.identity import fingerprint
from jaxspec.data.prompts import spread
from jaxspec.decoding.requests import check_positions
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.evaluation import measure
from jaxspec.evaluation.contenders import Contender, Entry, entry_of, load_entries
from jaxspec.evaluation.report import markdown
from jaxspec.evaluation.results import Done, Rounds, Row, RunSettings, append
from jaxspec.evaluation.view import View
from jaxspec.loading import as_drafter, load_target
from jaxspec.models.target import Target
from jaxspec.prompts import Prompt, as_token_ids
from jaxspec.settings import on_devices_of_target


def measurements(
    entries: Sequence[Entry],
    sets: measure.Sets,
    *,
    samplings: Sequence[Sampling] = (Sampling(),),
    budgets: Sequence[int] = (),
    max_new_tokens: int = 256,
    batch_size: int = 8,
    timed: int | None = None,
    plain_dtypes: Sequence[str] = (),
    weights: str = "dequantised",
    done: Done = (),
) -> Iterator[Row]:
    """The rows of an evaluation, tau first.

    Args:
      sets: prompts as token ids.
      samplings: how answers are chosen; rows have their temperatures.
      timed: prompts per set to time; all if None, none if 0.
      plain_dtypes: further dtypes to time plain decoding in; their targets are loaded by the
        first one's name.
      weights: how to hold these targets' weights, see `load_target`.
      done: keys of known rows (`results.key`), which are left out.
    """
    for sampling in samplings:
        yield from measure.tau(
            entries,
            sets,
            sampling=sampling,
            budgets=budgets,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            done=done,
        )
    if timed == 0:
        return
    chosen = {name: spread(rows, timed or 0) for name, rows in sets.items()}
    known = {entry.contender.dtype for entry in entries}
    plain = {
        dtype: load_target(entries[0].target.name, dtype=dtype, weights=weights)
        for dtype in plain_dtypes
        if dtype not in known
    }
    for sampling in samplings:
        yield from measure.speed(
            entries,
            chosen,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            plain_targets=plain,
            done=done,
        )
    yield from measure.costs(entries, done=done)


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """The results of an evaluation.

    Attributes:
      rows: as `python -m jaxspec evaluate` writes them, see `evaluation.results`.
    """

    rows: tuple[Row, ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        """A row per decoder, set, temperature and budget: `pandas.DataFrame(x.to_dicts())`."""
        return [row.to_dict() for row in self.rows if isinstance(row, Rounds)]

    def save(self, path: str | Path) -> None:
        """Writes a new file of JSON lines, which `python -m jaxspec report` draws.

        Its folder is made where it is missing.

        Raises:
          ValueError: the file exists.
        """
        path = Path(path)
        if path.exists():
            raise ValueError(f"{path} exists already; choose another name or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        for row in self.rows:
            append(path, row)

    def __repr__(self) -> str:
        return markdown(View(self.rows))

    _repr_markdown_ = __repr__  # what notebooks show


@on_devices_of_target
def evaluate(
    target: Target | str,
    decoders: Mapping[str, str | LoadedDrafter],
    prompts: Sequence[Prompt] | Mapping[str, Sequence[Prompt]],
    *,
    max_new_tokens: int = 256,
    temperatures: Sequence[float] = (0.0,),
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    budgets: Sequence[int] = (),
    timed: int | None = None,
    plain_dtypes: Sequence[str] = (),
    batch_size: int = 8,
    raw: bool = False,
    thinking: bool | None = None,
) -> Evaluation:
    """Compares decoders on prompts, as `python -m jaxspec evaluate` does.

    Args:
      target: loaded, or a name; a name is loaded in every dtype that the decoders ask for,
        float32 by default.
      decoders: by name, a decoder as after NAME= on the command line
        ("shipped+ngram,tree=path_conditioned,budget=16"; see `Contender.parse` for defaults),
        or a loaded drafter, whose whole tree is verified. With a loaded target, all have its
        dtype.
      prompts: of one set, or of several by name; as for `jaxspec.generate`.
      temperatures: 0 is greedy.
      top_k, top_p, min_p: filters of sampled answers, see `Sampling`.
      budgets: further budgets to measure tau for; 1 is plain decoding.
      timed: prompts per set to time; all if None; 0 measures only tau.
      plain_dtypes: further dtypes to time plain decoding in.
      batch_size: answers recorded and replayed together; timed decoding runs one at a time.

    Raises:
      ValueError: a decoder cannot be loaded or does not fit, a prompt cannot be used, or an
        option is out of range.

    >>> found = jaxspec.evaluate(target, {"lookup": "ngram"}, ["Hi!"])      # doctest: +SKIP
    >>> pandas.DataFrame(found.to_dicts())                                 # doctest: +SKIP
    """
    if not decoders or not prompts:
        raise ValueError("nothing to compare: give at least one decoder and one prompt")
    max_new_tokens = integer("max_new_tokens", max_new_tokens, low=2)
    batch_size = integer("batch_size", batch_size, low=1)
    budgets = [integer("budgets", budget, low=1) for budget in sequence("budgets", budgets)]
    timed = None if timed is None else integer("timed", timed, low=0)
    plain_dtypes = sequence("plain_dtypes", plain_dtypes)
    temperatures = sequence("temperatures", temperatures)
    filters = dict(top_k=top_k, top_p=top_p, min_p=min_p)
    samplings = [Sampling(temperature=t, **filters) for t in temperatures]
    entries = _entries(target, decoders)
    one_set = not isinstance(prompts, Mapping)
    sets = {
        name: as_token_ids(entries[0].target, own, raw=raw, thinking=thinking)
        for name, own in ({"prompts": prompts} if one_set else prompts).items()
    }
    spare = measure.spare_tokens(entries, budgets)
    for rows in sets.values():
        for row in rows:
            check_positions(entries[0].target.config, len(row), max_new_tokens, spare)
    setup = run_settings(
        entries, sets, filters, decoders=list(decoders), max_new_tokens=max_new_tokens
    )
    rows = measurements(
        entries,
        sets,
        samplings=samplings,
        budgets=budgets,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        timed=timed,
        plain_dtypes=plain_dtypes,
    )
    return Evaluation((setup, *rows))


def run_settings(
    entries: Sequence[Entry],
    sets: measure.Sets,
    filters: Mapping[str, float],
    *,
    decoders: Sequence[str],
    **options,
) -> RunSettings:
    """The settings of a run: its options, and what tells its models and machine from others.

    Args:
      filters: of sampling; they are left out where all are off.
      decoders: the entries as the user gave them.
    """
    off, drafters = Sampling(), {entry.contender.drafter: entry.drafter for entry in entries}
    filtered = any(x != getattr(off, name) for name, x in filters.items())
    return RunSettings(
        {
            "target": entries[0].target.name,
            "decoders": decoders,
            "fingerprint": fingerprint(entries[0].target),
            "drafter_fingerprints": {name: fingerprint(x) for name, x in drafters.items()},
            "prompts": {name: len(rows) for name, rows in sets.items()},
            **options,
            **(filters if filtered else {}),
            **machine(),
        }
    )


def machine() -> dict[str, Any]:
    """The machine and versions that results depend on, besides the settings."""
    import jaxspec

    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jaxspec": jaxspec.__version__,
        "jax": jax.__version__,
    }


def _entries(target: Target | str, decoders: Mapping[str, str | LoadedDrafter]) -> list[Entry]:
    if not isinstance(decoders, Mapping):
        raise ValueError(
            f"decoders is {decoders!r}; expected decoders by name: {{'lookup': 'ngram'}}"
        )
    loaded = isinstance(target, Target)
    dtype = str(target.params.embed.dtype) if loaded else "float32"
    if not loaded and not all(isinstance(x, str) for x in decoders.values()):
        raise ValueError(
            f"target is the name {target!r}, but a drafter is loaded already; give its loaded "
            "target"
        )
    named = {
        name: Contender.parse(f"{name}={text}", dtype=dtype)
        for name, text in decoders.items()
        if isinstance(text, str)
    }
    found = {entry.contender.name: entry for entry in load_entries(target, named.values())}
    return [
        found[name] if name in found else entry_of(name, target, as_drafter(target, drafter))
        for name, drafter in decoders.items()
    ]
