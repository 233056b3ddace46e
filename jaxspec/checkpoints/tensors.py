"""Tensors of a safetensors folder by name; every file is checked before one is used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
PIECE = 32 * 2**20  # bytes read at once
ADAPTER = "adapter_config.json"
WRAPPERS = {  # prefixes of names, and who gives them
    "module.": "torch's DataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT",
    "language_model.": "a multimodal model",
    "model.language_model.": "a multimodal model",
}
INTEGERS = {"I32": np.int32, "I64": np.int64, "BOOL": np.bool_}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Box = tuple[tuple[int, int], ...]  # first and one past the last, per axis
QUANTISED = {  # what parts of quantised weights are stored as, beside the above
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I8": np.int8,
} | INTEGERS


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file, its values from byte `offset` on."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class SafetensorsFolder:
    """The tensors of `model.safetensors`, of the shards its index names, or of the only file.

    A wrapper's prefix (`WRAPPERS`) that all names share is removed.

    Attributes:
      origin: the folder, for messages.
      shapes, dtypes: of every tensor, as stored.
      bytes_read: bytes of tensors read so far.

    Raises:
      ValueError: there are no safetensors; a file is missing, damaged, or outside the folder;
        two files hold tensors of the same name; or a tensor is not of a float type.
    """

    def __init__(
        self, folder: Path, *, integers: Collection[str] = (), quantised: bool = False
    ):
        """
        Args:
          integers: tensors that are integers or booleans, by the last part of their names.
          quantised: also allow the dtypes of quantised weights.
        """
        self.origin = str(folder)
        known = DTYPES | QUANTISED if quantised else DTYPES
        self._entries = _unwrapped(_entries(folder, integers, known))
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}
        self.bytes_read = 0

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """A whole tensor, as a new array; or a range of its rows, seen as a matrix [-1, n]."""
        shape = self.shapes[name]
        if rows is None:
            return self._read(name, shape, whole(shape))
        *leading, columns = shape
        return self._read(name, (math.prod(leading), columns), (rows, (0, columns)))

    def pieces(
        self, name: str, shape: tuple[int, ...], box: Box, skip: int = 0
    ) -> Iterator[tuple[Box, np.ndarray]]:
        """Boxes of some rows, `PIECE` bytes or one row each, that cover `box`, with values.

        Only the bytes of the box are read.

        Args:
          shape: shape to view the tensor's values as.
          box: in an array of `shape`.
          skip: number of the tensor's values before the view.
        """
        if not shape:
            yield (), self._read(name, (), (), skip)
            return
        (start, stop), *rest = box
        row = math.prod(b - a for a, b in rest) * self._entries[name].dtype.itemsize
        step = max(1, PIECE // max(row, 1))
        for first in range(start, stop, step):
            piece = ((first, min(first + step, stop)), *rest)
            yield piece, self._read(name, shape, piece, skip)

    def _read(self, name: str, shape, box, skip: int = 0) -> np.ndarray:
        """Reads from the file rather than a memory map, whose pages count as used memory while
        it is open."""
        entry = self._entries[name]
        extent = [stop - start for start, stop in box]
        values = np.empty(extent, entry.dtype)
        # Axes from `inner` on are read whole, so that runs of bytes are as long as possible.
        inner = len(shape)
        while inner and extent[inner - 1] == shape[inner - 1]:
            inner -= 1
        outer = max(inner - 1, 0)
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        corner = skip + sum(
            start * stride for (start, _), stride in zip(box, strides, strict=True)
        )
        buffer = memoryview(values.reshape(-1).view(np.uint8))
        run = math.prod(extent[outer:]) * entry.dtype.itemsize
        with open(entry.file, "rb", buffering=0) as stream:
            for i, at in enumerate(np.ndindex(*extent[:outer])):
                skipped = sum(a * stride for a, stride in zip(at, strides, strict=False))
                stream.seek(entry.offset + (corner + skipped) * entry.dtype.itemsize)
                self._fill(stream, buffer[i * run : (i + 1) * run], name)
        self.bytes_read += values.nbytes
        return values

    def _fill(self, stream, buffer: memoryview, name: str) -> None:
        while len(buffer):
            count = stream.readinto(buffer)
            if not count:
                raise ValueError(
                    f"{self.origin}: tensor '{name}' ended early while it was read; the file "
                    "was changed after it was opened, load it again"
                )
            buffer = buffer[count:]


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole array."""
    return tuple((0, n) for n in shape)


def cut(array: np.ndarray, shape: tuple[int, ...], box: Box, skip: int = 0) -> np.ndarray:
    """A box of an array that is viewed as `shape` after its first `skip` values."""
    seen = array.reshape(-1)[skip : skip + math.prod(shape)].reshape(shape)
    return seen[tuple(slice(*ends) for ends in box)]


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata=None) -> None:
    """Writes a safetensors file.

    Raises:
      OSError: it cannot be written, as on a full disk.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      ValueError: the file does not exist or does not hold a JSON object.
    """
    text = None
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        value = parse_json(text)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; {_other(path.parent)}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        if text is not None and not text.strip():
            raise ValueError(f"{path} is empty; download it again") from None
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _other(folder: Path) -> str:
    """Explains a folder that is not a checkpoint."""
    if (folder / ADAPTER).exists():
        with contextlib.suppress(ValueError):
            base = read_json(folder / ADAPTER).get("base_model_name_or_path")
            return (
                f"it holds a PEFT adapter of {base!r}, not a model; merge the two (peft's "
                "merge_and_unload, then save_pretrained) and pass the result"
            )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f"its folders have ({', '.join(inner)}): pass one of them"
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        return f"it holds GGUF files ({', '.join(files)}): pass the path of one of them"
    return "expected a Hugging Face checkpoint folder"


def parse_json(text: str | bytes):
    """`json.loads` that refuses objects with a repeated key."""

    def once(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"it names {key!r} twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=once)


def _entries(
    folder: Path, integers: Collection[str], floats: Mapping[str, Any]
) -> dict[str, Entry]:
    if not (folder / INDEX).exists():
        return read_header(_inside(folder, _single(folder)), integers, floats)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ValueError(f"{folder / INDEX} has no 'weight_map' from tensors to files")
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise ValueError(
            f"{folder} has {SINGLE} and {INDEX}, which names other files: it holds two saves; "
            "remove the one that is not wanted"
        )
    files = {name: _inside(folder, name) for name in sorted(set(weight_map.values()))}
    entries: dict[str, Entry] = {}
    for file in files.values():
        for name, entry in read_header(file, integers, floats).items():
            if name in entries:
                raise ValueError(
                    f"tensor '{name}' is in {entries[name].file.name} and again in "
                    f"{file.name} of {folder}; expected it once: the shards are from two saves"
                )
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != files[file]:
            raise ValueError(
                f"{folder / INDEX} says that tensor '{name}' is in {file}, which lacks it; the "
                "index and the shards are from two saves"
            )
    return entries


def _single(folder: Path) -> str:
    """`model.safetensors`, or the only file of another name; a shard needs its index."""
    if (folder / SINGLE).exists():
        return SINGLE
    names = [path.name for path in folder.glob("*.safetensors")]
    if len(names) != 1 or SHARD.fullmatch(names[0]):
        raise ValueError(_no_weights(folder))
    return names[0]


def _unwrapped(entries: dict[str, Entry]) -> dict[str, Entry]:
    for prefix in WRAPPERS:
        if prefix.startswith("model."):  # of the decoder's own names, beside `lm_head`
            continue
        if entries and all(name.startswith(prefix) for name in entries):
            return _unwrapped({name[len(prefix) :]: x for name, x in entries.items()})
    return entries


def _inside(folder: Path, name: str) -> Path:
    """The file of this name in the folder; names and links that lead outside are refused."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{folder / INDEX} names the file '{name}'; expected one inside {folder}"
        )
    try:
        root, target = folder.resolve(), (folder / name).resolve()
        found = target.is_file()
    except (OSError, ValueError, RuntimeError):  # an impossible name, or a link to itself
        root, target, found = folder, folder, False
    if not any(target.is_relative_to(place) for place in _places(root)):
        raise ValueError(f"{folder / name} is a link to {target}, outside the folder; copy it")
    if not found:
        raise ValueError(
            f"{folder} has no file '{name}', which its index names; download it again"
        )
    return folder / name


def _places(root: Path) -> list[Path]:
    """Folders that links in a folder, given by its real path, may lead to.

    A snapshot in the Hugging Face cache, or a folder in one, has links to `blobs`, beside
    `snapshots` or shared by the whole cache; folders elsewhere may link to that cache too.
    """
    from huggingface_hub import constants

    places = [root, Path(constants.HF_HUB_CACHE).expanduser().resolve()]
    for snapshot in (root, *root.parents):
        if snapshot.parent.name == "snapshots":
            repository = snapshot.parent.parent
            places += [snapshot, repository / "blobs", repository.parent / "blobs"]
    return places


def read_header(
    file: Path, integers: Collection[str] = (), floats: Mapping[str, Any] = DTYPES
) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Args:
      integers: see `SafetensorsFolder`.
      floats: dtypes that the other tensors may have, by their name in the file.

    Raises:
      ValueError: the file is missing or damaged, or a tensor has another dtype.
    """
    try:
        with safe_open(file, "numpy"):  # checks lengths and offsets against the file
            pass
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        integer = name.rpartition(".")[2] in integers
        known = INTEGERS if integer else floats
        if info["dtype"] not in known:
            raise ValueError(
                f"{file}: tensor '{name}' is stored as {info['dtype']}; expected "
                + ", ".join(known)
                + ("" if integer else _of_integers(name))
            )
        dtype, start = np.dtype(known[info["dtype"]]), info["data_offsets"][0]
        entries[name] = Entry(file, 8 + size + start, dtype, tuple(info["shape"]))
    return entries


def _of_integers(name: str) -> str:
    if name.rpartition(".")[2] in ("d2t", "t2d"):
        return ": it maps a reduced draft vocabulary, which this kind of drafter does not have"
    return ": use the unquantised checkpoint"


def _no_weights(folder: Path) -> str:
    return pickled_only(folder, (path.name for path in folder.glob("*"))) or (
        f"{folder} has no weights; expected {SINGLE} or {INDEX} with its shards"
    )


def pickled_only(place: Any, names: Iterable[str]) -> str | None:
    """What to say of files without safetensors, given their names, if some are pickled."""
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if not pickled:
        return None
    return (
        f"{place} holds pickled weights only ({pickled[0]}), which can run code when "
        "loaded and are not read; convert them to safetensors (load the model with "
        "transformers and save_pretrained)"
    )
