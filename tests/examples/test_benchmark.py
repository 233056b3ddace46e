"""`make bench`: its questions are read before a model is loaded."""

import sys

import pytest

import jaxspec
from examples import benchmark


def test_a_clone_has_questions_of_its_own():
    own = benchmark.QUESTIONS
    assert benchmark.prompts(None, 2) == {"questions": [own[0], own[2]]}


def test_a_folder_without_the_sets(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jaxspec, "load_target", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert "gsm8k.jsonl" in capsys.readouterr().err
