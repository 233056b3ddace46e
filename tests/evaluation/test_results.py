"""Files of results: which run may add to one."""

import pytest

from jaxspec.evaluation.results import RunSettings, append, held, key


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
