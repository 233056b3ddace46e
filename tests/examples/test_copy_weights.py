"""The fit behind `drafters.ngram.WEIGHTS`: known weights come back from data they made."""

import numpy as np
import pytest

from examples.shipped_drafter.copy_weights import LENGTHS, fitted


def test_known_weights_are_found():
    rng, count = np.random.default_rng(0), 200_000
    known = np.append(0.0, np.linspace(0.1, 0.9, LENGTHS))
    length = rng.integers(0, LENGTHS + 1, count)
    # Of two likely tokens the copy is the first; the drafter gives it q, the other 1 - q.
    q = rng.uniform(0.05, 0.95, count)
    right = (rng.random(count) < known[length] + (1 - known[length]) * q) & (length > 0)
    found = fitted(length, right, np.where(right, q, 1 - q))
    assert found == pytest.approx(known[1:], abs=0.03)
