"""Published drafters, both ways; what an import reads an export writes.

`drafter_config` lists the formats; each has a module of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspec.checkpoints.block_format import DRAFT_TOKENS, TEMPERATURES
from jaxspec.checkpoints.draft_vocabulary import MEMBERS, OFFSETS
from jaxspec.checkpoints.drafter_config import (
    default_format,
    format_of,
    from_json,
    recognise,
    to_json,
)
from jaxspec.checkpoints.drafter_files import (
    DrafterTensors,
    check_repeated,
    check_unused,
    read_weights,
    write_folder,
    written_tensors,
)
from jaxspec.checkpoints.drafter_format import Config
from jaxspec.checkpoints.fuse import check_dtype, check_tensors, expected_shapes
from jaxspec.checkpoints.huggingface import MASK, resolve
from jaxspec.checkpoints.tensors import read_json
from jaxspec.config import TargetConfig, TreeConfig
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.mtp import MtpConfig
from jaxspec.drafters.registry import trained
from jaxspec.drafters.weights import abstract_weights
from jaxspec.models.scaled import by_value
from jaxspec.models.target import Target
from jaxspec.whole_files import replace_text

INTEGERS = (DRAFT_TOKENS, OFFSETS, MEMBERS)  # tensors that are not weights
CHAIN = TreeConfig("chain")
SHIPPED = "shipped"  # name of the drafter in this package, for the catalog's default target


def load_drafter(
    name_or_path: str | Path,
    target: Target,
    tree: TreeConfig = CHAIN,
    dtype=jnp.float32,
) -> LoadedDrafter:
    """Loads a published drafter for a target.

    Args:
      name_or_path: a folder or a hub name, optionally followed by `::subfolder`.
      tree: tree to draft.
      dtype: of its weights in memory.

    Raises:
      ValueError: it is not a drafter of a known format, is damaged, or was made for another
        target.
    """
    dtype, folder = check_dtype(dtype), drafter_folder(name_or_path)
    raw = read_json(folder / "config.json")
    if (folder / MASK).exists():
        raise ValueError(
            f"{folder} holds '{MASK}', a mask embedding of its own, which is not supported; "
            "expected a drafter whose mask is a token of the target"
        )
    format, config = recognise(raw, folder), from_json(raw, folder, target.config)
    tensors = DrafterTensors(folder, INTEGERS, format.todays_name)
    table, repeated = format.parts(config), format.repeated(target.params)
    expected = expected_shapes(table) | {name: x.shape for name, x in repeated.items()}
    tensors.split_fused(expected)
    format.prepare(tensors, config)
    check_tensors(tensors, expected, format.extra)
    check_repeated(tensors, repeated)
    own = format.read_vocabulary(tensors, raw, config, target.params, dtype)
    weights = read_weights(tensors, table, abstract_weights(config, dtype))
    if raw.get(TEMPERATURES) is not None:
        own["temperatures"] = _temperatures(raw[TEMPERATURES], config, folder)
    return trained(config, weights, target.params, tree, **own)


def read_drafter_config(name_or_path: str | Path, target: TargetConfig) -> Config:
    """Only the configuration of a published drafter for a target; errors as `load_drafter`."""
    folder = drafter_folder(name_or_path)
    return from_json(read_json(folder / "config.json"), folder, target)


def save_drafter(
    folder: str | Path,
    loaded: LoadedDrafter,
    format: str | None = None,
    verifier: str | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` as the format's own programs read them.

    Args:
      folder: must not hold a checkpoint yet.
      loaded: a trained drafter; the dtype of its weights is also the file's.
      format: one of `drafter_config.NAMES`; None: a format that can express the configuration.
      verifier: the target's hub name or path from the folder, which speculators' format names.

    Raises:
      ValueError: the format cannot express the drafter, the folder holds a checkpoint, or a
        weight is not finite or absurdly large.
    """
    folder, config, params = Path(folder), loaded.drafter.config, loaded.params
    if isinstance(config, MtpConfig):
        raise ValueError(
            f"{folder} is not written: an MTP layer is part of its target's checkpoint, and no "
            "drafter format can hold it"
        )
    name, vocabulary = format or default_format(config), params.vocabulary
    check_unused(folder)
    codec, dtype = format_of(config, name), np.dtype(params.head.fc.dtype)
    own = codec.vocabulary_tensors(vocabulary, config, dtype)
    own |= {name: np.asarray(by_value(x)) for name, x in codec.repeated(vocabulary).items()}
    kept = None if vocabulary.kept is None else np.asarray(vocabulary.kept)
    size = None if kept is None else len(kept)
    raw = to_json(config, name, str(dtype), kept=size, verifier=verifier)
    temperatures = getattr(params, "temperatures", 1.0)
    if np.any(np.asarray(temperatures) != 1):
        values = np.broadcast_to(temperatures, config.depth)
        raw[TEMPERATURES] = [float(x) for x in values]
    tensors = codec.arranged(written_tensors(params.whole_head, codec.parts(config)), kept)
    for name, array in own.items():
        tensors[name] = array if name in INTEGERS else array.astype(dtype)
    tensors = {codec.written_name(name): array for name, array in tensors.items()}
    write_folder(folder, raw, tensors, INTEGERS)


def save_temperatures(folder: str | Path, temperatures: Sequence[float]) -> None:
    """Writes the confidence head's temperatures into the `config.json` of a drafter's folder.

    Raises:
      ValueError: the folder holds no drafter, or the temperatures do not fit it.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    config = from_json(raw, folder)
    raw[TEMPERATURES] = _temperatures([float(x) for x in temperatures], config, folder)
    replace_text(path, json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _temperatures(found: Any, config: Config, origin: Any) -> list[float]:
    good = (
        isinstance(found, list)
        and len(found) == config.depth
        and all(isinstance(x, (int, float)) and 0 < x < float("inf") for x in found)
    )
    if not good or getattr(config, "confidence", None) is None:
        raise ValueError(
            f"{origin}: '{TEMPERATURES}' is {found!r}; expected {config.depth} positive "
            "numbers and a drafter with a confidence head"
        )
    return found


def drafter_folder(name_or_path: str | Path) -> Path:
    """The folder of a drafter: `shipped`, a path, or a hub name, optionally with `::subfolder`.

    Raises:
      ValueError: it does not exist, or the subfolder leads out of it.
    """
    if name_or_path == SHIPPED:
        return Path(__file__).parents[1] / "shipped" / "smollm2-135m"
    name, separator, inner = str(name_or_path).partition("::")
    path = PurePosixPath(inner)
    if "/" not in name and not Path(name).exists():
        raise ValueError(
            f"there is no drafter {name!r}; expected {SHIPPED}, the folder or hub name of a "
            "trained drafter (name::subfolder too), or one that needs no checkpoint: none, "
            "ngram, mtp, mtp:NAME, small:NAME, python:MODULE:FUNCTION"
        )
    if separator and (path.is_absolute() or ".." in path.parts or not path.parts):
        raise ValueError(
            f"the subfolder in {str(name_or_path)!r} is {inner!r}; expected one inside {name}"
        )
    folder = resolve(name) / path
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected a drafter's checkpoint")
    return folder
