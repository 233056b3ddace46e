"""Which rows a measurement has, and under which names."""

import types

import numpy as np
import pytest

from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.evaluation import measure, results
from jaxspec.evaluation.contenders import Contender, Entry
from tests import tiny

DEEP, SHALLOW = (LoadedDrafter(PromptLookup(size=8, depth=depth)) for depth in (7, 1))
ANSWER = measure.w.RecordedAnswer(tokens=tuple(range(14)), start=1, limit=12)


@pytest.fixture
def walked(monkeypatch):
    """(size, depth) of every tabulated drafter; each is right about the whole answer."""
    found = []

    def tabulate(observed, answers, loaded, state):
        depth, size = loaded.drafter.depth, loaded.drafter.size
        assert state == f"of {depth}"
        found.append((size, depth))
        nodes = np.tile(np.arange(1, depth + 1), (12, 1))
        return [measure.w.Table(nodes, np.full(12, size), np.full((12, size), -1.0))]

    def observe_batches(target, drafters, answers, **_):
        states = [f"of {x.drafter.depth}" for x in drafters]
        yield answers, types.SimpleNamespace(states=states)

    monkeypatch.setattr(measure.w, "record", lambda *_, **__: [ANSWER])
    monkeypatch.setattr(measure.w, "observe_batches", observe_batches)
    monkeypatch.setattr(measure.w, "tabulate", tabulate)
    return found


def entry(name, budget, loaded=DEEP):
    return Entry(Contender(name, "ngram", budget=budget), tiny.target(), loaded)


def test_alike_contenders_are_walked_once_under_their_own_names(walked):
    entries = [entry("small", 2), entry("large", 4), entry("again", 4)]
    rows = list(measure.tau(entries, {"sums": [[1]]}, budgets=(3,)))
    assert walked == [(4, 7)]
    assert [(row.decoder, row.budget) for row in rows if row.kind == "reliability"] == [
        *(("small", 3), ("large", 4), ("again", 4)),
    ]
    rounds = [row.to_dict() for row in rows if row.kind == "rounds"]
    assert [(row["decoder"], row["budget"], row["tau"]) for row in rounds] == [
        *(("small", 2, 2.0), ("small", 3, 3.0), ("large", 4, 4.0), ("again", 4, 4.0)),
    ]
    known = {results.key(row) for row in rows}
    assert not list(measure.tau(entries, {"sums": [[1]]}, budgets=(3,), done=known))


def test_loaded_drafters_of_one_kind_are_told_apart(walked):
    entries = [entry("deep", 4), entry("shallow", 4, SHALLOW)]
    rows = list(measure.tau(entries, {"sums": [[1]]}))
    taus = {row.decoder: row.to_dict()["tau"] for row in rows if row.kind == "rounds"}
    assert sorted(walked) == [(4, 1), (4, 7)]
    assert taus == {"deep": 4.0, "shallow": 2.0}
