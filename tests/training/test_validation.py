"""The prompts of a validation: those that the target can answer, in the mode of the data."""

import dataclasses
import json

import numpy as np
import pytest

from jaxspec.cli.exits import INTERRUPTED
from jaxspec.cli.train import Train
from jaxspec.training.run_folder import CONFIG
from jaxspec.training.validation import prompt_rows, thinking_of
from tests.data.test_conversations import tokenizer
from tests.training import tiny

SWITCH = "{{ 'plain' if enable_thinking is defined and not enable_thinking else 'think' }}"


@pytest.fixture
def target():
    small = dataclasses.replace(tiny.TARGET_CONFIG, max_positions=72)
    words = tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}" + SWITCH)
    return dataclasses.replace(tiny.target(), config=small, tokenizer=words)


def in_modes(*modes):
    example = tiny.examples(1)[0]
    return [dataclasses.replace(example, thinking=mode) for mode in modes]


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ([False, False], False),
        ([True], True),
        ([None, None], None),
        ([True, False], None),
        ([False, None], None),
    ],
)
def test_the_mode_is_the_one_that_all_examples_have(modes, expected):
    assert thinking_of(in_modes(*modes)) is expected


@pytest.mark.parametrize(
    ("given", "modes", "mode"),
    [
        (None, (False, False), "plain"),
        (None, (False, True), "think"),
        (False, (True,), "plain"),
        (True, (False,), "think"),
    ],
)
def test_prompts_that_cannot_be_answered_are_left_out(
    target, tmp_path, capsys, given, modes, mode
):
    """A prompt, its mode and 64 new tokens have 72 positions."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a " * n}) for n in (7, 8)))
    train = Train(("data.jsonl",), tmp_path, thinking=given)
    (row,) = train._prompts(path, target, in_modes(*modes))
    assert target.tokenizer.decode(row) == "a " * 7 + mode
    assert "left out: prompt 1: a prompt of 9 tokens and 64 new" in capsys.readouterr().err


@pytest.mark.parametrize("asked, found", [([0, 1, 2], 3), ([1], 1), ([], 0)])
def test_prompts_that_the_data_answers_are_counted(recwarn, asked, found):
    examples = [
        dataclasses.replace(x, supervised=np.arange(len(x)) >= 5) for x in tiny.examples(3)
    ]
    prompts = [examples[i].tokens[:5].tolist() for i in asked]
    near = [examples[0].tokens[:4].tolist(), examples[0].tokens[:6].tolist()]
    rows = [*prompts, *near]
    assert prompt_rows(tiny.target(), rows, examples) == rows
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == bool(found)
    assert all(f"{found} of {found + 2} validation prompts are answered" in x for x in said)


@pytest.mark.parametrize(
    ("step", "told"), [(None, "the same command resumes"), (4, "command without --resume-step")]
)
def test_an_interrupted_command_says_how_to_go_on(
    target, tmp_path, monkeypatch, capsys, step, told
):
    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: tmp_path)
    monkeypatch.setattr("jaxspec.checkpoints.read_config", lambda _: target.config)
    monkeypatch.setattr("jaxspec.load_target", lambda *_, **__: target)
    monkeypatch.setattr("jaxspec.data.rows.read_examples", lambda *_, **__: in_modes(None))
    monkeypatch.setattr("jaxspec.training.trainer.train", lambda *_, **__: None)
    options = dict(target="tiny", mask_token_id=23, taps=(0, 1), resume_step=step)
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    (tmp_path / CONFIG).write_text("{}")  # a run has begun
    assert Train((str(data),), tmp_path, **options).run() == INTERRUPTED
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(mask_token_id=None), "target 'tiny' has no preset"),
        (dict(batch_size=4), "micro_batch"),
        (dict(data=("missing.jsonl",)), "missing.jsonl"),
        (dict(validation="missing.jsonl"), "missing.jsonl"),
        (dict(validate_every=5), "--validate-every has no prompts"),
        (dict(features_dtype="bfloat16"), "--features-dtype has no cache"),
        (dict(family="dflash", rank=7), "--rank is 7, but this drafter has no head"),
    ],
)
def test_what_the_command_gets_wrong_is_found_before_weights_are_loaded(
    target, tmp_path, monkeypatch, options, error
):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: tmp_path)
    monkeypatch.setattr("jaxspec.checkpoints.read_config", lambda _: target.config)
    monkeypatch.setattr("jaxspec.load_target", load)
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    usual = dict(data=(str(data),), target="tiny", mask_token_id=23, taps=(0, 1))
    with pytest.raises(ValueError, match=error):
        Train(output=tmp_path / "run", **usual | options).run()
    with pytest.raises(AssertionError, match="loaded"):
        Train(output=tmp_path / "run", **usual).run()
