"""Which runs go on in a folder: what must be the same, and what a run leaves alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxspec.checkpoints.store import Store, ocp
from jaxspec.checkpoints.tensors import read_json
from jaxspec.locks import claimed
from jaxspec.training.recipe import OptimizerConfig
from jaxspec.training.run_folder import check_run, described, enter
from jaxspec.training.trainer import train
from tests.training import tiny

PROMPTS = [[1, 2, 3], [4, 5]]


def with_rate(rate):
    return dataclasses.replace(tiny.CONFIG, optimizer=OptimizerConfig(learning_rate=rate))


def test_other_settings_do_not_go_on_with_a_run(whole_run):
    folder = whole_run
    other = dataclasses.replace(tiny.CONFIG, anchors=5, seed=1)
    with pytest.raises(ValueError, match=r"other settings \(anchors, seed differ\)"):
        train(other, tiny.target(), tiny.examples(), folder)


def test_settings_added_later_had_their_defaults(copied):
    path = copied / "config.json"
    settings = json.loads(path.read_text())
    del settings["packed"]
    path.write_text(json.dumps(settings))
    assert train(tiny.CONFIG, tiny.target(), tiny.examples(), copied) == copied / "drafter"
    with pytest.raises(ValueError, match=r"\(packed differ\)"):
        packed = dataclasses.replace(tiny.CONFIG, packed=128)
        train(packed, tiny.target(), tiny.examples(), copied)


def test_a_finished_run_is_left_as_it_is(whole_run, capsys):
    folder = whole_run
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(tiny.CONFIG, tiny.target(), tiny.examples(), folder) == folder / "drafter"
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert "nothing to train" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [True, False])
def test_other_data_does_not_go_on_with_a_run(copied, finished):
    if not finished:
        shutil.rmtree(copied / "drafter")
    other = tiny.examples()
    other[3].tokens[5] += 1
    unmarked = tiny.examples()
    unmarked[3].supervised[5] ^= True
    for examples, count in ((other, 20), (unmarked, 20), (tiny.examples()[:19], 19)):
        message = f"a run on other data, 20 sequences .now {count}; .*--initial"
        with pytest.raises(ValueError, match=message):
            train(tiny.CONFIG, tiny.target(), examples, copied)


def test_another_target_does_not_go_on_with_a_run(copied):
    target = tiny.target()
    tuned = jax.tree.map(lambda x: x * 1.1, target.params)
    with pytest.raises(ValueError, match="of another target, 'tiny'"):
        train(tiny.CONFIG, dataclasses.replace(target, params=tuned), tiny.examples(), copied)
    moved = dataclasses.replace(target, name="elsewhere")
    assert train(tiny.CONFIG, moved, tiny.examples(), copied) == copied / "drafter"


def test_one_process_trains_in_a_folder(tmp_path):
    with claimed(tmp_path / "run", "wait"):
        with pytest.raises(ValueError, match="another process is writing .*run; wait"):
            train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path / "run")


def test_more_steps_go_on_with_a_finished_run(whole_run, copied):
    before = (copied / "drafter" / "model.safetensors").read_bytes()
    longer = dataclasses.replace(tiny.CONFIG, steps=14)
    assert train(longer, tiny.target(), tiny.examples(), copied) == copied / "drafter"
    steps = tiny.steps(copied)
    assert [x["step"] for x in steps] == list(range(1, 15))
    assert steps[:12] == tiny.steps(whole_run)
    assert steps[12]["learning_rate"] > steps[11]["learning_rate"]  # a longer cosine
    assert (copied / "drafter-12" / "model.safetensors").read_bytes() == before
    assert (copied / "drafter" / "model.safetensors").read_bytes() != before
    with pytest.raises(ValueError, match=r"other settings \(steps differ\)"):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), copied)


def test_a_run_that_cannot_start_leaves_its_folder_as_it_was(copied):
    files = sorted(copied.rglob("*"))
    settings, lines = (copied / "config.json").read_text(), tiny.metrics(copied)
    with pytest.raises(ValueError, match="has no checkpoint 3"):
        train(with_rate(1e-3), tiny.target(), tiny.examples(), copied, resume_step=3)
    assert sorted(copied.rglob("*")) == files
    assert (copied / "config.json").read_text() == settings and tiny.metrics(copied) == lines
    assert train(tiny.CONFIG, tiny.target(), tiny.examples(), copied) == copied / "drafter"


def test_a_run_that_has_not_begun_has_no_step_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="resume_step is 7, but no run has begun in .*; leave"):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path / "new", resume_step=7)
    assert not (tmp_path / "new").exists()


def test_settings_may_change_until_something_was_trained(whole_run, tmp_path):
    packed = dataclasses.replace(tiny.CONFIG, packed=64, draft_vocab=9)
    with pytest.raises(ValueError, match="does not fit a packed row of 64; .*pack longer rows"):
        train(packed, tiny.target(), tiny.examples(), tmp_path)
    enter(tmp_path, described(packed, tiny.target(), tiny.examples(5)))  # killed before a save
    (tmp_path / "draft_vocabulary.json").write_text('{"token_ids": [1, 2, 3]}')
    train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path)
    assert read_json(tmp_path / "config.json") == read_json(whole_run / "config.json")
    assert not (tmp_path / "draft_vocabulary.json").exists()
    assert tiny.losses(tmp_path) == tiny.losses(whole_run)


def test_a_finished_run_without_checkpoints_does_not_start_anew(copied):
    shutil.rmtree(copied / "checkpoints")
    longer = dataclasses.replace(tiny.CONFIG, steps=14)
    with pytest.raises(ValueError, match="checkpoints holds no checkpoint"):
        train(longer, tiny.target(), tiny.examples(), copied)
    assert (copied / "drafter").exists()


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


def test_a_return_that_is_killed_mixes_no_checkpoints(copied, monkeypatch):
    """The newest are deleted first, and the new rate is written last."""
    delete, lower = ocp.training.Checkpointer.delete, with_rate(0.005)

    def killed(self, step):
        if step == 10:
            raise KeyboardInterrupt
        delete(self, step)

    monkeypatch.setattr(ocp.training.Checkpointer, "delete", killed)
    arguments = lower, tiny.target(), tiny.examples(), copied
    with pytest.raises(KeyboardInterrupt):
        train(*arguments, resume_step=6)
    assert Store(copied / "checkpoints").steps == [2, 4, 6, 8, 10]
    with pytest.raises(ValueError, match="optimizer differ.*--resume-step"):
        train(*arguments)


def test_what_a_lost_run_is_told_works(whole_run, copied):
    with pytest.raises(ValueError, match="optimizer differ.*--resume-step"):
        train(with_rate(0.005), tiny.target(), tiny.examples(), copied)
    lower = with_rate(0.005)
    train(lower, tiny.target(), tiny.examples(), copied, resume_step=6)
    steps, before = tiny.steps(copied), tiny.steps(whole_run)
    assert steps[:6] == before[:6]
    assert [x["step"] for x in steps] == list(range(1, 13))
    np.testing.assert_allclose(
        [x["learning_rate"] for x in steps[6:]], [x["learning_rate"] / 2 for x in before[6:]]
    )
    assert train(lower, tiny.target(), tiny.examples(), copied) == copied / "drafter"
