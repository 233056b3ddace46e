"""Features kept on disk are those the target computes, and survive a kill."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.checkpoints.tensors import read_json
from jaxspec.data.conversations import Example
from jaxspec.locks import claimed
from jaxspec.training import feature_build
from jaxspec.training.batches import BatchRows, Position, places
from jaxspec.training.feature_cache import open_features
from jaxspec.training.feature_shards import plan_shards
from jaxspec.training.features import target_features
from jaxspec.training.loading import Loader
from jaxspec.training.step import init_state, train_step
from jaxspec.training.trainer import train
from tests.training import tiny

pytestmark = pytest.mark.slow

TAPS = tiny.DRAFTER.taps
SHARD = 200 * 3 * 16 * 4  # bytes of 200 tokens


def build(folder, examples=None, *, target=None, **options):
    examples, target = examples or tiny.examples(), target or tiny.target()
    options = dict(taps=TAPS, shard_bytes=SHARD) | options
    cache = open_features(folder, target, examples, **options)
    cache.complete(target, examples)
    return cache


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_sequences_are_laid_out_by_length():
    layout = plan_shards([5, 2, 9, 3, 1], 6)
    assert layout.shards == ((4, 1, 3), (0,), (2,))
    assert layout.starts == (0, 1, 0, 3, 0)
    assert layout.rows == (6, 5, 9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_the_targets(tmp_path, dtype):
    examples = tiny.examples()
    cache = build(tmp_path, dtype=dtype)
    assert len(shards(tmp_path)) > 3
    batch = BatchRows(((7,), (), (0,), (19,)), 128)
    shape, found = places(batch, [len(x) for x in examples], micro_batch=2)
    got = cache.read(128, shape, found)
    assert got.taps.shape == (2, 2, 128, 32) and got.hidden.shape == (2, 2, 128, 16)
    assert got.taps.dtype == jnp.dtype(dtype)
    target = tiny.target()
    for (i,), place in zip(
        batch.rows[:1] + batch.rows[2:], [(0, 0), (1, 0), (1, 1)], strict=True
    ):
        count = len(examples[i])
        tokens = jnp.asarray(examples[i].tokens)[None]
        want = target_features(target.params, target.config, tokens, taps=TAPS)
        for name in ("taps", "hidden"):
            found = getattr(got, name)[place].astype(np.float32)
            expected = getattr(want, name)[0]
            atol = 2e-6 if dtype == "float32" else 0.02
            np.testing.assert_allclose(found[:count], expected, atol=atol)
            assert not found[count:].any()
    assert not got.hidden[0, 1].any()


def test_losses_are_those_of_features_computed_with_the_step(tmp_path):
    """To float32's last digits: of sequences of one batch both compute the same products."""
    config = dataclasses.replace(tiny.CONFIG, batch_size=4, micro_batch=4)
    target, examples = tiny.target(), tiny.examples(4)
    cache = build(tmp_path, examples, shard_bytes=10**6)
    online, kept = Loader(config, examples), Loader(config, examples, features=cache)

    def step(loader):
        state, rows = init_state(config, target.params), loader.at(Position())
        return train_step(config, target.config, target.params, state, rows)

    (state, means), (expected, expected_means) = step(kept), step(online)
    close = np.testing.assert_allclose
    jax.tree.map(functools.partial(close, rtol=1e-6), means, expected_means)
    # Adam divides by the slopes' size, so that small ones lose digits.
    jax.tree.map(functools.partial(close, atol=2e-5), state.weights, expected.weights)


def test_a_run_with_kept_features_is_the_run_without(tmp_path):
    target, examples = tiny.target(), tiny.examples()
    config = dataclasses.replace(tiny.CONFIG, steps=5)
    train(config, target, examples, tmp_path / "online")
    train(config, target, examples, tmp_path / "kept", features=tmp_path / "features")
    online, kept = (
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("online", "kept")
    )
    for expected, got in zip(online, kept, strict=True):
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-6)


def test_a_killed_build_goes_on_and_ends_the_same(tmp_path, monkeypatch, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build(whole)
    expected = shards(whole)

    class Killed(BaseException):
        pass

    written = []

    def write(path, tensors):
        if len(written) == 2:  # as kill -9 leaves it
            path.with_suffix(".partial").write_bytes(b"half a shard")
            raise Killed
        written.append(path.name)
        original(path, tensors)

    original = feature_build.write_shard
    monkeypatch.setattr(feature_build, "write_shard", write)
    with pytest.raises(Killed):
        build(killed)
    monkeypatch.setattr(feature_build, "write_shard", original)
    stamps = {name: (killed / name).stat().st_mtime_ns for name in written}
    capsys.readouterr()
    build(killed)
    assert shards(killed) == expected
    assert stamps == {name: (killed / name).stat().st_mtime_ns for name in written}
    assert "GB to write" in capsys.readouterr().err
    build(killed)
    assert "GB to write" not in capsys.readouterr().err
    last = killed / max(expected)
    last.write_bytes(last.read_bytes()[:-5])
    build(killed)
    assert shards(killed) == expected


def test_a_folder_serves_drafters_that_read_fewer_taps(tmp_path):
    lengths = [len(x) for x in tiny.examples()]
    whole, before = build(tmp_path, taps=(0, 1, 2)), shards(tmp_path)
    shape, found = places(BatchRows(((3,), (0,)), 128), lengths, micro_batch=2)
    every, some = (
        cache.read(128, shape, found) for cache in (whole, build(tmp_path, taps=(2, 0)))
    )
    first, _, last = np.split(every.taps, 3, axis=-1)
    np.testing.assert_array_equal(some.taps, np.concatenate([last, first], axis=-1))
    np.testing.assert_array_equal(some.hidden, every.hidden)
    assert shards(tmp_path) == before


def test_features_of_something_else_are_refused(tmp_path):
    build(tmp_path)
    before = read_json(tmp_path / "index.json")
    other = [Example(x.tokens[::-1], x.supervised) for x in tiny.examples()]
    for change, message in [
        (dict(taps=(0, 2)), r"taps \[0, 1\], expected \[0, 2\]"),
        (dict(dtype="bfloat16"), "dtype 'float32', expected 'bfloat16'"),
        (dict(examples=other), "digest"),
    ]:
        with pytest.raises(ValueError, match=f"for another setup .*{message}"):
            build(tmp_path, **change)
    tuned = jax.tree.map(lambda x: x * 1.1, tiny.target().params)
    tuned = dataclasses.replace(tiny.target(), params=tuned)
    with pytest.raises(ValueError, match="for another setup .fingerprint '"):
        build(tmp_path, target=tuned)
    build(tmp_path, target=dataclasses.replace(tiny.target(), name="/models/tiny"))
    with pytest.raises(ValueError, match="cannot be stored in 'int8'"):
        build(tmp_path / "new", dtype="int8")
    assert read_json(tmp_path / "index.json") == before


def test_a_folder_without_a_fingerprint_knows_its_target_by_name(tmp_path):
    build(tmp_path)
    index = read_json(tmp_path / "index.json")
    del index["fingerprint"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    build(tmp_path)
    with pytest.raises(ValueError, match="target 'tiny', expected 'another'"):
        build(tmp_path, target=dataclasses.replace(tiny.target(), name="another"))


def test_one_process_fills_a_folder(tmp_path):
    with claimed(tmp_path, "wait"):
        with pytest.raises(ValueError, match="another process is writing .*--features another"):
            build(tmp_path)
    build(tmp_path)
    with claimed(tmp_path, "wait"):
        build(tmp_path)  # only reads


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="needs 0.00 GB more and its disk has 0.00 GB"):
        build(tmp_path)
    assert not shards(tmp_path)
    monkeypatch.undo()
    build(tmp_path, dtype="bfloat16")  # as the error advises
