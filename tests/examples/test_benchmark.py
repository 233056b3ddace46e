"""`make bench`: its questions are read before a model is loaded."""

import pytest

import jaxspec
from examples import benchmark


def test_a_clone_has_questions_of_its_own():
    own = benchmark.QUESTIONS
    assert benchmark.prompts(None, 2) == {"questions": [own[0], own[2]]}


def test_a_folder_without_the_sets(monkeypatch, tmp_path):
    monkeypatch.setattr(jaxspec, "load_target", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="gsm8k.jsonl"):
        benchmark.main(benchmark.Options(folder=tmp_path))
