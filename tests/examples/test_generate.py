"""`make generate` and the comparison of defaults, on a tiny target."""

import pytest

import jaxspec
from examples import defaults, generate
from jaxspec.dtypes import Fastest
from jaxspec.models.target import Target
from tests import tiny
from tests.serving import servers


@pytest.fixture
def target(monkeypatch, tmp_path):
    model = tiny.target()
    target = Target("tiny", model.config, model.params, servers.tokenizer())
    monkeypatch.setattr(jaxspec, "load_target", lambda *_, **__: target)
    monkeypatch.setattr(jaxspec, "enable_compilation_cache", lambda: None)
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path))
    return target


SHORT = dict(nodes=4, max_new_tokens=12)


def test_generate_proves_that_tokens_are_the_same(target, monkeypatch, capsys):
    monkeypatch.setattr(generate, "fastest", lambda: Fastest("float32", ""))
    assert generate.main(generate.Options("abcab", drafter="ngram", **SHORT)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "float32: " in out and "the same tokens, as it must be" in out
    assert "fastest of both: plain " in out


@pytest.mark.slow
def test_defaults_have_a_row_per_way(target, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(defaults, "DRAFTERS", ("none", "ngram"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abcab"}\n{"prompt": "cbacb"}\n')
    options = defaults.Options(prompts=tmp_path / "prompts.jsonl", repeats=1, **SHORT)
    defaults.main(options)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    ways = [(row[0].strip("| "), *row[1:3]) for row in rows]
    assert ways == [
        (dtype, *way)
        for dtype in ("float32", "bfloat16")
        for way in (("none", "fixed"), ("ngram", "fixed"), ("ngram", "adaptive"))
    ]
    assert all(row[-1] == "2/2 |" for row in rows)
    assert rows[0][4] == "1.00x" and rows[0][5] == "1.00"
