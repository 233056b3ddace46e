"""Sequential temperature scaling on rounds whose truth is known, and on a decoding drafter."""

import json

import numpy as np
import pytest

from jaxspec.cli import main
from jaxspec.cli.exits import BAD_INPUT
from jaxspec.config import TreeConfig
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.evaluation.calibration import (
    GRID,
    Rollouts,
    assess,
    auroc,
    chance_error,
    draw_reliability,
    fit_temperatures,
    rollouts,
    survival_of,
)
from jaxspec.evaluation.walk import observe as observe_answers
from jaxspec.evaluation.walk import record, tabulate, walk
from tests import tiny
from tests.drafters import cases

TRUE = np.array([2.0, 0.5, 1.5])


def drawn(rounds: int, seed: int) -> Rollouts:
    """Rounds whose slots are accepted with sigmoid(logit / TRUE)."""
    dice = np.random.default_rng(seed)
    logits = dice.normal(0.8, 2.0, (rounds, len(TRUE)))
    passed = dice.random(logits.shape) < 1 / (1 + np.exp(-logits / TRUE))
    accepted = np.cumprod(passed, axis=1).sum(axis=1)
    return Rollouts(logits, accepted, np.full(rounds, len(TRUE)))


def test_temperatures_are_found_left_to_right():
    found = fit_temperatures(drawn(40_000, seed=0))
    np.testing.assert_allclose(found, TRUE, rtol=0.15)


def test_it_lowers_the_error_on_other_rounds():
    held_out = drawn(20_000, seed=2)
    raw, scaled = assess(held_out), assess(held_out, fit_temperatures(drawn(20_000, seed=1)))
    for before, after in zip(raw, scaled, strict=True):
        assert after.ece < 0.5 * before.ece
        assert after.brier < before.brier
        assert after.predicted == pytest.approx(after.happened, abs=0.02)
    assert raw[0].auroc == scaled[0].auroc  # one slot's order does not change


def test_true_confidences_are_left_alone():
    rounds = drawn(20_000, seed=3)
    true = Rollouts(rounds.logits / TRUE, rounds.accepted, rounds.limit)
    assert max(q.ece for q in assess(true)) < 0.02
    assert fit_temperatures(true).tolist() == [1.0, 1.0, 1.0]
    assert 1.0 in GRID


def test_chance_alone_gives_an_error_the_larger_the_fewer_rounds():
    rounds = drawn(2_000, seed=4)
    true = Rollouts(rounds.logits / TRUE, rounds.accepted, rounds.limit)
    for quality in assess(true):
        assert quality.ece == pytest.approx(quality.chance, rel=0.5)
    few, many = (chance_error(np.linspace(0.1, 0.9, n))[0] for n in (100, 10_000))
    assert few > 5 * many


def test_slots_past_the_end_of_a_text_do_not_count():
    logits = np.zeros((4, 2))
    found = assess(Rollouts(logits, np.array([2, 1, 1, 0]), np.array([2, 2, 1, 1])))
    assert [q.rounds for q in found] == [4, 2]
    assert found[0].happened == 0.75 and found[1].happened == 0.5
    assert found[1].predicted == pytest.approx(0.25)


def test_auroc_against_all_pairs():
    dice = np.random.default_rng(0)
    p, y = dice.integers(0, 6, 50) / 5, dice.random(50) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y] for b in p[~y]]
    assert auroc(p, y) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(p, np.ones(50, bool)))


def test_survival_multiplies():
    found = survival_of(np.array([[0.0, np.log(3)]]), [1.0, 1.0])
    np.testing.assert_allclose(found, [[0.5, 0.375]])


@pytest.fixture(scope="module")
def answers():
    return record(tiny.target(), tiny.prompts(5, 17, 30), max_new_tokens=20, spare=6)


@pytest.mark.slow
def test_rollouts_are_the_rounds_that_decoding_takes(answers):
    drafter = cases.loaded("dspark", TreeConfig("chain", size=5))
    found = rollouts(tiny.target(), drafter, answers, batch=3)
    observed = observe_answers(tiny.target(), [drafter], answers, batch=3)
    tables = tabulate(observed, answers, drafter, observed.states[0])
    committed = [
        n - 1
        for answer, table in zip(answers, tables, strict=True)
        for n in walk(answer, table, 5)[0].committed
    ]
    assert sorted(found.accepted.tolist()) == sorted(committed)
    assert found.logits.shape == (len(committed), 4)
    # The logits are the head's: dividing them reproduces a calibrated drafter's scores.
    assert np.isfinite(found.logits).all() and found.logits.std() > 0


def test_a_drafter_divides_its_logits_by_the_temperatures(answers):
    """Survival of the drafter's own chain equals `survival_of` its raw logits."""
    import dataclasses

    import jax.numpy as jnp

    temperatures = np.array([0.5, 2.0, 1.0, 3.0], np.float32)
    kind, tree = cases.KINDS["dspark"], TreeConfig("chain", size=5)
    static = BlockDrafter(kind, tree, survival_scores=True)
    state = cases.observed("dspark", cases.features("dspark", 2, 6))
    anchors = jnp.array([4, 2]), jnp.array([6, 6]), jnp.array([5, 5])

    def scores(values):
        params = dataclasses.replace(cases.params("dspark"), temperatures=jnp.asarray(values))
        return np.asarray(cases.draft(static, params, state, *anchors).scores[:, 1:], float)

    raw = np.diff(scores(np.float32(1)), axis=1, prepend=0)
    logits = raw - np.log(-np.expm1(raw))
    expected = survival_of(logits, temperatures)
    np.testing.assert_allclose(np.exp(scores(temperatures)), expected, rtol=1e-3)


def test_what_cannot_be_calibrated(answers):
    with pytest.raises(ValueError, match="no confidence head"):
        rollouts(tiny.target(), PLAIN, answers)
    dflash = LoadedDrafter(
        BlockDrafter(cases.KINDS["dflash"], TreeConfig()), cases.params("dflash")
    )
    with pytest.raises(ValueError, match="no confidence head"):
        rollouts(tiny.target(), dflash, answers)


@pytest.mark.usefixtures("models")
def test_two_prompts_must_be_usable(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "s" * 600}) + '\n{"prompt": "sum"}\n')
    arguments = ["--target", "target", "--drafter", "run/a", "--prompts", str(path)]
    assert main(["calibrate", *arguments]) == BAD_INPUT
    left, error = capsys.readouterr().err.splitlines()
    assert left.startswith("left out: prompt 0")
    assert "1 of 2 prompts can be used; expected at least two" in error


def test_the_diagram_is_drawn(tmp_path):
    rounds = drawn(500, seed=4)
    draw_reliability([("raw", assess(rounds))], tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes()[1:4] == b"PNG"
