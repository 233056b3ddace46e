"""The folder of a training run: its settings, and the checks before it is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from jaxspec.checkpoints.tensors import read_json
from jaxspec.data.conversations import Example
from jaxspec.data.identity import fingerprint, same_model
from jaxspec.models.target import Target
from jaxspec.training.recipe import TrainConfig
from jaxspec.whole_files import replace_text

CONFIG, FLAGS, METRICS, DRAFTER = "config.json", "run.toml", "metrics.jsonl", "drafter"
FREE = ("validate_every", "checkpoint_every", "keep")  # settings without effect on weights
READ = ("dtype", "features_dtype", "validation")  # where an older file lacks them, not compared


def described(
    config: TrainConfig,
    target: Target,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]] = (),
    features_dtype: str | None = None,
) -> dict[str, Any]:
    """What `config.json` says of a run: its settings, its target, and hashes of its data.

    Args:
      prompts: of the validation, token ids.
      features_dtype: of cached features; the target's if there are none.
    """
    dtype = str(target.params.embed.dtype)
    asked = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return {
        "target": target.name,
        "fingerprint": fingerprint(target),
        "data": data_hash(examples),
        "sequences": len(examples),
        "dtype": dtype,
        "features_dtype": features_dtype or dtype,
        "validation": asked if prompts else None,
        **json.loads(json.dumps(dataclasses.asdict(config))),
    }


def check_begun(folder: Path, resume_step: int | None) -> None:
    """Raises ValueError if a step to resume from is given, and no run has begun here."""
    if resume_step is not None and not (folder / CONFIG).exists():
        raise ValueError(
            f"resume_step is {resume_step}, but no run has begun in {folder}; leave it out to "
            "begin one, or give the folder of the run to resume"
        )


def check_run(folder: Path, run: Mapping[str, Any], resume_step: int | None = None) -> bool:
    """Checks a run against the one that was begun in the folder.

    It may differ in `FREE` settings, have more steps, the first prompts for validation, and, if
    `resume_step` is given, another optimizer.

    Args:
      run: from `described`.

    Returns:
      Whether the run is finished, so that nothing is left to train.

    Raises:
      ValueError: the folder holds a run with other settings, of another target, or on other
        data.
    """
    old = read_json(folder / CONFIG)
    _check_identity(folder, old, run)
    _check_settings(folder, old, run, resume_step)
    drafted = (folder / DRAFTER).exists()
    return drafted and resume_step is None and old["steps"] == run["steps"]


def enter(folder: Path, run: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> None:
    """Writes a run's settings and flags; keeps an earlier drafter as `drafter-STEPS`.

    Args:
      run: from `described`.
      flags: see `write_flags`.
    """
    path = folder / CONFIG
    if (folder / DRAFTER).exists():
        (folder / DRAFTER).rename(_free_name(folder, read_json(path)["steps"]))
    replace_text(path, json.dumps(run, indent=2) + "\n")
    if flags is not None:
        write_flags(folder, flags)


def write_flags(folder: Path, flags: Mapping[str, Any]) -> None:
    """Writes the flags of the command that trains; `train --config` reads them."""
    replace_text(folder / FLAGS, tomli_w.dumps(flags))


def data_hash(examples: Sequence[Example]) -> str:
    """A hash of all sequences' tokens, and of which ones the target wrote."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(example.tokens, "<i4"))
        digest.update(np.packbits(example.supervised))
    return digest.hexdigest()[:16]


def _check_identity(folder: Path, old: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks the target and data of a run; fields that an older file lacks are not checked."""
    if not same_model(old, now["target"], now["fingerprint"]):
        raise ValueError(
            f"{folder} holds a run of another target, {old.get('target')!r} (now "
            f"{now['target']!r}, with other weights); train in a new folder"
        )
    if old.get("data", now["data"]) != now["data"]:
        raise ValueError(
            f"{folder} holds a run on other data, {old['sequences']} sequences (now "
            f"{now['sequences']}; files, --max-length or --min-supervised differ); give the "
            f"original data, or train in a new folder: --initial {folder / DRAFTER} starts "
            "from the drafter of a finished run"
        )


def _check_settings(
    folder: Path, old: Mapping[str, Any], now: Mapping[str, Any], resume_step: int | None
) -> None:
    """A setting that an older file lacks is taken to have its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    different = [
        name
        for name in defaults
        if old.get(name, defaults[name]) != now[name] and name not in FREE
    ]
    different += [name for name in READ if old.get(name) not in (None, now[name])]
    if "steps" in different and now["steps"] > old["steps"]:
        different.remove("steps")
    if "optimizer" in different and resume_step is not None:
        different.remove("optimizer")
    if different:
        remedy = "train in a new folder or use the same settings"
        if different == ["optimizer"]:
            remedy += ", or give the checkpoint to resume from with --resume-step"
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(different)} differ); "
            + remedy
        )


def _free_name(folder: Path, steps: int) -> Path:
    names = (f"{DRAFTER}-{steps}" + (f"-{i}" if i else "") for i in range(10**6))
    return next(folder / name for name in names if not (folder / name).exists())
