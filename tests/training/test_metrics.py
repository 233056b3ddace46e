"""What a run writes about itself."""

import json
import sys

import pytest

from jaxspec.training.metrics import MetricsLog


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
