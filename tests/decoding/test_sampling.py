"""The options of sampling, and seeds: what is refused, and what extreme values mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.decoding.requests import request_keys, seed_key
from jaxspec.decoding.sampling import Sampling
from tests import tiny


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("temperature", -1.0, "temperature is -1.0; expected a finite number, at least 0"),
        ("temperature", float("nan"), "temperature is nan; expected a finite number"),
        ("top_k", -2, "top_k is -2; expected at least 0"),
        ("top_p", 0.0, "top_p is 0.0; expected more than 0 and at most 1"),
        ("min_p", 1.5, "min_p is 1.5; expected 0 … 1"),
        ("temperature", "1", "temperature is '1'; expected a number"),
        ("top_p", None, "top_p is None; expected a number"),
        ("top_k", 1.5, "top_k is 1.5; expected an integer"),
        ("min_tokens", 1.5, "min_tokens is 1.5; expected an integer"),
        ("stop_ids", 5, "stop_ids is 5; expected token ids, or None"),
        ("stop_ids", (1.5,), r"stop_ids is \(1.5,\); expected token ids, or None"),
        ("logit_bias", {1.7: 3.0}, "logit_bias is {1.7: 3.0}; expected numbers by token id"),
        ("logit_bias", {"1": 3}, "logit_bias is {'1': 3}; expected numbers by token id"),
        ("logit_bias", [1, 2], r"logit_bias is \[1, 2\]; expected numbers by token id"),
    ],
)
def test_bad_options_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{field: value})


def test_numbers_of_numpy_are_numbers():
    ids = np.array([3, 7])
    found = Sampling(np.float32(0.5), np.int64(2), stop_ids=ids, logit_bias={ids[0]: ids[1]})
    assert found == Sampling(0.5, 2, stop_ids=(3, 7), logit_bias=((3, 7.0),))
    assert hash(found) and {type(x) for x in (found.top_k, *found.stop_ids)} == {int}


@pytest.mark.parametrize("seed", [1.5, np.array(1.5), [2.5], "1"])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match=r"seed is .*; expected an integer"):
        request_keys(seed, 1)


def test_a_seed_may_be_an_array():
    for seed in (np.int64(3), np.array(3), jnp.array(3)):
        assert (request_keys(seed, 2) == request_keys(3, 2)).all()


def test_typed_keys_are_taken_as_they_are():
    keys = jax.random.split(jax.random.key(1), 3)
    assert (request_keys(keys, 3) == keys).all()
    with pytest.raises(ValueError, match="3 seeds for 2 prompts"):
        request_keys(keys, 2)


SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63, 2**64, 3 * 2**64, -1, -(2**32)]


def test_every_integer_is_a_seed_of_its_own():
    keys = [tuple(jax.random.key_data(seed_key(seed)).tolist()) for seed in SEEDS]
    assert len(set(keys)) == len(SEEDS)
    assert keys[1] == tuple(jax.random.key_data(jax.random.key(1)).tolist())
    drawn = [
        tuple(
            generate(
                tiny.target(),
                [1],
                max_new_tokens=24,
                sampling=Sampling(temperature=2.0, stop_ids=()),
                seed=seed,
            )[0].token_ids
        )
        for seed in SEEDS
    ]
    assert len(set(drawn)) == len(SEEDS)


@pytest.mark.parametrize(
    ("extreme", "same"),
    [
        (dict(temperature=1.0, top_p=1e-300), dict(temperature=0.0)),
        (dict(temperature=1.0, top_p=1e-40), dict(temperature=0.0)),
        (dict(temperature=1e-300), dict(temperature=0.0)),
        (dict(temperature=1e-37), dict(temperature=0.0)),
        (dict(temperature=1.0, top_k=2**40), dict(temperature=1.0)),
        (dict(temperature=1e300), dict(temperature=1e30)),
        (dict(temperature=1.0, min_p=1e-300), dict(temperature=1.0)),
    ],
)
def test_options_beyond_float32_mean_what_they_say(extreme, same):
    options = dict(max_new_tokens=24, seed=3)
    found, expected = (
        generate(tiny.target(), [1], sampling=Sampling(**own, stop_ids=()), **options)
        for own in (extreme, same)
    )
    assert found[0].token_ids == expected[0].token_ids
    assert len(set(found[0].token_ids)) > 1
