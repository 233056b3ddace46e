"""Runs that are killed end where runs that are not do, and what runs export."""

import dataclasses
import shutil
import time
from signal import SIGINT, SIGKILL, SIGTERM

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.checkpoints.store import Store
from jaxspec.config import DeltaNetConfig
from jaxspec.models.params import random_params
from jaxspec.models.target import Target
from jaxspec.training.networks import copy_layers
from jaxspec.training.start import initial_drafter
from jaxspec.training.step import init_state, train_step
from jaxspec.training.trainer import train
from tests.slow import slow_but
from tests.training import tiny


def signal_after(process, folder, lines, number):
    """Sends a signal once the run has logged so many steps."""
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=300)


@pytest.mark.slow
def test_interrupted_runs_end_the_same(whole_run, tmp_path):
    after_steps = (1, SIGKILL), (3, SIGTERM), (5, SIGINT), (7, SIGKILL)
    for lines, number in after_steps:
        process = tiny.start(tmp_path)
        signal_after(process, tmp_path, lines, number)
        assert process.returncode == (-number if number == SIGKILL else 0)
        assert not (tmp_path / "drafter").exists()
    tiny.finish(tiny.start(tmp_path))
    for name in ("model.safetensors", "config.json", "README.md"):
        found, expected = (folder / "drafter" / name for folder in (tmp_path, whole_run))
        assert found.read_bytes() == expected.read_bytes(), name
    assert tiny.metrics(tmp_path) == tiny.metrics(whole_run)


def test_the_checkpoint_is_what_was_trained_and_loads(whole_run):
    folder = whole_run
    target = tiny.target()
    params = load_drafter(folder / "drafter", target).params
    state = init_state(tiny.CONFIG, target.params)
    step, state, _ = Store(folder / "checkpoints").restore(state)
    assert step == tiny.CONFIG.steps
    jax.tree.map(np.testing.assert_array_equal, params.head, state.weights)


PROMPTS = [[1, 2, 3], [4, 5]]


def test_prompts_that_cannot_be_answered_are_refused_before_training(tmp_path):
    for prompt, message in ([99], "token id 99"), ([1] * 40960, "the target has 40960"):
        with pytest.raises(ValueError, match=message):
            prompts = [[1, 2, 3], prompt]
            train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path, prompts=prompts)
    assert not any(tmp_path.iterdir())


def test_a_validation_that_fails_loses_no_step(copied, monkeypatch):
    for last in (copied / "drafter", copied / "checkpoints" / "12"):
        shutil.rmtree(last)

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("jaxspec.training.trainer.walked_tau", broken)
    arguments = tiny.CONFIG, tiny.target(), tiny.examples(), copied
    with pytest.raises(RuntimeError, match="out of memory"):
        train(*arguments, prompts=PROMPTS)
    monkeypatch.setattr("jaxspec.training.trainer.walked_tau", lambda *_, **__: 1.5)
    monkeypatch.setattr("jaxspec.training.trainer.train_step", broken)  # not again
    assert train(*arguments, prompts=PROMPTS) == copied / "drafter"
    assert tiny.metrics(copied)[-1] == {"step": 12, "tau": 1.5}


def test_a_score_is_added_without_writing_the_checkpoint_again(copied, monkeypatch):
    """Orbax deletes a checkpoint before it writes it again: a kill there would lose it."""
    shutil.rmtree(copied / "drafter")
    log = copied / "metrics.jsonl"
    with log.open("a") as stream:
        stream.write('{"step": 10, "tau": 2.5}\n')
    monkeypatch.setattr("jaxspec.training.trainer.walked_tau", lambda *_, **__: 1.5)
    monkeypatch.setattr(Store, "save", None)  # never called
    train(tiny.CONFIG, tiny.target(), tiny.examples(), copied, prompts=PROMPTS)
    assert tiny.metrics(copied)[-1] == {"step": 12, "tau": 1.5}
    card = (copied / "drafter" / "README.md").read_text()
    assert "these weights are of step 10" in card  # the best of both


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_run_that_is_lost_says_how_to_go_on(copied, monkeypatch, name):
    shutil.rmtree(copied / "drafter")
    for step in (8, 10, 12):
        shutil.rmtree(copied / "checkpoints" / str(step))

    def spoilt(*arguments):
        state, means = train_step(*arguments)
        return state, means | {name: jnp.float32(np.nan)}

    monkeypatch.setattr("jaxspec.training.trainer.train_step", spoilt)
    message = (
        f"the {name.replace('_', ' ')} of step 7 is nan; resume from an earlier checkpoint "
        r"\(2, 4, 6\) with a lower rate: --resume-step 2 --learning-rate 0.005"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), copied)


def test_weights_that_were_spoilt_are_not_exported(copied, monkeypatch):
    shutil.rmtree(copied / "drafter")
    restore = Store.restore

    def spoilt(self, like, step=None):
        step, state, position = restore(self, like, step)
        state.weights.fc = state.weights.fc.replace(state.weights.fc[...] * 1e30)
        return step, state, position

    monkeypatch.setattr(Store, "restore", spoilt)
    with pytest.raises(ValueError, match="'fc.weight' holds .*; resume from an earlier"):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), copied)
    assert not (copied / "drafter").exists()


def test_the_first_weights_are_the_targets_last_layers():
    target = tiny.target()
    weights = init_state(tiny.CONFIG, target.params).weights
    last = target.params.layers[-1]
    np.testing.assert_array_equal(weights.layers[0].down[...], last.mlp.down)
    queries, keys = last.attention.qkv[:, :, :-2], last.attention.qkv[:, :, -2]
    np.testing.assert_array_equal(weights.layers[0].q[...], queries)
    np.testing.assert_array_equal(weights.layers[0].kv[:, :, 0], keys)


def test_training_goes_on_from_an_exported_drafter(whole_run, tmp_path):
    folder = whole_run
    config = dataclasses.replace(tiny.CONFIG, initial=str(folder / "drafter"), steps=1)
    target = tiny.target()
    params = load_drafter(folder / "drafter", target).params
    weights, kept = initial_drafter(config, target)
    assert kept is None
    jax.tree.map(np.testing.assert_array_equal, weights, params.head)
    train(config, target, tiny.examples(), tmp_path / "again")
    assert tiny.steps(tmp_path / "again")[0]["loss"] < tiny.steps(folder)[0]["loss"]
    other = dataclasses.replace(config.drafter, causal=True)
    with pytest.raises(ValueError, match=r"causal \(False.*, expected \(True"):
        initial_drafter(dataclasses.replace(config, drafter=other), target)
    missing = dataclasses.replace(config, initial=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="nothing"):
        train(missing, target, tiny.examples(), tmp_path / "never")


HEADS = {
    "mlp": dict(sequential="mlp", rank=0, confidence=None, predict_next=False),
    "gated": dict(sequential="gated", predict_next=False, confidence="hidden"),
    "causal rnn": dict(sequential="rnn", causal=True),
}


@pytest.mark.parametrize("head", slow_but(["causal rnn"], HEADS))
def test_every_head_is_trained_and_exported(tmp_path, head):
    drafter = dataclasses.replace(tiny.DRAFTER, **HEADS[head])
    config = dataclasses.replace(tiny.CONFIG, drafter=drafter, steps=4, batch_size=4)
    target = tiny.target()
    folder = train(config, target, tiny.examples(4), tmp_path)
    steps = tiny.steps(tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"]
    loaded = load_drafter(folder, target)
    assert loaded.drafter.config == drafter
    before = nnx.to_pure_dict(init_state(config, target.params).weights)["sequential"]
    after = nnx.to_pure_dict(loaded.params.head)["sequential"]
    assert all((after[name] != before[name]).any() for name in before)


@pytest.mark.slow
def test_a_drafter_is_trained_for_a_hybrid_target(tmp_path):
    net = DeltaNetConfig(layers=(0, 2), key_heads=2, value_heads=4, key_dim=4, value_dim=4)
    config = dataclasses.replace(
        tiny.TARGET_CONFIG, delta_net=net, rotary_dim=4, attention_gate=True
    )
    target = Target("hybrid", config, random_params(config, jax.random.key(0)))
    run = dataclasses.replace(tiny.CONFIG, steps=4, batch_size=4, initial="random")
    folder = train(run, target, tiny.examples(4), tmp_path)
    steps = tiny.steps(tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert load_drafter(folder, target).drafter.config == tiny.DRAFTER


def test_what_no_format_can_say_is_refused_before_training(tmp_path):
    drafter = dataclasses.replace(
        tiny.DRAFTER, sequential="mlp", rank=0, confidence=None, predict_next=True
    )
    config = dataclasses.replace(tiny.CONFIG, drafter=drafter)
    with pytest.raises(ValueError, match="'treeflash' has no key for predict_next"):
        train(config, tiny.target(), tiny.examples(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mesh_of_other_axes_is_refused(tmp_path):
    mesh = jax.make_mesh((1,), ("dp",))
    with pytest.raises(ValueError, match=r"the mesh has axes \('dp',\)"):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path / "run", mesh=mesh)
    assert not (tmp_path / "run").exists()


def test_layers_of_other_shapes_are_refused():
    wide = dataclasses.replace(tiny.DRAFTER, intermediate_size=48)
    config = dataclasses.replace(tiny.CONFIG, drafter=wide, initial="random")
    weights = init_state(config, tiny.target().params).weights
    with pytest.raises(ValueError, match="set initial to 'random'"):
        copy_layers(wide, weights, tiny.target().params)


def test_the_best_weights_are_exported(tmp_path, monkeypatch):
    taus = iter([3.0, 1.0])
    monkeypatch.setattr("jaxspec.training.trainer.walked_tau", lambda *_, **__: next(taus))
    config = dataclasses.replace(tiny.CONFIG, steps=4, validate_every=2)
    target = tiny.target()
    folder = train(config, target, tiny.examples(), tmp_path, prompts=[[1, 2]])
    params = load_drafter(folder, target).params
    state = init_state(config, target.params)
    _, best, _ = Store(tmp_path / "checkpoints").restore(state, 2)
    jax.tree.map(np.testing.assert_array_equal, params.head, best.weights)
