"""Conversion to an Orbax store and back, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import checkpoints
from jaxspec.checkpoints.convert import convert
from jaxspec.checkpoints.huggingface import WEIGHTS
from jaxspec.checkpoints.tensors import SafetensorsFolder
from tests.checkpoints.writing import (
    DENSE,
    LLAMA,
    MIXTURE,
    QWEN2,
    random_tensors,
    write_folder,
    write_large_folder,
)


@pytest.mark.parametrize("raw", [DENSE, MIXTURE, LLAMA, QWEN2], ids=lambda r: r["model_type"])
def test_there_and_back(tmp_path, raw):
    source = tmp_path / "source"
    write_large_folder(source, raw, shards=2)
    store, again = tmp_path / "store", tmp_path / "again"
    done = convert(source, store)
    expected = checkpoints.load(source, "bfloat16")
    found = checkpoints.load(store, "bfloat16")
    assert found.config == expected.config
    assert done.dtype == "bfloat16" and done.arrays == len(jax.tree.leaves(found.params))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)

    convert(store, again, format="safetensors")
    before, after = SafetensorsFolder(source), SafetensorsFolder(again)
    assert before.shapes == after.shapes
    for name in before.shapes:
        np.testing.assert_array_equal(before.read(name), after.read(name))


def test_another_dtype(tmp_path):
    write_large_folder(tmp_path / "source", DENSE, shards=1)
    convert(tmp_path / "source", tmp_path / "store", dtype="float32")
    for folder in ("source", "store"):
        params = checkpoints.load(tmp_path / folder, "float32").params
        assert params.embed.dtype == jnp.float32
    narrow = checkpoints.load(tmp_path / "store", "bfloat16").params
    expected = checkpoints.load(tmp_path / "source", "bfloat16").params
    jax.tree.map(np.testing.assert_array_equal, narrow, expected)


def test_tensors_of_two_dtypes(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    write_folder(tmp_path / "source", DENSE, tensors)
    with pytest.raises(ValueError, match=r"tensors of float16 and float32; say which"):
        convert(tmp_path / "source", tmp_path / "store")


def test_an_output_that_exists_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match=r"exists; give --output a new folder"):
        convert(tmp_path, tmp_path)


def test_a_damaged_source_leaves_no_output(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.norm.weight"][3] = np.nan
    write_folder(tmp_path / "source", DENSE, tensors)
    with pytest.raises(ValueError, match=r"'model.norm.weight' holds NaN"):
        convert(tmp_path / "source", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_store(tmp_path, damage):
    write_large_folder(tmp_path / "source", DENSE, shards=1)
    convert(tmp_path / "source", tmp_path / "store")
    files = (tmp_path / "store" / WEIGHTS).rglob("d/*")
    for path in [path for path in files if path.is_file()]:  # some hold what is not read
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights.orbax cannot be read .*; convert"):
        checkpoints.load(tmp_path / "store")


def test_a_store_of_another_model(tmp_path):
    write_large_folder(tmp_path / "source", DENSE, shards=1)
    convert(tmp_path / "source", tmp_path / "store")
    path = tmp_path / "store" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 11', '"vocab_size": 12'))
    with pytest.raises(
        ValueError, match=r"'embed' is of shape \(11, 12\), expected \(12, 12\)"
    ):
        checkpoints.load(tmp_path / "store")
