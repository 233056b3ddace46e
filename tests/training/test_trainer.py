"""Runs that are killed end where runs that are not do."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec.checkpoints.drafters import load_drafter
from jaxspec.checkpoints.store import Store
from jaxspec.checkpoints.tensors import read_json
from jaxspec.config import DeltaNetConfig, TreeConfig
from jaxspec.locks import claimed
from jaxspec.models.params import random_params
from jaxspec.models.target import Target
from jaxspec.training.networks import copy_layers
from jaxspec.training.recipe import OptimizerConfig
from jaxspec.training.run_folder import check_run, described, enter
from jaxspec.training.start import initial_drafter
from jaxspec.training.step import init_state, train_step
from jaxspec.training.trainer import train
from tests.processes import free_port, many_devices
from tests.slow import slow_but
from tests.training import tiny

ROOT = Path(__file__).parents[2]


MESH = ("--mesh", "4", "2")


def start(folder, *options, devices=1):
    command = [sys.executable, "-m", "tests.training.tiny", str(folder), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=many_devices(devices), stderr=subprocess.PIPE, text=True
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def signal_after(process, folder, lines, number):
    """Sends a signal once the run has logged so many steps."""
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=300)


def steps_of(folder):
    return [line for line in tiny.metrics(folder) if "loss" in line]


def assert_same_steps(folder, expected):
    for want, got in zip(steps_of(expected), steps_of(folder), strict=True):
        for name in ("loss", "gradient_norm", "acceptance"):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny.CONFIG, tiny.target(), tiny.examples(), folder)
    return folder


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.mark.slow
def test_interrupted_runs_end_the_same(whole_run, tmp_path):
    for lines, number in ((1, KILL), (3, TERM), (5, INT), (7, KILL)):  # after so many steps
        process = start(tmp_path)
        signal_after(process, tmp_path, lines, number)
        assert process.returncode == (-number if number == KILL else 0)
        assert not (tmp_path / "drafter").exists()
    finish(start(tmp_path))
    for name in ("model.safetensors", "config.json", "README.md"):
        found, expected = (folder / "drafter" / name for folder in (tmp_path, whole_run))
        assert found.read_bytes() == expected.read_bytes(), name
    assert tiny.metrics(tmp_path) == tiny.metrics(whole_run)


@pytest.fixture(scope="module")
def run_on_eight(tmp_path_factory):
    """The same run, the drafter cut over 4 devices and the target over 2 of each, its features
    kept on disk."""
    folder, features = tmp_path_factory.mktemp("eight"), tmp_path_factory.mktemp("features")
    options = (*MESH, "--validate", "--features", str(features))
    finish(start(folder, *options, devices=8))
    return folder


@pytest.mark.gate
def test_many_devices_train_and_validate_as_one_does(whole_run, run_on_eight, tmp_path):
    assert_same_steps(run_on_eight, whole_run)
    finish(start(tmp_path, "--validate"))
    taus = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["tau"]
        for folder in (run_on_eight, tmp_path)
    ]
    assert taus[0] == taus[1] >= 1


@pytest.mark.gate
def test_two_processes_train_as_one_does(whole_run, tmp_path):
    where = f"localhost:{free_port()}"
    started = [start(tmp_path, *MESH, "--join", where, str(i), devices=4) for i in range(2)]
    for process in started:
        finish(process)
    assert_same_steps(tmp_path, whole_run)
    assert (tmp_path / "drafter" / "model.safetensors").exists()


def losses(folder):
    return [line["loss"] for line in steps_of(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "processes"),
    [
        ((1, 2), 2),
        pytest.param((2, 1), 2, marks=pytest.mark.gate),
        pytest.param((2, 2), 2, marks=pytest.mark.gate),
        pytest.param((2, 2), 4, marks=pytest.mark.gate),
        pytest.param((2, 2), 1, marks=pytest.mark.gate),
    ],
)
def test_processes_train_as_one_does_however_the_mesh_lies(tmp_path, mesh, processes):
    """A copy of the target may be cut over processes, which then train on the same rows."""
    where, devices = f"localhost:{free_port()}", mesh[0] * mesh[1] // processes
    options = ("--mesh", *map(str, mesh), "--steps", "3", "--processes", str(processes))
    started = [
        start(
            tmp_path / "run",
            *options,
            *(("--join", where, str(i)) if processes > 1 else ()),
            devices=devices,
        )
        for i in range(processes)
    ]
    for process in started:
        finish(process)
    finish(start(tmp_path / "alone", "--steps", "3"))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=1e-4)


@pytest.mark.gate
@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_goes_on_with_other_devices(whole_run, run_on_eight, tmp_path, devices):
    """Saved on 8 devices and resumed on 1, and the reverse."""
    folder = tmp_path / "run"
    shutil.copytree(run_on_eight if devices == 1 else whole_run, folder)
    shutil.rmtree(folder / "drafter")
    for step in (6, 8, 10, 12):
        shutil.rmtree(folder / "checkpoints" / str(step))
    options = MESH if devices == 8 else ("--validate",)  # as the run was begun
    finish(start(folder, *options, devices=devices))
    assert_same_steps(folder, whole_run)


def test_the_checkpoint_is_what_was_trained_and_loads(whole_run):
    folder = whole_run
    target = tiny.target()
    _, params = load_drafter(folder / "drafter", target.config, target.params, TreeConfig())
    state = init_state(tiny.CONFIG, target.params)
    step, state, _ = Store(folder / "checkpoints").restore(state)
    assert step == tiny.CONFIG.steps
    jax.tree.map(np.testing.assert_array_equal, params.head, state.weights)


def test_other_settings_do_not_go_on_with_a_run(whole_run):
    folder = whole_run
    other = dataclasses.replace(tiny.CONFIG, anchors=5, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(anchors, seed differ\)"):
        train(other, tiny.target(), tiny.examples(), folder)


def test_a_finished_run_is_left_as_it_is(whole_run, capsys):
    folder = whole_run
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(tiny.CONFIG, tiny.target(), tiny.examples(), folder) == folder / "drafter"
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "nothing to train" in capsys.readouterr().err


def copied(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "run")


@pytest.mark.parametrize("finished", [True, False])
def test_other_data_does_not_go_on_with_a_run(whole_run, tmp_path, finished):
    folder = copied(whole_run, tmp_path)
    if not finished:
        shutil.rmtree(folder / "drafter")
    other = tiny.examples()
    other[3].tokens[5] += 1
    unmarked = tiny.examples()
    unmarked[3].supervised[5] ^= True
    for examples, count in ((other, 20), (unmarked, 20), (tiny.examples()[:19], 19)):
        message = f"a run on other data, 20 sequences .now {count}; .*--initial"
        with pytest.raises(ValueError, match=message):
            train(tiny.CONFIG, tiny.target(), examples, folder)


def test_another_target_does_not_go_on_with_a_run(whole_run, tmp_path):
    folder, target = copied(whole_run, tmp_path), tiny.target()
    tuned = jax.tree.map(lambda x: x * 1.1, target.params)
    with pytest.raises(ValueError, match="of another target, 'tiny'"):
        train(tiny.CONFIG, dataclasses.replace(target, params=tuned), tiny.examples(), folder)
    moved = dataclasses.replace(target, name="elsewhere")
    assert train(tiny.CONFIG, moved, tiny.examples(), folder) == folder / "drafter"


def test_one_process_trains_in_a_folder(tmp_path):
    with claimed(tmp_path / "run", "wait"):
        with pytest.raises(ValueError, match="another process is writing .*run; wait"):
            train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path / "run")


def test_more_steps_go_on_with_a_finished_run(whole_run, tmp_path):
    folder = copied(whole_run, tmp_path)
    before = (folder / "drafter" / "model.safetensors").read_bytes()
    longer = dataclasses.replace(tiny.CONFIG, steps=14)
    assert train(longer, tiny.target(), tiny.examples(), folder) == folder / "drafter"
    steps = steps_of(folder)
    assert [x["step"] for x in steps] == list(range(1, 15))
    assert steps[:12] == steps_of(whole_run)
    assert steps[12]["learning_rate"] > steps[11]["learning_rate"]  # a longer cosine
    assert (folder / "drafter-12" / "model.safetensors").read_bytes() == before
    assert (folder / "drafter" / "model.safetensors").read_bytes() != before
    with pytest.raises(ValueError, match=r"other settings \(steps differ\)"):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), folder)


def test_a_run_that_cannot_start_leaves_its_folder_as_it_was(whole_run, tmp_path):
    folder = copied(whole_run, tmp_path)
    files = sorted(folder.rglob("*"))
    settings, lines = (folder / "config.json").read_text(), tiny.metrics(folder)
    with pytest.raises(ValueError, match="has no checkpoint 3"):
        train(with_rate(1e-3), tiny.target(), tiny.examples(), folder, resume_step=3)
    assert sorted(folder.rglob("*")) == files
    assert (folder / "config.json").read_text() == settings and tiny.metrics(folder) == lines
    assert train(tiny.CONFIG, tiny.target(), tiny.examples(), folder) == folder / "drafter"


def test_settings_may_change_until_something_was_trained(whole_run, tmp_path):
    packed = dataclasses.replace(tiny.CONFIG, packed=64, draft_vocab=9)
    with pytest.raises(ValueError, match="does not fit a packed row of 64; .*pack longer rows"):
        train(packed, tiny.target(), tiny.examples(), tmp_path)
    enter(tmp_path, described(packed, tiny.target(), tiny.examples(5)))  # killed before a save
    (tmp_path / "draft_vocabulary.json").write_text('{"token_ids": [1, 2, 3]}')
    train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path)
    assert read_json(tmp_path / "config.json") == read_json(whole_run / "config.json")
    assert not (tmp_path / "draft_vocabulary.json").exists()
    assert losses(tmp_path) == losses(whole_run)


def test_a_finished_run_without_checkpoints_does_not_start_anew(whole_run, tmp_path):
    folder = copied(whole_run, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    longer = dataclasses.replace(tiny.CONFIG, steps=14)
    with pytest.raises(ValueError, match="checkpoints holds no checkpoint"):
        train(longer, tiny.target(), tiny.examples(), folder)
    assert (folder / "drafter").exists()


PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(dtype="bfloat16"), "dtype"),
        (dict(features_dtype="bfloat16"), "features_dtype"),
        (dict(prompts=PROMPTS[:1]), "validation"),
        (dict(prompts=()), "validation"),
    ],
)
def test_what_a_run_reads_stays_the_same(tmp_path, change, name):
    def run(dtype="float32", **options):
        params = jax.tree.map(lambda x: x.astype(dtype), tiny.target().params)
        target = dataclasses.replace(tiny.target(), params=params)
        return described(tiny.CONFIG, target, tiny.examples(), **options)

    enter(tmp_path, run(prompts=PROMPTS))
    assert not check_run(tmp_path, run(prompts=PROMPTS, features_dtype="float32"))
    with pytest.raises(ValueError, match=rf"a run with other settings \({name}.* differ\)"):
        check_run(tmp_path, run(**dict(prompts=PROMPTS) | change))
    older = read_json(tmp_path / "config.json")
    del older[name]
    enter(tmp_path, older)
    check_run(tmp_path, run(**dict(prompts=PROMPTS, features_dtype="float32") | change))


def test_prompts_that_cannot_be_answered_are_refused_before_training(tmp_path):
    for prompt, message in ([99], "token id 99"), ([1] * 40960, "the target has 40960"):
        with pytest.raises(ValueError, match=message):
            prompts = [[1, 2, 3], prompt]
            train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path, prompts=prompts)
    assert not any(tmp_path.iterdir())


def test_a_validation_that_fails_loses_no_step(whole_run, tmp_path, monkeypatch):
    folder = copied(whole_run, tmp_path)
    for last in (folder / "drafter", folder / "checkpoints" / "12"):
        shutil.rmtree(last)

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("jaxspec.training.trainer.walked_tau", broken)
    arguments = tiny.CONFIG, tiny.target(), tiny.examples(), folder
    with pytest.raises(RuntimeError, match="out of memory"):
        train(*arguments, prompts=PROMPTS)
    monkeypatch.setattr("jaxspec.training.trainer.walked_tau", lambda *_, **__: 1.5)
    monkeypatch.setattr("jaxspec.training.trainer.train_step", broken)  # not again
    assert train(*arguments, prompts=PROMPTS) == folder / "drafter"
    assert tiny.metrics(folder)[-1] == {"step": 12, "tau": 1.5}


def with_rate(rate):
    return dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(learning_rate=rate))


def test_what_a_lost_run_is_told_works(whole_run, tmp_path):
    folder = copied(whole_run, tmp_path)
    with pytest.raises(ValueError, match="optimizer differ.*--resume-step"):
        train(with_rate(0.005), tiny.target(), tiny.examples(), folder)
    lower = with_rate(0.005)
    train(lower, tiny.target(), tiny.examples(), folder, resume_step=6)
    steps, before = steps_of(folder), steps_of(whole_run)
    assert steps[:6] == before[:6]
    assert [x["step"] for x in steps] == list(range(1, 13))
    np.testing.assert_allclose(
        [x["learning_rate"] for x in steps[6:]], [x["learning_rate"] / 2 for x in before[6:]]
    )
    assert train(lower, tiny.target(), tiny.examples(), folder) == folder / "drafter"


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_run_that_is_lost_says_how_to_go_on(whole_run, tmp_path, monkeypatch, name):
    folder = copied(whole_run, tmp_path)
    shutil.rmtree(folder / "drafter")
    for step in (8, 10, 12):
        shutil.rmtree(folder / "checkpoints" / str(step))

    def spoilt(*arguments):
        state, means = train_step(*arguments)
        return state, means | {name: jnp.float32(np.nan)}

    monkeypatch.setattr("jaxspec.training.trainer.train_step", spoilt)
    message = (
        f"the {name.replace('_', ' ')} of step 7 is nan; resume from an earlier checkpoint "
        r"\(2, 4, 6\) with a lower rate: --resume-step 2 --learning-rate 0.005"
    )
    with pytest.raises(ValueError, match=message):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), folder)


def test_weights_that_were_spoilt_are_not_exported(whole_run, tmp_path, monkeypatch):
    folder = copied(whole_run, tmp_path)
    shutil.rmtree(folder / "drafter")
    restore = Store.restore

    def spoilt(self, like, step=None):
        step, state, position = restore(self, like, step)
        state.weights.fc = state.weights.fc.replace(state.weights.fc[...] * 1e30)
        return step, state, position

    monkeypatch.setattr(Store, "restore", spoilt)
    with pytest.raises(ValueError, match="'fc.weight' holds .*; resume from an earlier"):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), folder)
    assert not (folder / "drafter").exists()


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
    _, params = load_drafter(folder / "drafter", target.config, target.params, TreeConfig())
    weights, kept = initial_drafter(config, target)
    assert kept is None
    jax.tree.map(np.testing.assert_array_equal, weights, params.head)
    train(config, target, tiny.examples(), tmp_path / "again")
    assert steps_of(tmp_path / "again")[0]["loss"] < steps_of(folder)[0]["loss"]
    other = dataclasses.replace(config.drafter, causal=True)
    with pytest.raises(ValueError, match=r"causal \(False.*, expected \(True"):
        initial_drafter(dataclasses.replace(config, drafter=other), target)
    missing = dataclasses.replace(config, initial=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="nothing"):
        train(missing, target, tiny.examples(), tmp_path / "never")


def test_settings_added_later_had_their_defaults(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["packed"]
    path.write_text(json.dumps(settings))
    assert train(tiny.CONFIG, tiny.target(), tiny.examples(), folder) == folder / "drafter"
    with pytest.raises(ValueError, match=r"\(packed differ\)"):
        packed = dataclasses.replace(tiny.CONFIG, packed=128)
        train(packed, tiny.target(), tiny.examples(), folder)


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
    steps = steps_of(tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"]
    loaded, params = load_drafter(folder, target.config, target.params, TreeConfig())
    assert loaded.config == drafter
    before = nnx.to_pure_dict(init_state(config, target.params).weights)["sequential"]
    after = nnx.to_pure_dict(params.head)["sequential"]
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
    steps = steps_of(tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert load_drafter(folder, config, target.params, TreeConfig())[0].config == tiny.DRAFTER


def test_what_no_format_can_say_is_refused_before_training(tmp_path):
    drafter = dataclasses.replace(
        tiny.DRAFTER, sequential="mlp", rank=0, confidence=None, predict_next=True
    )
    config = dataclasses.replace(tiny.CONFIG, drafter=drafter)
    with pytest.raises(ValueError, match="'treeflash' has no key for predict_next"):
        train(config, tiny.target(), tiny.examples(), tmp_path / "run")
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
    _, params = load_drafter(folder, target.config, target.params, TreeConfig())
    state = init_state(config, target.params)
    _, best, _ = Store(tmp_path / "checkpoints").restore(state, 2)
    jax.tree.map(np.testing.assert_array_equal, params.head, best.weights)
