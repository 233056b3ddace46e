"""Folders of data files, and their splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TypeVar

from jaxspec.data.files import EXPECTED, is_data_file

SAVED = ("state.json", "dataset_dict.json")  # `Dataset.save_to_disk` writes one of them
METADATA = ("dataset_info.json", "dataset_infos.json", "config.json", *SAVED)
SHARD = re.compile(r"(\w[\w.-]*)-\d{5}-of-\d{5}")  # as files on the hub are called
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
T = TypeVar("T")


def data_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder and its subfolders by split, in the order of their paths.

    The split of a file is the name before its shard number, or a split's name in its own or its
    folder's name, else "".

    Raises:
      ValueError: the folder has no data files, or a Python program among them.
    """
    refuse_programs(folder)
    splits = defaultdict(list)
    for path in _files(folder):
        if is_data_file(path) and path.name not in METADATA:
            splits[split_of(path.relative_to(folder))].append(path)
    if not splits:
        raise ValueError(f"{folder} holds no data files; {EXPECTED}")
    return dict(splits)


def refuse_programs(folder: Path) -> None:
    """Raises ValueError if a folder holds Python code, such as a dataset's loading script."""
    for path in _files(folder):
        if path.suffix == ".py":
            raise ValueError(
                f"{folder} holds a program, {path.relative_to(folder)}; datasets that need "
                "code to be read are refused: convert it to parquet or JSON lines, or name "
                "its data files"
            )


def split_of(path: PurePath) -> str:
    """The split that a path within a dataset names, or "".

    >>> split_of(PurePath("data/train_sft-00000-of-00003.parquet"))
    'train_sft'
    >>> split_of(PurePath("dev/part-1.jsonl.gz"))
    'validation'
    """
    if shard := SHARD.match(path.name):
        return shard[1]
    words = (word for part in reversed(path.parts) for word in re.split(r"[\W_\d]+", part))
    return next((SPLIT_WORDS[x] for x in words if x in SPLIT_WORDS), "")


def choose_split(splits: Mapping[str, T], wanted: str | None, source: str) -> tuple[str, T]:
    """A split by name; by default the only one.

    Args:
      source: name of the source for errors, ending in "::" or "::SUBSET/", so that a split's
        name can follow.

    Raises:
      ValueError: there is no such split, or there are several and none is named.
    """
    if wanted is None and len(splits) == 1:
        return next(iter(splits.items()))
    if wanted in splits:
        return wanted, splits[wanted]
    names = ", ".join(name or "files that name none" for name in splits)
    example = next((name for name in splits if name), "")
    if wanted is None:
        raise ValueError(
            f"{source.rstrip(':')} has several splits ({names}); name one: {source}{example}"
        )
    raise ValueError(f"{source}{wanted} is not a split; found {names}")


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(x.startswith(".") for x in path.relative_to(folder).parts)
    )
