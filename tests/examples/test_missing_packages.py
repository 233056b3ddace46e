"""Scripts that lack a package say so in one sentence, before anything is measured."""

import importlib
import sys

import pytest

import jaxspec
from examples.benchmark_serving import Benchmark, main


@pytest.mark.parametrize("script", ["chat_turns", "load_server"])
def test_clients_need_openai(monkeypatch, script):
    monkeypatch.setitem(sys.modules, "openai", None)  # as if not installed
    monkeypatch.delitem(sys.modules, f"examples.{script}", raising=False)
    with pytest.raises(SystemExit, match="this script needs openai: pip install openai"):
        importlib.import_module(f"examples.{script}")


def test_the_benchmark_of_the_server_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(jaxspec, "load_target", None)  # nothing is loaded
    with pytest.raises(ValueError, match="pictures need matplotlib: pip install matplotlib"):
        main(Benchmark(tmp_path / "serving.json"))
