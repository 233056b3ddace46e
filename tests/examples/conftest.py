"""Runs of the scripts in examples/gpu."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "gpu"


@pytest.fixture
def script(monkeypatch):
    """script(name) -> its module; the scripts import one another by bare names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def run(script, tmp_path):
    """run(name, *arguments) -> (exit status, rows without headers)."""

    def of(name, *arguments):
        out = tmp_path / f"{name}.jsonl"
        seen = len(out.read_text().splitlines()) if out.exists() else 0
        status = script(name).main([*map(str, arguments), "--out", str(out), "--threads", "2"])
        rows = [json.loads(line) for line in out.read_text().splitlines()[seen:]]
        header, *rows = rows
        assert header["header"] and header["jax"] and header["command"]
        return status, rows

    return of
