"""`train --config run.toml` is every flag in a file."""

import tomllib
from pathlib import Path

import pytest
import tyro

from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT
from jaxspec.cli.run_config import expanded, settings_of
from jaxspec.cli.train import Train
from jaxspec.training.run_folder import write_flags

FLAGS = {
    "data": ["a b.jsonl", "owner/name::train[:9]"],
    "output": "run",
    "steps": 7,
    "learning_rate": 1e-05,
    "taps": [0, 2],
    "causal": True,
    "any_target": True,
    "tensorboard": False,
    "family": "jetspec",
    "features": "kept",
}


def parsed(*words):
    return tyro.cli(Train, args=expanded(Train, words))


@pytest.fixture
def file(tmp_path):
    write_flags(tmp_path, FLAGS)
    return str(tmp_path / "run.toml")


def test_every_kind_of_flag_is_read(file):
    train = parsed("--config", file)
    assert train.data == ("a b.jsonl", "owner/name::train[:9]")
    assert (train.output, train.features) == (Path("run"), Path("kept"))
    assert (train.steps, train.learning_rate, train.taps) == (7, 1e-5, (0, 2))
    assert (train.causal, train.any_target, train.tensorboard) == (True, True, False)
    assert (train.family, train.block_size) == ("jetspec", None)


@pytest.mark.parametrize("place", [0, 4], ids=["first", "last"])
def test_the_command_line_wins(file, place):
    words = ["--steps=3", "--no-any-target", "--data", "x"]
    words[place:place] = [f"--config={file}"]
    train = parsed(*words, "--learning_rate", "2e-5")
    assert (train.steps, train.any_target, train.data) == (3, False, ("x",))
    assert (train.learning_rate, train.taps) == (2e-5, (0, 2))


def test_what_is_written_reads_back(file, tmp_path):
    train = parsed("--config", file, "--resume-step", "4")
    write_flags(tmp_path, settings_of(train))
    text = (tmp_path / "run.toml").read_text()
    assert tomllib.loads(text).items() >= FLAGS.items()
    again = parsed("--config", file)
    assert settings_of(again) == settings_of(train)
    assert again.resume_step is None  # it belongs to one call


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("step = 3", "unknown key 'step'; did you mean 'steps'?"),
        ("batch-size = 3", "unknown key 'batch-size'; did you mean 'batch_size'?"),
        ("config = 'x'", "unknown key 'config'; did you mean"),
        ("[steps]\na = 1", "'steps' is {'a': 1}; expected text, a number"),
        ("steps = 2026-11-26", "'steps' is datetime.date(2026, 11, 26); expected text"),
        ("steps = ", "is not TOML"),
    ],
)
def test_other_files_are_one_line(tmp_path, capsys, text, error):
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == BAD_INPUT
    told = capsys.readouterr().err
    assert error in told and told.count("\n") == 1


def test_a_missing_file(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == BAD_INPUT
    assert "cannot read --config" in capsys.readouterr().err


def test_other_commands_have_no_such_file():
    from jaxspec.cli.overlap import OverlapCheck

    words = ["--config", "x.toml"]
    assert expanded(OverlapCheck, words) == words
