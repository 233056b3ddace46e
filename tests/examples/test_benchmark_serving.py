"""The benchmark of the server's engine, end to end with a tiny target."""

import json

import pytest

import jaxspec
from examples.benchmark_serving import Benchmark, main
from tests.serving import structured


@pytest.mark.slow
def test_every_way_takes_its_turns_at_every_load(tmp_path, monkeypatch):
    target = structured.target()
    monkeypatch.setattr(jaxspec, "load_target", lambda *_, **options: target)
    output, schema = tmp_path / "serving.json", tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    main(
        Benchmark(
            output,
            schema=schema,
            dtype="float32",
            users=(1, 2),
            turns=1,
            max_new_tokens=6,
            chain=2,
            trees=(2,),
            max_nodes=4,
            room=128,
            top_logprobs=2,
        )
    )
    found = json.loads(output.read_text())
    ways = ["none", "fixed chain", "fixed tree of 2", "adaptive"]
    assert sorted((row["users"], row["way"]) for row in found["measured"]) == sorted(
        (users, way) for users in (1, 2) for way in ways
    )
    assert all(row["tokens_per_second"] > 0 for row in found["measured"])
    assert output.with_suffix(".png").stat().st_size > 0
