"""What a run writes about itself."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from jaxspec.training.metrics import MetricsLog, peak_memory
from jaxspec.training.trainer import train
from tests.training import tiny


def test_lines_of_steps_computed_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, after=0)
    for step in (1, 2, 3):
        first.write(step, loss=0.5)
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # as kill -9 leaves it
    MetricsLog(path, after=2).write(3, loss=0.25, acceptance=[0.5, 0.75])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25, "acceptance": [0.5, 0.75]},
    ]


def test_a_history_is_kept_until_its_copy_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, after=0).write(1, loss=0.5)
    monkeypatch.delattr(os, "replace")  # as if killed before it
    MetricsLog(path, after=1)  # drops no line
    with pytest.raises(AttributeError):
        MetricsLog(path, after=0)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_tensorboard_gets_the_same_numbers(tmp_path):
    proto = pytest.importorskip("tensorboardX.proto.event_pb2", reason="no tensorboardX")
    events = tmp_path / "tensorboard"
    metrics = MetricsLog(tmp_path / "metrics.jsonl", after=0, tensorboard=events)
    metrics.write(7, loss=0.5, acceptance=[0.25, 0.75])
    metrics.close()
    (file,) = events.iterdir()
    found, content = {}, file.read_bytes()
    while content:  # length, its checksum, an event, its checksum
        size = int.from_bytes(content[:8], "little")
        event = proto.Event.FromString(content[12 : 12 + size])
        found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        content = content[16 + size :]
    assert found == {
        (7, "loss"): 0.5,
        (7, "acceptance/0"): 0.25,
        (7, "acceptance/1"): 0.75,
    }


def test_tensorboard_without_its_writer_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        MetricsLog(tmp_path / "metrics.jsonl", after=0, tensorboard=tmp_path / "events")


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_gets_the_same_numbers_and_a_resumed_run_its_own_id(tmp_path, monkeypatch):
    runs = []

    def init(**options):
        runs.append(FakeRun(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    folder = tmp_path / "my-run"
    folder.mkdir()
    for step in (1, 2):
        options = dict(wandb="drafters", settings={"steps": 2})
        metrics = MetricsLog(folder / "metrics.jsonl", after=step - 1, **options)
        metrics.write(step, loss=0.5, acceptance=[0.25, 0.75])
        metrics.close()
    first, second = runs
    assert first.logged == [(1, {"loss": 0.5, "acceptance/0": 0.25, "acceptance/1": 0.75})]
    assert second.logged[0][0] == 2 and first.finished and second.finished
    assert first.options == second.options
    assert first.options["project"] == "drafters" and first.options["name"] == "my-run"
    assert first.options["resume"] == "allow" and first.options["config"] == {"steps": 2}


def test_wandb_without_its_library_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="Biases needs wandb: pip install wandb"):
        train(tiny.CONFIG, tiny.target(), tiny.examples(), tmp_path / "run", wandb="x")
    assert not (tmp_path / "run").exists()


def test_the_memory_of_this_process_is_known():
    assert 10**7 < peak_memory() < 10**12
