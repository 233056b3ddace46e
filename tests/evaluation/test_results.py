"""Files of results: which run may add to one."""

import json

import pytest

from jaxspec.evaluation.results import RunSettings, Verify, append, held, key, resume


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"top_k": 3}, {"top_k": 4}, "top_k was 3, now it is 4; choose another name, or give"),
        ({"top_k": 3}, {}, "top_k was 3, now it is not given; choose another name"),
        ({}, {"top_k": 3}, "it does not say top_k, which now is 3 .the file is from"),
    ],
)
def test_another_setup_is_refused_by_what_differs(tmp_path, then, now, message):
    path = tmp_path / "results.jsonl"
    append(path, RunSettings({"count": 2} | then))
    assert held(path, RunSettings({"count": 2} | then)) == {key(RunSettings({}))}
    with pytest.raises(ValueError, match=f"results of another setup: {message}"):
        held(path, RunSettings({"count": 2} | now))


def test_a_run_goes_on_after_the_rows_that_its_file_holds(tmp_path):
    path, setup, known = tmp_path / "results.jsonl", RunSettings({}), []
    half = Verify("float32", {"1": 10.0})
    append(path, setup)
    append(path, half)
    path.write_text(path.read_text() + '{"dtype": "bfl')  # interrupted

    def measure(done):
        known.extend(done)
        yield Verify("float32", {"1": 11.0})
        yield from [Verify("bfloat16", {"1": 5.0})] * 2

    resume(path, setup, measure)
    assert set(known) == {("setup",), ("verify", "float32")}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("ms") for line in lines] == [None, {"1": 10.0}, {"1": 5.0}]
