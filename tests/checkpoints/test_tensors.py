"""Files of a safetensors folder: what is accepted and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxspec.checkpoints.huggingface import load_params, read_config
from jaxspec.checkpoints.tensors import INDEX, SINGLE, SafetensorsFolder, write_tensors
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


def test_subfolder_of_a_snapshot_links_to_the_blobs_of_the_repository(tmp_path):
    repository = tmp_path / "models--o--m"
    folder = repository / "snapshots" / "0123abc" / "sub"
    for place in (folder, repository / "blobs"):
        place.mkdir(parents=True)
    write_folder(folder, DENSE, random_tensors(DENSE))
    (folder / SINGLE).rename(repository / "blobs" / "0")
    (folder / SINGLE).symlink_to("../../../blobs/0")
    assert len(SafetensorsFolder(folder).shapes) == len(random_tensors(DENSE))

    (repository / "blobs" / "0").rename(tmp_path / "elsewhere")
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere, outside the folder"):
        SafetensorsFolder(folder)


def test_folder_of_links_into_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    blobs = tmp_path / "hub" / "models--o--m" / "blobs"
    blobs.mkdir(parents=True)
    folder = write_folder(tmp_path / "model", DENSE, random_tensors(DENSE))
    (folder / SINGLE).rename(blobs / "0")
    (folder / SINGLE).symlink_to(blobs / "0")
    (tmp_path / "other name").symlink_to(folder)
    for name in ("model", "other name"):
        assert len(SafetensorsFolder(tmp_path / name).shapes) == len(random_tensors(DENSE))


def test_two_saves_in_one_folder(sharded):
    save_file(random_tensors(DENSE), sharded / SINGLE)
    with pytest.raises(ValueError, match=f"has {SINGLE} and {INDEX}, which names other files"):
        SafetensorsFolder(sharded)
    for path in (sharded / FIRST, sharded / SECOND):
        path.unlink()
    write_index(sharded, dict.fromkeys(random_tensors(DENSE), SINGLE))  # of one shard
    assert len(SafetensorsFolder(sharded).shapes) == len(random_tensors(DENSE))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_a_wrapper_put_before_every_name_is_taken_off(tmp_path, prefix):
    tensors = random_tensors(DENSE)
    plain = write_folder(tmp_path / "plain", DENSE, tensors)
    wrapped = {f"{prefix}{name}": value for name, value in tensors.items()}
    wrapped = SafetensorsFolder(write_folder(tmp_path / "wrapped", DENSE, wrapped))
    assert wrapped.shapes == SafetensorsFolder(plain).shapes
    for name, value in tensors.items():
        np.testing.assert_array_equal(wrapped.read(name), value)


def test_names_of_a_multimodal_model_are_said_to_be(tmp_path):
    tensors = random_tensors(DENSE)
    tensors = {f"language_model.{name}": value for name, value in tensors.items()}
    tensors["vision_tower.norm.weight"] = np.ones(3, np.float32)
    folder = write_folder(tmp_path / "whole", DENSE, tensors)
    message = "no tensor 'model.embed_tokens.weight'.*prefix 'language_model.' of a multimodal"
    with pytest.raises(ValueError, match=message):
        load_params(folder, read_config(folder))


@pytest.mark.parametrize(
    "name, remedy", [("d2t", "maps a reduced draft vocabulary"), ("q", "the unquantised check")]
)
def test_integers(tmp_path, name, remedy):
    folder = write_folder(tmp_path / "x", DENSE, {name: np.arange(3)})
    with pytest.raises(ValueError, match=f"'{name}' is stored as I64; expected F32.*{remedy}"):
        SafetensorsFolder(folder)


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
    with pytest.raises(ValueError, match=rf"tensor '{name}' is in {SECOND}, which lacks it"):
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


def test_the_only_file_may_have_any_name_but_a_shards(tmp_path):
    tensors = {"fc.weight": np.ones((2, 3), np.float32)}
    save_file(tensors, tmp_path / "mtp.safetensors")
    np.testing.assert_array_equal(SafetensorsFolder(tmp_path).read("fc.weight"), 1)
    (tmp_path / "mtp.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="has no weights"):
        SafetensorsFolder(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"has no weights; expected model.safetensors or"):
        SafetensorsFolder(tmp_path)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "a.safetensors"
    with pytest.raises(OSError, match=f"cannot write {path}: .*No such file"):
        write_tensors(path, {"a": np.zeros(2)})
    path.parent.mkdir()
    write_tensors(path, {"a": np.arange(2)})
    np.testing.assert_array_equal(load_file(path)["a"], np.arange(2))
