"""Phases are timed on the programs that decoding runs."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import pytest

from jaxspec.api import generate
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.evaluation import phases
from jaxspec.evaluation.phases import (
    medians_ms,
    phase_costs,
    phase_programs,
    phases_of,
    verify_costs,
)
from jaxspec.evaluation.speed import plain_forms
from tests import tiny
from tests.drafters import cases

TREE = TreeConfig("path_conditioned", size=8, candidates=6)


def test_phases_follow_from_the_times_of_programs():
    ms = {"propose": 5.0, "verify": 7.0, "commit": 1.0}
    plain = {"draft": 5.0, "grow": None, "verify": 7.0, "commit": 1.0}
    assert phases_of(ms) == plain
    assert phases_of(ms | {"pass": 3.5}) == plain | {"draft": 3.5, "grow": 1.5}
    assert phases_of(ms | {"pass": 5.5}) == plain | {"draft": 5.5, "grow": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_programs_are_those_of_a_round(temperature):
    drafter, sampling = cases.loaded("rnn", TREE), Sampling(temperature=temperature)
    parts = phase_programs(tiny.target(), drafter, budget=5, length=20, sampling=sampling)
    assert set(parts) == {"propose", "pass", "verify", "commit"}
    tree = parts["propose"]().tree
    assert int(tree.valid.sum()) == 5  # the budget
    assert parts["pass"]().shape == (1, 4, 11)  # logits of every slot
    before = jax.device_get(parts["verify"]())
    after = parts["commit"]()
    (prompt,) = after.tokens[:, :20].tolist()
    options = dict(max_new_tokens=int(after.length[0]) - 20, drafter=drafter, sampling=sampling)
    (decoded,) = generate(tiny.target(), [prompt], **options)
    assert after.tokens[0, 20 : after.length[0]].tolist() == decoded.token_ids
    assert jax.tree.leaves(before)


def test_a_median_is_of_the_calls_after_the_first():
    calls = []

    def slow_at_first():
        calls.append(0)
        time.sleep(0.5 if len(calls) == 1 else 0.02)

    found = medians_ms({"slow": slow_at_first, "quick": lambda: None}, repeats=3)
    assert len(calls) == 4
    assert 20 <= found["slow"] < 400 and found["quick"] < found["slow"]


@pytest.mark.slow
def test_costs_are_positive():
    drafter = cases.loaded("rnn", TREE)
    phases = phase_costs(tiny.target(), drafter, budget=5, length=20)
    assert list(phases) == ["draft", "grow", "verify", "commit"]
    assert min(phases["draft"], phases["verify"], phases["commit"]) > 0
    form = plain_forms()["plain, 1 row"]
    assert phase_costs(tiny.target(), form, length=20)["grow"] is None


@pytest.mark.parametrize("sizes", [(1, 4), (2,)])
def test_verify_costs(sizes):
    costs = verify_costs(tiny.target(), sizes, length=20)
    assert tuple(costs) == sizes and min(costs.values()) > 0


def test_verify_costs_have_the_caches_of_decoding(monkeypatch):
    caches = []
    monkeypatch.setattr(phases, "_verify_chain", lambda *args: caches.append(args[3]))
    full = tiny.target()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full.params)
    verify_costs(dataclasses.replace(full, params=half), (1,), length=20)
    assert {x.dtype for x in jax.tree.leaves(caches)} == {jnp.dtype("float32")}  # on a CPU
