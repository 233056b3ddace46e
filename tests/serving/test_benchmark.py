"""What `examples/benchmark_serving.py` makes of its turns, against sums done by hand."""

import pytest

from examples import benchmark_serving as b


def turn(users, way, number, rate, ms=10.0):
    times = {"per_token": [1e-3 * ms, 0, 0], "first_token": [0.5, 0, 0]}
    return {"users": users, "way": way, "turn": number, "tokens_per_second": rate} | times


# The machine is twice as slow in turn 1 as in turn 0, and all ways with it.
TURNS = [
    turn(1, "none", 0, 20.0),
    turn(1, "fixed tree", 0, 40.0, ms=4.0),
    turn(1, "adaptive", 0, 44.0),
    turn(1, "fixed tree", 1, 20.0, ms=8.0),
    turn(1, "adaptive", 1, 20.0),
    turn(1, "none", 1, 10.0),
    turn(8, "adaptive", 0, 90.0),
    turn(8, "none", 0, 100.0),
    turn(8, "fixed tree", 0, 50.0),
]


def test_medians_and_spread_in_the_ways_own_order():
    rows = b.medians(TURNS)
    order = ("none", "fixed tree", "adaptive")
    assert [(row["users"], row["way"]) for row in rows] == [
        (n, w) for n in (1, 8) for w in order
    ]
    tree = rows[1]
    assert tree["tokens_per_second"] == 30.0 and tree["tokens_per_second_spread"] == [
        20.0,
        40.0,
    ]
    assert tree["ms_per_token"] == pytest.approx(6.0)
    assert tree["ms_to_first"] == pytest.approx(500.0)


def test_ratios_compare_turns_that_ran_beside_each_other():
    one, eight = b.ratios_of(TURNS)
    assert (one["users"], one["best_fixed"]) == (1, "fixed tree")
    assert one["ratio"] == pytest.approx(1.05)  # of 1.1 and 1.0, the drift cancelled
    assert one["spread"] == pytest.approx([1.0, 1.1])
    assert (eight["best_fixed"], eight["ratio"]) == ("none", pytest.approx(0.9))


def test_table_has_every_load_and_way():
    text = b.table(b.medians(TURNS), b.ratios_of(TURNS))
    assert (
        "| 1 | fixed tree | 30.0 (20.0 … 40.0) | 6.0 (4.0 … 8.0) | 500.0 (500.0 … 500.0) |"
        in text
    )
    assert "| 8 | none | 0.90 (0.90 … 0.90) |" in text


def test_ways_take_turns_in_rotated_order(monkeypatch, tmp_path):
    monkeypatch.setattr(b, "measure", lambda runner, asked, users: {"tokens_per_second": 1.0})
    options = b.Benchmark(tmp_path / "x.json", users=(1, 2), turns=3)
    names = ["none", "fixed chain", "fixed tree", "adaptive"]
    turns = list(b.take_turns(options, [[1]], None, dict.fromkeys(names)))
    assert len(turns) == 2 * 3 * 4
    for users in (1, 2):
        own = [row["way"] for row in turns if row["users"] == users]
        firsts = own[::4]
        assert len(set(firsts)) == 3 and all(
            set(own[i : i + 4]) == set(names) for i in (0, 4, 8)
        )
