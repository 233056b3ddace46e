"""Files of a safetensors folder: what is accepted and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxspec.checkpoints.tensors import SafetensorsFolder
from tests.checkpoints.writing import (
    DENSE,
    random_tensors,
    read_index,
    write_folder,
    write_index,
)

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path):
    return write_folder(tmp_path / "sharded", DENSE, random_tensors(DENSE), shards=2)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_tensors_read_as_written(tmp_path, shards):
    tensors = random_tensors(DENSE)
    folder = SafetensorsFolder(write_folder(tmp_path, DENSE, tensors, shards=shards))
    assert folder.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(folder.read(name), tensor)


def test_shard_that_is_not_there(sharded):
    (sharded / SECOND).unlink()
    with pytest.raises(ValueError, match=rf"has no file '{SECOND}', which its index names"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("kept", [4, 100, 3000])
def test_truncated_shard(sharded, kept):
    path = sharded / SECOND
    assert kept < path.stat().st_size
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=rf"{SECOND} is not a whole safetensors file .*download it again"
    ):
        SafetensorsFolder(sharded)


def test_garbage(sharded):
    (sharded / FIRST).write_bytes(b"not tensors at all" * 10)
    with pytest.raises(ValueError, match=rf"{FIRST} is not a whole safetensors file"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.safetensors", "a/../../b"])
def test_index_that_names_a_file_outside(sharded, name):
    write_index(sharded, read_index(sharded) | {"model.norm.weight": name})
    with pytest.raises(ValueError, match=rf"names the file '{name}'; expected one inside"):
        SafetensorsFolder(sharded)


def test_link_that_leads_outside(sharded, tmp_path):
    (sharded / SECOND).rename(tmp_path / "elsewhere.safetensors")
    (sharded / SECOND).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.*outside the folder"):
        SafetensorsFolder(sharded)


def test_link_within_the_folder(sharded):
    (sharded / SECOND).rename(sharded / "same.safetensors")
    (sharded / SECOND).symlink_to("same.safetensors")
    assert len(SafetensorsFolder(sharded).shapes) == len(random_tensors(DENSE))


@pytest.mark.parametrize("store", ["models--o--m/blobs", "blobs"], ids=["repository", "shared"])
def test_snapshot_of_the_hub_cache_links_to_its_blobs(tmp_path, store):
    snapshot = tmp_path / "models--o--m" / "snapshots" / "0123abc"
    blobs = tmp_path / store
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    write_folder(snapshot, DENSE, random_tensors(DENSE), shards=2)
    for i, path in enumerate(sorted(snapshot.glob("*.safetensors"))):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    assert len(SafetensorsFolder(snapshot).shapes) == len(random_tensors(DENSE))


def test_tensor_in_two_shards(sharded):
    tensors = random_tensors(DENSE)
    name = next(name for name, file in read_index(sharded).items() if file == FIRST)
    held = {n: tensors[n] for n, file in read_index(sharded).items() if file == SECOND}
    save_file(held | {name: tensors[name]}, sharded / SECOND)
    with pytest.raises(ValueError, match=rf"'{name}' is in {FIRST} and again in {SECOND}"):
        SafetensorsFolder(sharded)


def test_index_that_disagrees_with_the_shards(sharded):
    weight_map = read_index(sharded)
    name = next(name for name, file in weight_map.items() if file == FIRST)
    write_index(sharded, weight_map | {name: SECOND})
    with pytest.raises(
        ValueError, match=rf"tensor '{name}' is in {SECOND}, which does not hold it"
    ):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json"):
        SafetensorsFolder(sharded)


def test_quantised_weights(tmp_path):
    tensors = random_tensors(DENSE) | {"model.norm.weight": np.zeros(12, np.int8)}
    write_folder(tmp_path, DENSE, tensors)
    with pytest.raises(
        ValueError, match=r"'model.norm.weight' is stored as I8; expected F32, F16, BF16"
    ):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_opened(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    (tmp_path / name).write_bytes(b"would run code")
    with pytest.raises(ValueError, match=rf"pickled weights only \({name}\).*safetensors"):
        SafetensorsFolder(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"has no weights; expected model.safetensors or"):
        SafetensorsFolder(tmp_path)
