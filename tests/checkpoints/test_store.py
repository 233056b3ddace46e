"""Checkpoints of a run: whole, pruned, and clear about damage."""

import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspec.checkpoints.checksums import checksums
from jaxspec.checkpoints.store import Store, load_weights, save_weights


def state(seed):
    weights = {"w": jax.random.normal(jax.random.key(seed), (64, 64)), "b": jnp.ones(3)}
    return {"weights": weights, "optimizer": optax.adamw(1e-3).init(weights)}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    store = Store(tmp_path)
    store.save(3, state(3), {"epoch": 1, "index": 5})
    store.close()
    step, found, position = Store(tmp_path).restore(state(0))
    assert (step, position) == (3, {"epoch": 1, "index": 5})
    jax.tree.map(np.testing.assert_array_equal, found, state(3))


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = Store(tmp_path, keep=2)
    for step, score in [(1, 1.0), (2, 3.0), (3, 2.0), (4, None), (5, None)]:
        store.save(step, state(step), {"index": 0})
        if score is not None:
            store.scores[step] = score
    assert store.steps == [2, 4, 5]
    assert store.best == 2


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_damaged_checkpoint_names_the_one_before(tmp_path, damage):
    store = Store(tmp_path)
    for step in (1, 2):
        store.save(step, state(step), {"index": 0})
    for path in (tmp_path / "2" / "state" / "d").iterdir():
        path.unlink() if damage == "delete" else path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"checkpoint 2 in .* cannot be read .* checkpoint 1"):
        store.restore(state(0))
    assert store.restore(state(0), step=1)[0] == 1


def flipped(path, at):
    """One bit of a file is another."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def test_any_flipped_byte_of_the_arrays_is_found(tmp_path):
    store = Store(tmp_path)
    for step in (1, 2):
        store.save(step, state(step), {"index": 7})
    files = [x for x in (tmp_path / "2" / "state").rglob("*") if x.is_file()]
    largest = max(files, key=lambda x: x.stat().st_size)
    assert largest.stat().st_size > 10_000  # one array of 16,384 bytes
    for share in (0.2, 0.5, 0.8):
        at = int(share * largest.stat().st_size)
        flipped(largest, at)
        with pytest.raises(ValueError, match=r"checkpoint 2 in .* resume from checkpoint 1"):
            store.restore(state(0))
        flipped(largest, at)
    assert store.restore(state(0))[0] == 2


def test_what_was_stored_otherwise_is_named(tmp_path, monkeypatch):
    """As a fault of the memory leaves it: every file is sound."""
    store, sums = Store(tmp_path), checksums
    monkeypatch.setattr(
        "jaxspec.checkpoints.store.checksums", lambda x: sums(x) | {"weights.w": 1}
    )
    store.save(1, state(1), {"index": 7})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'weights.w' is not what was written: its checksum"):
        store.restore(state(0))


def test_stored_weights_are_compared_too(tmp_path):
    weights = state(1)["weights"]
    save_weights(tmp_path / "store", weights)
    jax.tree.map(
        np.testing.assert_array_equal, load_weights(tmp_path / "store", weights), weights
    )
    (part,) = (load_weights(tmp_path / "store", {"b": weights["b"]})).values()
    assert part.tolist() == [1, 1, 1]
    files = [x for x in (tmp_path / "store").rglob("*") if x.is_file()]
    largest = max(files, key=lambda x: x.stat().st_size)
    flipped(largest, largest.stat().st_size // 2)
    with pytest.raises(ValueError, match="cannot be read .*; convert the checkpoint again"):
        load_weights(tmp_path / "store", weights)


def test_checkpoints_without_checksums_are_read(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(1, state(1), {"index": 7})
    shutil.rmtree(tmp_path / "1" / "checksums")
    step, found, _ = store.restore(state(0))
    jax.tree.map(np.testing.assert_array_equal, found, state(1))


def test_a_step_can_be_written_again(tmp_path):
    store = Store(tmp_path)
    store.save(1, state(1), {"index": 0})
    store.save(1, state(2), {"index": 5})
    _, found, position = store.restore(state(0))
    assert position == {"index": 5}
    jax.tree.map(np.testing.assert_array_equal, found, state(2))


def test_a_checkpoint_that_does_not_fit_leaves_the_others(tmp_path):
    store = Store(tmp_path, keep=1)
    store.save(1, state(1), {"index": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint 2 cannot be written to .* make room"):
            store.save(2, state(2), {"index": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Store(tmp_path).restore(state(0))[0] == 1


def test_half_written_checkpoints_do_not_count(tmp_path):
    store = Store(tmp_path)
    store.save(1, state(1), {"index": 0})
    store.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert Store(tmp_path).steps == [1]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    store = Store(tmp_path)
    store.save(1, {"w": jnp.ones(4)}, {"index": 0})
    with pytest.raises(ValueError, match="checkpoint 1 in .* cannot be read"):
        store.restore({"w": jnp.ones(5)})


def test_what_is_not_there_is_named(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        store.restore(state(0))
    store.save(1, state(1), {"index": 0})
    with pytest.raises(ValueError, match=r"has no checkpoint 7; it has \[1\]"):
        store.restore(state(0), step=7)
