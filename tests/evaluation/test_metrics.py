"""The numbers of an evaluation, on counts small enough for a pencil."""

import numpy as np
import pytest

from jaxspec.evaluation import metrics as m


def test_survival_and_conditional_acceptance():
    # 10 rounds: 4 accepted nothing, 3 one token, 2 two, 1 three.
    survival = m.survival_by_depth(np.array([0, 4, 3, 2, 1]))
    np.testing.assert_allclose(survival, [0.6, 0.3, 0.1])
    np.testing.assert_allclose(m.conditional(survival), [0.6, 0.5, 1 / 3])
    np.testing.assert_array_equal(np.isnan(m.conditional(np.array([0.5, 0, 0]))), [0, 0, 1])


@pytest.mark.parametrize("alpha, drafted", [(0.0, 7), (0.3, 3), (0.8, 7), (0.95, 63)])
def test_the_effective_rate_inverts_the_expected_length(alpha, drafted):
    tau = sum(alpha**k for k in range(drafted + 1))
    assert m.effective_acceptance(tau, drafted) == pytest.approx(alpha, abs=1e-6)


def test_theoretical_speedup():
    # 1 + 1/2 + 1/4 tokens for 1.2 forwards.
    assert m.theoretical_speedup(0.5, 2, 0.1) == pytest.approx(1.75 / 1.2)
    assert m.theoretical_speedup(1.0, 4, 0.0) == 5


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Tau of 40 prompts whose rounds have a known mean, drawn 200 times."""
    random, held = np.random.default_rng(0), 0
    weights = m.resamplings([40])
    for _ in range(200):
        rounds = random.integers(5, 15, 40)
        decided = random.poisson(2.0 * rounds)
        found = m.estimate(m.ratio(decided, rounds, weights))
        assert found.low < found.value < found.high
        held += found.low <= 2.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_resamplings_are_within_sets_and_the_same_every_time():
    weights = m.resamplings([3, 5])
    assert (weights[0] == 1).all()
    assert (weights[:, :3].sum(axis=1) == 3).all() and (weights[:, 3:].sum(axis=1) == 5).all()
    np.testing.assert_array_equal(weights, m.resamplings([3, 5]))


def test_a_paired_ratio_is_tighter_than_two_intervals():
    """One decoder 10% better on every prompt; prompts differ far more than that."""
    rounds = np.full(20, 10.0)
    first = np.linspace(11, 60, 20)
    weights = m.resamplings([20])
    one, other = m.ratio(1.1 * first, rounds, weights), m.ratio(first, rounds, weights)
    paired = m.estimate(one / other)
    assert paired.low == pytest.approx(1.1) and paired.high == pytest.approx(1.1)
    assert m.estimate(one).low < m.estimate(other).value


def test_reliability():
    predicted, happened = np.array([0.05, 0.95, 0.91, 1.0]), np.array([0, 1, 0, 1])
    bins = m.reliability_bins(predicted, happened)
    np.testing.assert_allclose(bins[0], [1, 0.05, 0])
    np.testing.assert_allclose(bins[9], [3, 2.86, 2])
    assert bins[1:9].sum() == 0
    assert m.calibration_error(bins) == pytest.approx((0.05 + 0.86) / 4)
