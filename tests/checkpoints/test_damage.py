"""Damaged checkpoints: one clear error each, whatever the bytes, and nothing read outside."""

import codecs
import json
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from jaxspec import checkpoints
from jaxspec.checkpoints.tensors import INDEX, SINGLE, SafetensorsFolder
from tests.checkpoints.writing import DENSE, random_tensors, write_folder, write_index

TENSORS = random_tensors(DENSE)


def header_of(tensors: dict[str, np.ndarray]) -> dict:
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = dict(dtype="F32", shape=list(x.shape), data_offsets=[at, at + x.nbytes])
        at += x.nbytes
    return header


def write_raw(path: Path, header: str | bytes, data: bytes, size: int | None = None) -> None:
    header = header.encode() if isinstance(header, str) else header
    size = len(header) if size is None else size
    path.write_bytes(struct.pack("<Q", size) + header + data)


SMALL = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
SMALL_DATA = b"".join(x.tobytes() for x in SMALL.values())


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
            '"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
            "not a whole .* `a`",
        ),
        (
            '{"__metadata__": {}, "__metadata__": {}, '
            '"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
            "not a whole .*__metadata__' twice|not a whole .*duplicate",
        ),
        ('{"a": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}', "stored as I32"),
        ('{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}', "not a whole"),
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}}', "not a whole"),
        ('{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}', "not a whole"),
        ('{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}', "not a whole"),
        ("[" * 100_000, "not a whole"),
        ("{}", "not a whole"),
    ],
)
def test_damaged_header(tmp_path, text, message):
    write_raw(tmp_path / SINGLE, text, bytes(16))
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.nan, "NaN or infinity"),
        (3.6e35, "3.6e.35; no weight is"),
        (-2e6, "2e.06; no weight"),
    ],
)
def test_what_no_weight_can_be_in_a_shard_that_loads_otherwise(tmp_path, value, found):
    tensors = TENSORS | {"model.norm.weight": np.full(12, value, np.float32)}
    write_folder(tmp_path, DENSE, tensors, shards=3)
    with pytest.raises(ValueError, match=f"'model.norm.weight' holds {found}"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["\ud800", "a\0b", "x" * 5000, "", ".", "sub", "loop", "pipe", "up/../../x"]
)
def test_index_that_names_what_is_no_file_of_the_folder(tmp_path, name):
    write_folder(tmp_path, DENSE, TENSORS, shards=2)
    (tmp_path / "sub").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    write_index(tmp_path, {"model.norm.weight": name})
    with pytest.raises(ValueError) as error:
        SafetensorsFolder(tmp_path)
    assert re.search(r"has no file|names the file|is a link", str(error.value))


def test_index_that_names_a_tensor_twice(tmp_path):
    write_folder(tmp_path, DENSE, TENSORS, shards=2)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(ValueError, match=r"index.json .*'a' twice"):
        SafetensorsFolder(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional=dict(
        dtype=st.sampled_from(["F32", "BF16", "F16", "I8", "F8_E4M3", "", "x"]) | json_values,
        shape=st.lists(st.integers(-2, 2**70) | st.integers(0, 4), max_size=4) | json_values,
        data_offsets=st.lists(st.integers(-2, 2**66) | st.integers(0, 48), max_size=3)
        | json_values,
    ),
)
headers = st.one_of(
    json_values,
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "../x", ""]) | st.text(max_size=6),
        entries | json_values,
        max_size=4,
    ),
)
places = st.sampled_from(
    [
        "good.safetensors",
        SINGLE,
        "../secret",
        "/etc/passwd",
        "link",
        "dir",
        "/dev/zero",
        ".",
        "",
    ]
) | st.text(max_size=12)
several = settings(
    max_examples=150,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def opened():
    """Every file that is opened from Python or by safetensors, while the list is watched."""
    paths, watching = [], [True]
    codecs.lookup("utf-8-sig")  # of JSON files: Python opens the codec's own file once

    def watch(event, arguments):
        if watching[0] and event == "open" and isinstance(arguments[0], (str, Path)):
            paths.append(arguments[0])

    sys.addaudithook(watch)  # it cannot be taken off again

    def open_watched(file, framework):  # in Rust, which has no such hook
        paths.append(file)
        return safe_open(file, framework)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxspec.checkpoints.tensors.safe_open", open_watched)
        yield paths
    watching[0] = False


def read_all(folder: Path) -> None:
    """Opens a folder and reads every tensor; a refusal must be one line about this folder."""
    try:
        tensors = SafetensorsFolder(folder)
        for name in tensors.shapes:
            tensors.read(name)
    except ValueError as error:
        assert type(error) is ValueError and str(folder) in str(error)


@several
@given(header=headers, data=st.binary(max_size=48), size=st.none() | st.integers(0, 2**64 - 1))
def test_any_header(tmp_path, header, data, size):
    write_raw(tmp_path / SINGLE, json.dumps(header), data, size)
    read_all(tmp_path)


@several
@given(
    content=st.binary(max_size=200),
    at=st.integers(0, 300),
    flip=st.binary(min_size=1, max_size=8),
)
def test_any_bytes(tmp_path, content, at, flip):
    path = tmp_path / SINGLE
    path.write_bytes(content)
    read_all(tmp_path)
    write_raw(path, json.dumps(header_of(SMALL)), SMALL_DATA)
    good = bytearray(path.read_bytes())
    good[at : at + len(flip)] = flip
    path.write_bytes(good)
    read_all(tmp_path)
    path.write_bytes(good[:at])
    read_all(tmp_path)


@several
@given(
    index=json_values
    | st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from("ab") | st.text(max_size=6), places)}
    )
)
def test_any_index_reads_nothing_outside(tmp_path, opened, index):
    folder = tmp_path / "folder"
    if not folder.exists():
        (tmp_path / "secret").write_text("not yours")
        folder.mkdir()
        write_raw(folder / "good.safetensors", json.dumps(header_of(SMALL)), SMALL_DATA)
        (folder / "link").symlink_to("../secret")
        (folder / "dir").mkdir()
    (folder / INDEX).write_text(json.dumps(index))
    opened.clear()
    read_all(folder)
    weights = [Path(path) for path in opened if Path(path).suffix != ".json"]
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in weights)
