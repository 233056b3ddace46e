"""Phases are measured on the programs that decoding runs, and add up."""

from jaxspec.config import TreeConfig
from jaxspec.evaluation.phases import phase_costs, verify_costs
from jaxspec.evaluation.speed import plain_forms
from tests import tiny
from tests.drafters import cases


def test_phases_of_a_block_drafter_and_of_plain_decoding():
    drafter = cases.loaded("rnn", TreeConfig("path_conditioned", size=8, candidates=6))
    phases = phase_costs(tiny.target(), drafter, budget=5, length=20)
    assert list(phases) == ["draft", "grow", "verify", "commit"]
    assert phases["grow"] >= 0 and min(phases["draft"], phases["verify"], phases["commit"]) > 0
    form = plain_forms()["plain, 1 row"]
    assert phase_costs(tiny.target(), form, length=20)["grow"] is None


def test_verify_costs():
    costs = verify_costs(tiny.target(), (1, 4), length=20)
    assert list(costs) == [1, 4] and min(costs.values()) > 0
