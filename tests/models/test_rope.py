"""Rotary frequencies by hand, against transformers' and past the original context."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from jaxspec.api import generate
from jaxspec.checkpoints.huggingface import read_config
from jaxspec.config import RopeScaling
from jaxspec.models.params import random_params
from jaxspec.models.rope import attention_factor, frequencies, layer_angles, rotary_angles
from jaxspec.models.target import Target
from tests import tiny

YARN = RopeScaling("yarn", 4.0, 64)
LLAMA3 = RopeScaling("llama3", 8.0, 512)
SCALINGS = [RopeScaling("linear", 2.5), YARN, RopeScaling("llama3", 4.0, 64)]


def test_plain_and_linear():
    np.testing.assert_allclose(frequencies(4, 100.0), [1, 0.1])
    np.testing.assert_allclose(frequencies(4, 100.0, RopeScaling("linear", 4.0)), [0.25, 0.025])


def test_yarn_by_hand():
    """D = 8, b = 10,000, L = 64, s = 4: the first pair kept, the second half interpolated."""
    np.testing.assert_allclose(frequencies(8, 1e4, YARN), [1, 0.0625, 0.0025, 0.00025])
    assert attention_factor(YARN) == pytest.approx(1.13863, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        (dict(attention_factor=0.7, mscale=3.0, mscale_all_dim=2.0), 0.7),
        (dict(mscale=1.0, mscale_all_dim=1.0), 1.0),
        (
            dict(mscale=2.0, mscale_all_dim=0.5),
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
        (dict(mscale=2.0), 0.1 * math.log(4) + 1),
        (dict(factor=1.0), 1.0),
    ],
)
def test_attention_factors(changes, factor):
    assert attention_factor(dataclasses.replace(YARN, **changes)) == pytest.approx(factor)


def test_the_factor_multiplies_cosines_and_sines():
    cos, sin = rotary_angles(jnp.array([0, 3]), 8, 1e4, YARN)
    angle = np.outer([0, 3], frequencies(8, 1e4, YARN))
    np.testing.assert_allclose(cos, attention_factor(YARN) * np.cos(angle), rtol=1e-6)
    np.testing.assert_allclose(sin, attention_factor(YARN) * np.sin(angle), atol=1e-6)


def test_llama3_is_continuous_at_both_wavelengths():
    """At L / high_freq_factor a pair is kept, at L / low_freq_factor interpolated."""
    for limit, expected in ((4.0, 1.0), (1.0, 1 / 8)):
        for nudge in (1 - 1e-9, 1 + 1e-9):
            # The second pair of D = 4 turns by theta^(-1/2).
            turn = 2 * math.pi * limit / LLAMA3.original_positions * nudge
            found = frequencies(4, turn**-2, LLAMA3)[1]
            assert found / turn == pytest.approx(expected, abs=1e-6)
    middle = 2 * math.pi * 2.5 / LLAMA3.original_positions
    assert frequencies(4, middle**-2, LLAMA3)[1] / middle == pytest.approx(0.5 + 0.5 / 8)


@pytest.mark.parametrize("low", [1.0, 4.0])
def test_llama3_without_a_band_between(low):
    scaling = dataclasses.replace(LLAMA3, low_freq_factor=low, high_freq_factor=low)
    plain = frequencies(64, 1e4)
    ratio = LLAMA3.original_positions * plain / (2 * math.pi)
    np.testing.assert_allclose(
        frequencies(64, 1e4, scaling), np.where(ratio > low, plain, plain / 8)
    )


def test_layers_that_slide_have_their_own_base():
    config = dataclasses.replace(
        tiny.QWEN3,
        windows=(None, 4, None),
        rope_scaling=YARN,
        sliding_rope_theta=50.0,
    )
    positions = jnp.arange(5)[None]
    whole, local, last = layer_angles(config, positions)
    assert last is whole
    own = rotary_angles(positions, config.head_dim, config.rope_theta, YARN)
    np.testing.assert_array_equal(whole[0], own[0])
    np.testing.assert_array_equal(local[1], rotary_angles(positions, config.head_dim, 50.0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind)
def test_decoding_past_the_original_context_is_a_fresh_forward(scaling):
    """With windows in some layers; every token is the argmax of one pass without a cache."""
    config = dataclasses.replace(
        tiny.QWEN3, rope_scaling=scaling, windows=(None, 9, None), sliding_rope_theta=50.0
    )
    params = random_params(config, jax.random.key(0), scale=0.3)
    target = Target("scaled", config, params)
    (prompt,) = tiny.prompts(70)
    for drafter in (jaxspec.load_drafter("none", target), tiny.RANDOM):
        (done,) = generate(target, [prompt], max_new_tokens=20, drafter=drafter)
        sequence = prompt + done.token_ids
        own = tiny.logits(target, sequence)[len(prompt) - 1 : -1].argmax(axis=-1)
        assert done.token_ids == own.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["target_yarn_a", "target_llama3_a"])
def test_golden_targets(golden, name):
    """Frequencies, logits at positions past the original context, and greedy tokens."""
    folder, trace = golden(name)
    recorded = np.load(folder / "arrays.npz")
    config = read_config(folder / "target")
    own = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(own, recorded["inverse_frequencies"], atol=1e-6, rtol=1e-6)
    expected = trace["config"]["attention_factor"]
    assert attention_factor(config.rope_scaling) == pytest.approx(expected)
    target = jaxspec.load_target(folder / "target")
    for i, prompt in enumerate(trace["prompts"]):
        sequence = prompt["prompt"] + prompt["ar"]
        found = tiny.logits(target, sequence)[recorded[f"p{i}_positions"]]
        np.testing.assert_allclose(found, recorded[f"p{i}_logits"], atol=2e-4)
        (done,) = generate(target, [prompt["prompt"]], max_new_tokens=len(prompt["ar"]))
        assert done.token_ids == prompt["ar"]
