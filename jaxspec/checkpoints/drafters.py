"""Published drafters, both ways; what an import reads an export writes.

`drafter_config` lists the formats of block drafters, `eagle3_config` those of EAGLE-3; each has
a module of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.checkpoints import eagle3, eagle3_config, speculators
from jaxspec.checkpoints.block_format import DRAFT_TOKENS, TEMPERATURES, todays_name
from jaxspec.checkpoints.block_tensors import block_parts
from jaxspec.checkpoints.drafter_config import format_named, from_json, recognise, to_json
from jaxspec.checkpoints.drafter_files import (
    DrafterTensors,
    check_names,
    check_unused,
    equal_as_stored,
    expected_shapes,
    read_weights,
    write_folder,
    written_tensors,
)
from jaxspec.checkpoints.fuse import check_dtype
from jaxspec.checkpoints.huggingface import resolve
from jaxspec.checkpoints.tensors import read_json
from jaxspec.config import DrafterConfig, TargetConfig, TreeConfig
from jaxspec.drafters.block import BlockDrafter, BlockParams, block_params, whole_weights
from jaxspec.drafters.eagle import EagleDrafter, EagleParams
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.weights import abstract_weights
from jaxspec.models.params import TargetParams

INTEGERS = (DRAFT_TOKENS, speculators.OFFSETS, speculators.MEMBERS)
SHIPPED = "shipped"  # name of the drafter in this package, for the catalog's default target


def load_drafter(
    name_or_path: str | Path,
    target_config: TargetConfig,
    target_params: TargetParams,
    tree: TreeConfig,
    dtype=jnp.float32,
) -> tuple[BlockDrafter, BlockParams] | tuple[EagleDrafter, EagleParams]:
    """A published drafter for a target.

    Args:
      name_or_path: a folder or a hub name, either with `::subfolder` after it.
      tree: what it shall draft.
      dtype: of its weights in memory.

    Raises:
      ValueError: it is not a drafter of a known format, is damaged, or was made for another
        target.
    """
    dtype, folder = check_dtype(dtype), drafter_folder(name_or_path)
    raw = read_json(folder / "config.json")
    if eagle3_config.recognise(raw):
        return eagle3.load(folder, raw, target_config, target_params, tree, dtype)
    config = for_target(from_json(raw, folder), target_config, folder)
    format = recognise(raw, folder)
    tensors = DrafterTensors(folder, INTEGERS, todays_name)
    own = format_named(format).read_vocabulary(tensors, config, target_params, dtype)
    weights = _load(tensors, config, format, target_params, dtype)
    temperatures = _temperatures(raw.get(TEMPERATURES), config, folder)
    params = block_params(weights, target_params, temperatures=temperatures, **own)
    return BlockDrafter(config, tree), params


def read_drafter_config(
    name_or_path: str | Path, target: TargetConfig
) -> DrafterConfig | EagleConfig:
    """The configuration alone of a published drafter for a target; errors as `load_drafter`."""
    folder = drafter_folder(name_or_path)
    raw = read_json(folder / "config.json")
    if eagle3_config.recognise(raw):
        return eagle3_config.from_json(raw, folder, target)
    return for_target(from_json(raw, folder), target, folder)


def save_drafter(
    folder: str | Path,
    drafter: BlockDrafter | EagleDrafter,
    params: BlockParams | EagleParams,
    format: str | None = None,
    verifier: str | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` as the original stack reads them.

    Args:
      folder: must not hold a checkpoint yet.
      params: the weights' dtype is the file's.
      format: one of `drafter_config.FORMATS`, or for EAGLE-3 of `eagle3_config.FORMATS`; None
        takes the one that can express the configuration, without the target's vocabulary where
        the format leaves it out.
      verifier: the target's hub name or path from the folder, which speculators' format names.

    Raises:
      ValueError: the format cannot express the configuration, the folder is in use, or a weight
        is no finite number or absurdly large.
    """
    folder, config = Path(folder), drafter.config
    if format is None:
        format = "treeflash" if config.sequential == "mlp" else "dflash"
    check_unused(folder)
    if isinstance(drafter, EagleDrafter):
        return eagle3.save(folder, drafter, params, format, verifier)
    kept, dtype = params.vocabulary.kept, np.dtype(params.head.fc.dtype)
    codec, size = format_named(format), None if kept is None else len(kept)
    beside = {name: np.asarray(x) for name, x in codec.repeated(params.vocabulary).items()}
    if kept is not None:
        beside |= codec.vocabulary_tensors(params.vocabulary, config, dtype)
    raw = to_json(config, format, str(dtype), kept=size, verifier=verifier)
    if np.any(np.asarray(params.temperatures) != 1):
        values = np.broadcast_to(params.temperatures, config.depth)
        raw[TEMPERATURES] = [float(x) for x in values]
    tensors = written_tensors(whole_weights(params), block_parts(config, format))
    for name, array in beside.items():
        tensors[name] = array if name in INTEGERS else array.astype(dtype)
    write_folder(folder, raw, tensors, INTEGERS)


def save_temperatures(folder: str | Path, temperatures: Sequence[float]) -> None:
    """Writes the confidence head's temperatures into the `config.json` of a drafter's folder.

    Raises:
      ValueError: the folder holds no drafter, or one that they do not fit.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    config = from_json(raw, folder)
    raw[TEMPERATURES] = _temperatures([float(x) for x in temperatures], config, folder)
    fresh = path.with_name("config.json.new")
    fresh.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    fresh.replace(path)


def _temperatures(found: Any, config: DrafterConfig, origin: Any) -> Any:
    if found is None:
        return 1.0
    good = (
        isinstance(found, list)
        and len(found) == config.depth
        and all(isinstance(x, (int, float)) and 0 < x < float("inf") for x in found)
    )
    if not good or config.confidence is None:
        raise ValueError(
            f"{origin}: '{TEMPERATURES}' is {found!r}; expected {config.depth} positive "
            "numbers and a drafter with a confidence head"
        )
    return found


def drafter_folder(name_or_path: str | Path) -> Path:
    """The folder of a drafter: `shipped`, `path`, `hub/name`, or one with `::subfolder`.

    Raises:
      ValueError: there is none, or the subfolder leads out of it.
    """
    if name_or_path == SHIPPED:
        return Path(__file__).parents[1] / "shipped" / "smollm2-135m"
    name, separator, inner = str(name_or_path).partition("::")
    path = PurePosixPath(inner)
    if "/" not in name and not Path(name).exists():
        raise ValueError(
            f"there is no drafter {name!r}; expected {SHIPPED}, the folder or hub name of a "
            "trained drafter (name::subfolder too), or one that needs no checkpoint: none, "
            "ngram, small:NAME, python:MODULE:FUNCTION"
        )
    if separator and (path.is_absolute() or ".." in path.parts or not path.parts):
        raise ValueError(
            f"the subfolder in {str(name_or_path)!r} is {inner!r}; expected one inside {name}"
        )
    folder = resolve(name) / path
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected a drafter's checkpoint")
    return folder


def for_target(config: DrafterConfig, target: TargetConfig, origin: Any) -> DrafterConfig:
    """The configuration, which may not name the target's depth, with this target's.

    Raises:
      ValueError: it was made for a target of another shape.
    """
    if config.target_layers is None:
        try:
            config = dataclasses.replace(config, target_layers=target.num_layers)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        if target.num_layers - 1 in config.taps:
            raise ValueError(
                f"{origin}: 'aux_hidden_state_layer_ids' names {target.num_layers}, the last "
                "layer's output before the target's final norm; expected layers before it"
            )
    check_target(config, target, origin)
    return config


def check_target(config: DrafterConfig, target: TargetConfig, origin: Any) -> None:
    """Raises ValueError when a drafter was made for a target of another shape."""
    for name, ours, theirs in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("vocabulary", config.vocab_size, target.vocab_size),
        ("number of target layers", config.target_layers, target.num_layers),
    ):
        if ours != theirs:
            raise ValueError(
                f"{origin}: the drafter's {name} is {ours}, the target's is {theirs}; "
                "use the target that it was trained for"
            )


def _load(
    tensors: DrafterTensors, config: DrafterConfig, format: str, target: TargetParams, dtype
) -> nnx.State:
    table, codec = block_parts(config, format), format_named(format)
    repeated = codec.repeated(target)
    expected = expected_shapes(table) | {name: x.shape for name, x in repeated.items()}
    check_names(tensors, expected, codec.extra)
    for name, array in repeated.items():
        if not equal_as_stored(tensors.read(name), array):
            raise ValueError(
                f"{tensors.origin}: tensor '{name}' is not the target's; the drafter was "
                "trained for other weights than those loaded"
            )
    return read_weights(tensors, table, abstract_weights(config, dtype))
