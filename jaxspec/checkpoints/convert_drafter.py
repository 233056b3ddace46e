"""Converts a drafter's checkpoint to another published format, and lists what is lost."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoints import load, speculators
from jaxspec.checkpoints.block_format import DRAFT_TOKENS, TEMPERATURES
from jaxspec.checkpoints.drafter_config import NAMES, recognise
from jaxspec.checkpoints.drafters import INTEGERS, drafter_folder, load_drafter, save_drafter
from jaxspec.checkpoints.fuse import DTYPES
from jaxspec.checkpoints.quantisation import quantisation_of
from jaxspec.checkpoints.tensors import SafetensorsFolder, read_json
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.whole_files import new_folder

# Information that some formats lack, although no computation depends on it.
SILENT = {
    "steps": "how many tokens to draft: readers take their own default",
    "target_layers": "the number of the target's layers",
}


@dataclasses.dataclass(frozen=True)
class ConvertedDrafter:
    """A drafter that `convert_drafter` wrote, read back and compared.

    Attributes:
      source, format: formats before and after.
      lost: information that the new files lack, or that other programs ignore in them.
    """

    folder: Path
    source: str
    format: str
    lost: tuple[str, ...]


def convert_drafter(
    drafter: str | Path, output: str | Path, *, format: str, target: str | None = None
) -> ConvertedDrafter:
    """Writes a drafter in another format; weights keep their dtype, quantised ones become
    bfloat16.

    The output is read back and compared, and then appears atomically.

    Args:
      drafter: folder or hub name ("repo::subfolder" too).
      output: a new folder.
      format: one of `drafter_config.NAMES`.
      target: the drafter's target, whose embedding and LM head some formats repeat; by default
        the one that the files name.

    Raises:
      ValueError: the drafter or the target cannot be read, the format cannot express the
        drafter, the output exists, or it reads back differently.
    """
    output = Path(output).absolute()
    if output.exists():
        raise ValueError(f"{output} exists; give --output a new folder")
    if format not in NAMES:
        raise ValueError(f"format is {format!r}; expected one of {NAMES}")
    folder = drafter_folder(drafter)
    raw = read_json(folder / "config.json")
    source = recognise(raw, folder).name
    named = speculators.verifier(raw, folder)
    if target is None and named is None:
        raise ValueError(f"{folder} does not name its target; give --target")
    quantisation = quantisation_of(folder)
    dtype = _stored_dtype(folder) if quantisation is None else "bfloat16"
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = load(target or named, dtype)
        before = load_drafter(folder, model, dtype=dtype)
        with new_folder(output) as partial:
            verifier = speculators.verifier_name(target or named, output)
            save_drafter(partial, before, format, verifier)
            after = load_drafter(partial, model, dtype=dtype)
            lost = _lost(before, after, format, read_json(partial / "config.json"))
            if named is not None and format != "speculators":
                lost = (*lost, f"the target's name, {named}")
            if quantisation is not None:
                lost = (*lost, f"{quantisation.name}: weights are written in {dtype}")
    return ConvertedDrafter(output, source, format, lost)


def _stored_dtype(folder: Path) -> str:
    """Dtype of the weights; raises ValueError if there are several."""
    tensors = SafetensorsFolder(folder, integers=INTEGERS)
    floats = sorted({np.dtype(dtype).name for dtype in tensors.dtypes.values()} & {*DTYPES})
    if len(floats) != 1:
        raise ValueError(f"{folder} holds weights of {', '.join(floats)}; expected one dtype")
    return floats[0]


def _lost(
    before: LoadedDrafter, after: LoadedDrafter, format: str, raw: dict[str, Any]
) -> tuple[str, ...]:
    """What the drafter read back lacks, and what other programs will not read.

    Raises:
      ValueError: the drafter read back differs.
    """
    found, fields = [], dataclasses.asdict(before.drafter.config)
    for name, value in dataclasses.asdict(after.drafter.config).items():
        if fields[name] == value:
            continue
        if name not in SILENT:
            raise ValueError(
                f"format {format!r} reads {name} back as {value} instead of {fields[name]}; "
                "choose another format"
            )
        found.append(SILENT[name])
    old, new = before.params, after.params
    outputs = (getattr(x, "whole_output", None) for x in (old, new))
    if not np.array_equal(*outputs):
        found.append("rows of the Markov head for tokens outside of the draft vocabulary")
        drop = functools.partial(dataclasses.replace, whole_output=None)
        old, new = drop(old), drop(new)
    same = jax.tree.map(np.array_equal, old, new)
    if not all(jax.tree.leaves(same)):
        raise ValueError(
            f"format {format!r} reads weights back differently; choose another format"
        )
    if TEMPERATURES in raw:
        found.append("the confidence head's temperatures, which other programs do not read")
    kept = old.vocabulary.kept is not None
    if kept and format in ("dflash", "treeflash"):
        found.append(
            f"the draft vocabulary: other programs do not read '{DRAFT_TOKENS}', and draft "
            "from the target's whole one"
        )
    if format == "speculators" and "num_target_layers" not in raw:
        found.append(SILENT["target_layers"])
    return tuple(dict.fromkeys(found))
