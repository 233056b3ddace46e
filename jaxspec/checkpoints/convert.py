"""Checkpoints of a target from one kind of weights to the other: safetensors and Orbax.

A converted folder is the same Hugging Face folder with other weights in it, so that whatever
loads the one loads the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxspec.checkpoints import huggingface, target_path
from jaxspec.checkpoints.fuse import Part, target_parts
from jaxspec.checkpoints.quantised import KEYS, MODELOPT, quantisation_of
from jaxspec.checkpoints.store import load_weights, save_weights
from jaxspec.checkpoints.tensors import INDEX, SINGLE, SafetensorsFolder, read_json
from jaxspec.models.params import TargetParams

FORMATS = ("orbax", "safetensors")
SHARD_BYTES = 4 * 10**9  # of one safetensors file
COMPARED_BYTES = 256 * 10**6  # of a store, read back at a time
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote, every bit of it read back and compared.

    Attributes:
      bytes: of weights.
      arrays: compared, bit for bit.
    """

    folder: Path
    dtype: str
    bytes: int
    arrays: int


def convert(
    source: str | Path, output: str | Path, *, format: str = "orbax", dtype: str | None = None
) -> Converted:
    """Writes a checkpoint again with its weights as an Orbax store, or as safetensors.

    The weights are held in the host's memory once. The output appears whole or not at all.

    Args:
      source: a Hugging Face folder or hub name, or a folder that was converted before.
      output: a new folder.
      format: one of `FORMATS`.
      dtype: of the weights written; as stored by default.

    Raises:
      ValueError: the source cannot be read, the output exists, or what was written reads back
        otherwise.
    """
    output = Path(output).absolute()
    if output.exists():
        raise ValueError(f"{output} exists; give --output a new folder")
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {FORMATS}")
    folder = target_path(source)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a Hugging Face checkpoint's folder")
    config = huggingface.read_config(folder)
    dtype = dtype or _stored_dtype(folder)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = huggingface.load_params(folder, config, dtype)
        partial = output.with_name(output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _copy_side_files(folder, partial, dtype)
        if format == "orbax":
            save_weights(partial / huggingface.WEIGHTS, params)
            written = _stored_arrays(partial / huggingface.WEIGHTS, params)
        else:
            _save_safetensors(partial, config, params)
            written = _stored_tensors(partial, config, params)
        count = 0
        arrays = len(jax.tree.leaves(params))
        for name, expected, found in tqdm(written, desc="compare", unit="array", total=arrays):
            if not np.array_equal(_bits(expected), _bits(found)):
                raise ValueError(
                    f"'{name}' in {partial} is not what was written; is the disk sound?"
                )
            count += 1
    partial.rename(output)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    return Converted(output, str(np.dtype(DTYPES[dtype])), size, count)


def _stored_dtype(folder: Path) -> str:
    if (folder / huggingface.WEIGHTS).exists():
        return read_json(folder / "config.json").get("dtype", "")
    quantisation = quantisation_of(folder)
    if quantisation is not None:
        raise ValueError(
            f"{folder} is stored as {quantisation.name}; say what to write its weights as "
            "(--dtype)"
        )
    dtypes = sorted(map(str, set(SafetensorsFolder(folder).dtypes.values())))
    if len(dtypes) > 1:
        raise ValueError(
            f"{folder} holds tensors of {' and '.join(dtypes)}; say which to write (--dtype)"
        )
    return dtypes[0]


def _copy_side_files(folder: Path, output: Path, dtype: str) -> None:
    for pattern in huggingface.FILES:
        for path in folder.glob(pattern):
            if path.suffix != ".safetensors" and path.name not in (INDEX, MODELOPT):
                shutil.copyfile(path, output / path.name)
    raw = read_json(folder / "config.json")
    for key in ("torch_dtype", *KEYS):  # what is written is neither
        raw.pop(key, None)
    text = json.dumps(raw | {"dtype": dtype}, indent=2)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")


def _stored_arrays(store: Path, params: TargetParams) -> Iterator[tuple[str, Any, Any]]:
    """Arrays in memory beside those of a store, of which only a group is held at a time."""
    groups: list[list] = [[]]
    for path, array in jax.tree.leaves_with_path(params):
        if sum(x.nbytes for _, x in groups[-1]) + array.nbytes > COMPARED_BYTES and groups[-1]:
            groups.append([])
        groups[-1].append((path, array))
    for group in groups:
        chosen = {path for path, _ in group}
        only = jax.tree.map_with_path(lambda p, x, c=chosen: x if p in c else None, params)
        found = jax.tree.leaves(load_weights(store, only))
        for (path, array), other in zip(group, found, strict=True):
            yield jax.tree_util.keystr(path), array, other


def _save_safetensors(output: Path, config, params: TargetParams) -> None:
    shards: list[list[tuple[list[Part], jax.Array]]] = [[]]
    size = total = 0
    for parts, array in _parts(config, params):
        count = sum(part.size for part in parts) * array.dtype.itemsize
        if size and size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((parts, array))
        size, total = size + count, total + count
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {parts[0].name: _tensor(parts, array) for parts, array in shard}
        save_file(tensors, output / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored_tensors(output: Path, config, params) -> Iterator[tuple[str, Any, Any]]:
    tensors = SafetensorsFolder(output)
    for parts, array in _parts(config, params):
        name = parts[0].name
        yield name, _tensor(parts, array), tensors.read(name)


def _parts(config, params: TargetParams) -> Iterator[tuple[list[Part], jax.Array]]:
    """Every tensor that makes up the weights, one expert each: its parts in the order of its
    rows, and the array they are in."""
    table = target_parts(config, {})
    parts = jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, tuple) and _all_parts(x))
    for group, array in zip(parts, jax.tree.leaves(params), strict=True):
        for _, parts in itertools.groupby(group, key=lambda part: part.name):
            yield list(parts), array


def _all_parts(x: tuple) -> bool:
    return bool(x) and all(isinstance(part, Part) for part in x)


def _tensor(parts: list[Part], array: jax.Array) -> np.ndarray:
    def own(part: Part) -> np.ndarray:
        values = np.asarray(array)[part.index].transpose(part.axes).reshape(part.own_shape)
        return values - part.offset if part.offset else values

    return np.ascontiguousarray(np.concatenate([own(part) for part in parts]))


def _bits(array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)
