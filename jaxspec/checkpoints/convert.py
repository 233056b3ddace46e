"""Converts a target's weights: safetensors, Orbax, fp8.

A converted folder is the same Hugging Face folder with other weights, so that the same loaders
load it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxspec.checkpoints import huggingface, hybrid, target_path
from jaxspec.checkpoints.fp8 import Fp8Tensors
from jaxspec.checkpoints.fuse import check_dtype
from jaxspec.checkpoints.quantisation import KEYS, MODELOPT, quantisation_of
from jaxspec.checkpoints.store import load_weights, save_weights
from jaxspec.checkpoints.target_weights import target_parts
from jaxspec.checkpoints.tensors import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    read_json,
    write_tensors,
)
from jaxspec.config import TargetConfig
from jaxspec.models.params import TargetParams
from jaxspec.models.scaled import by_value, is_outputs_first
from jaxspec.whole_files import new_folder

FORMATS = ("orbax", "safetensors")
SHARD_BYTES = 4 * 10**9  # of one safetensors file
COMPARED_BYTES = 256 * 10**6  # bytes of a store read back at a time


@dataclasses.dataclass(frozen=True)
class Converted:
    """A checkpoint that `convert` wrote, read back and compared.

    Attributes:
      bytes: bytes of weights.
      arrays: number of arrays compared bit for bit.
      errors: rounding errors of fp8 by layer (`Fp8Tensors`); None for other dtypes.
      left_out: number of tensors that were not written, by what they belong to.
    """

    folder: Path
    dtype: str
    bytes: int
    arrays: int
    errors: dict[str, float] | None = None
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    format: str | None = None,
    dtype: str | None = None,
    fp8_lm_head: bool = False,
) -> Converted:
    """Writes a copy of a checkpoint with its weights as an Orbax store or as safetensors.

    Host memory holds the weights once, or for fp8 one file at a time. The output is written
    atomically. Of a multimodal model only the text model is written, except for fp8, and never
    MTP layers.

    Args:
      source: a Hugging Face folder or hub name, or a converted folder.
      output: a new folder.
      format: one of `FORMATS`; by default orbax, and safetensors for fp8.
      dtype: of the written weights; as stored by default. "fp8": linear layers in 8 bits with
        one scale per 128 x 128 block, everything else as stored.
      fp8_lm_head: the LM head in fp8 too, untied from the embedding.

    Raises:
      ValueError: the source cannot be read, the output exists, or it reads back differently.
    """
    output = Path(output).absolute()
    if output.exists():
        raise ValueError(f"{output} exists; give --output a new folder")
    format = format or ("safetensors" if dtype == "fp8" else "orbax")
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {FORMATS}")
    if fp8_lm_head and dtype != "fp8":
        raise ValueError(f"fp8_lm_head needs dtype 'fp8'; dtype is {dtype!r}")
    folder = target_path(source)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a Hugging Face checkpoint's folder")
    config = huggingface.read_config(folder)
    if dtype == "fp8":
        head = dict(lm_head=fp8_lm_head, tied=config.tie_embeddings)
        return _convert_to_fp8(folder, output, format, **head)
    dtype = check_dtype(dtype or _stored_dtype(folder)).name
    cpu = jax.default_device(jax.local_devices(backend="cpu")[0])
    with cpu, new_folder(output) as partial:
        params = huggingface.load_params(folder, config, dtype)
        _copy_side_files(folder, partial, _text_config(folder, config) | {"dtype": dtype})
        if format == "orbax":
            save_weights(partial / huggingface.WEIGHTS, params)
            written = _stored_arrays(partial / huggingface.WEIGHTS, params)
        else:
            save_safetensors(partial, config, params)
            found = SafetensorsFolder(partial)
            written = ((name, x, found.read(name)) for name, x in _tensors(config, params))
        arrays = len(jax.tree.leaves(params))
        count, size = _compare(tqdm(written, "compare", unit="array", total=arrays), partial)
    return Converted(output, dtype, size, count, left_out=_left_out(folder, config))


def _convert_to_fp8(
    folder: Path, output: Path, format: str, *, lm_head: bool, tied: bool
) -> Converted:
    stored = quantisation_of(folder)
    if stored is not None or (folder / huggingface.WEIGHTS).exists():
        how = stored.name if stored else "an Orbax store"
        raise ValueError(
            f"{folder} is stored as {how}; expected an unquantised checkpoint in safetensors "
            "to make fp8 from (--dtype bfloat16 --to safetensors writes one)"
        )
    if format != "safetensors":
        raise ValueError(f"format is {format!r}; fp8 is written as safetensors")
    source = Fp8Tensors(folder, lm_head=lm_head, tied=tied)
    raw = read_json(folder / "config.json")
    change = {"quantization_config": source.section} | (_untied(raw) if lm_head else {})
    with new_folder(output) as partial:
        _copy_side_files(folder, partial, raw | change)
        _save_shards(partial, source.tensors("write"))
        found = SafetensorsFolder(partial, quantised=True)
        written = ((name, x, found.read(name)) for name, x in source.tensors("compare"))
        count, size = _compare(written, partial)
    return Converted(output, "fp8", size, count, source.errors)


def _text_config(folder: Path, config: TargetConfig) -> dict[str, Any]:
    """`config.json` of the text model by value, without its dtype."""
    raw = read_json(folder / "config.json")
    if raw["model_type"] in hybrid.ARCHITECTURES and raw.get("text_config") is not None:
        raw = hybrid.text_to_json(raw, config)
    return {key: value for key, value in raw.items() if key not in ("torch_dtype", *KEYS)}


def _left_out(folder: Path, config: TargetConfig) -> dict[str, int]:
    if config.delta_net is None or (folder / huggingface.WEIGHTS).exists():
        return {}
    return hybrid.left_out(SafetensorsFolder(folder, quantised=True).shapes)


def _untied(raw: dict[str, Any]) -> dict[str, Any]:
    """Changes to config.json for an LM head untied from the embedding."""
    own = {"tie_word_embeddings": False}
    text = raw.get("text_config")
    return own if text is None else own | {"text_config": text | own}


def _compare(written: Iterable[tuple[str, Any, Any]], folder: Path) -> tuple[int, int]:
    """Compares written arrays bit for bit; returns the number of arrays and of bytes.

    Raises:
      ValueError: an array differs.
    """
    count = size = 0
    for name, expected, found in written:
        if not np.array_equal(_bits(expected), _bits(found)):
            raise ValueError(
                f"'{name}' in {folder} is not what was written; is the disk sound?"
            )
        count, size = count + 1, size + found.nbytes
    return count, size


def _stored_dtype(folder: Path) -> str:
    if (folder / huggingface.WEIGHTS).exists():
        return read_json(folder / "config.json").get("dtype", "")
    quantisation = quantisation_of(folder)
    if quantisation is not None:
        raise ValueError(
            f"{folder} is stored as {quantisation.name}; give the dtype to write (--dtype)"
        )
    dtypes = sorted(map(str, set(SafetensorsFolder(folder).dtypes.values())))
    if len(dtypes) > 1:
        raise ValueError(
            f"{folder} holds tensors of {' and '.join(dtypes)}; say which to write (--dtype)"
        )
    return dtypes[0]


def _copy_side_files(folder: Path, output: Path, raw: dict[str, Any]) -> None:
    """Copies tokenizer and other files beside the weights; writes `raw` as `config.json`."""
    for pattern in huggingface.FILES:
        for path in folder.glob(pattern):
            if path.suffix != ".safetensors" and path.name not in (INDEX, MODELOPT):
                shutil.copyfile(path, output / path.name)
    text = json.dumps(raw, indent=2)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")


def _stored_arrays(store: Path, params: TargetParams) -> Iterator[tuple[str, Any, Any]]:
    """Pairs of arrays in memory and in a store, which is read a group at a time."""
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


def save_safetensors(output: Path, config, params: TargetParams) -> None:
    """Writes unquantised weights as a Hugging Face folder's tensors, in `SHARD_BYTES` files."""
    _save_shards(output, _tensors(config, params))


def _save_shards(output: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes files of at most `SHARD_BYTES`, or of one larger tensor, as the tensors come."""
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush():
        partial = output / f"{len(shards)}.partial"
        write_tensors(partial, shard, metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        (output / f"{i}.partial").rename(output / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(config, params: TargetParams) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the weights by name, one per expert."""
    weights, tree = jax.tree.flatten(params, is_leaf=is_outputs_first)
    table = tree.flatten_up_to(target_parts(config, {}))
    for group, weight in zip(table, weights, strict=True):
        array = np.asarray(by_value(weight))
        for name, parts in itertools.groupby(group, key=lambda part: part.name):
            rows = [part.taken_from(array) for part in parts]
            yield name, np.ascontiguousarray(np.concatenate(rows))


def _bits(array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)
