"""Rotary settings in every place that real files have them."""

import pytest

from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.rope import read_rope, rope_to_json
from jaxspec.config import RopeScaling

NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def theta(raw, **options):
    return read_rope(JsonConfig(raw, "config.json", "a target"), **options)[0]


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({"rope_parameters": NESTED}, 5e5),
        ({"rope_parameters": {"full_attention": {}}, "rope_theta": 7.0}, 7.0),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7.0}, 7.0),
        ({"rope_scaling": {"rope_theta": 7.0}, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}, "rope_theta": 7.0}, 7.0),
        ({"rope_parameters": {"rope_theta": 7.0, "factor": None}}, 7.0),
        ({"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 1.0}}, 7.0),
    ],
)
def test_theta(raw, expected):
    assert theta(raw) == expected


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "'rope_parameters' is .*'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.5}}, "'rope_scaling' is .*'dynamic'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "'rope_scaling' is"),
        ({"rope_parameters": {}}, "'rope_parameters' is {}.*'rope_theta' in it"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "is .*'rope_theta' in it"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "proportional"}}},
            "'rope_parameters' is .*'proportional'",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}},
            "'rope_parameters' is .*settings for 'full_attention'",
        ),
        (
            {"rope_parameters": {"rope_theta": 7.0, "factor": 4.0}},
            "'rope_parameters': 'factor' is 4.0",
        ),
        (
            {"rope_parameters": {"rope_theta": 7.0, "llama_4_scaling_beta": 0.1}},
            "'llama_4_scaling_beta' is 0.1",
        ),
        (
            {"rope_scaling": {"rope_theta": 7.0}, "rope_parameters": {"rope_theta": 8.0}},
            "'rope_scaling' is .*7.0.* and 'rope_parameters' is .*8.0.*keep one",
        ),
        ({"rope_parameters": {"rope_theta": 0.0}}, "'rope_theta' is 0.0"),
        ({"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}}, "is 0.5"),
    ],
)
def test_what_would_change_the_positions_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        theta(raw)


def test_a_drafter_rotates_the_whole_head_whatever_its_target_did():
    raw = {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.25}}
    assert theta(raw, full_rotary=True) == 7.0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


def scaling(raw, layer_type="full_attention"):
    raw = {"rope_theta": 7.0} | raw
    return read_rope(JsonConfig(raw, "config.json", "a target"), layer_type)[1]


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeScaling("linear", 2.0)),
        ({"rope_scaling": YARN, "rope_theta": 7.0}, RopeScaling("yarn", 4.0, 512)),
        ({"rope_parameters": YARN | {"rope_theta": 7.0}}, RopeScaling("yarn", 4.0, 512)),
        (  # 0 and null stand for the defaults
            {"rope_scaling": YARN | {"beta_fast": 0, "mscale": 0, "beta_slow": None}},
            RopeScaling("yarn", 4.0, 512),
        ),
        (
            {
                "rope_scaling": YARN
                | {"beta_fast": 16, "truncate": False, "attention_factor": 1.2},
            },
            RopeScaling("yarn", 4.0, 512, beta_fast=16.0, truncate=False, attention_factor=1.2),
        ),
        (  # beside the object, L wins over the one inside
            {"rope_scaling": YARN, "original_max_position_embeddings": 256},
            RopeScaling("yarn", 4.0, 256),
        ),
        (  # the factor follows from the positions, L from all of them
            {
                "rope_scaling": YARN | {"factor": None},
                "max_position_embeddings": 1024,
            },
            RopeScaling("yarn", 2.0, 512),
        ),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
                "max_position_embeddings": 64,
            },
            RopeScaling("yarn", 2.0, 64),
        ),
        ({"rope_parameters": LLAMA3}, RopeScaling("llama3", 8.0, 512)),
    ],
)
def test_scaling(raw, expected):
    assert scaling(raw) == expected


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(
    "scale",
    [
        None,
        RopeScaling("linear", 3.0),
        RopeScaling("yarn", 4.0, 512),
        RopeScaling("yarn", 4.0, 512, 16.0, 2.0, False, None, 1.5, 0.5),
        RopeScaling("llama3", 8.0, 512, low_freq_factor=2.0, high_freq_factor=3.0),
    ],
)
def test_settings_round_trip(theta, scale):
    raw = {"rope_parameters": rope_to_json(theta, scale)}
    assert read_rope(JsonConfig(raw, "config.json", "a target")) == (theta, scale)


def test_each_type_of_layer_has_its_own():
    raw = {
        "rope_parameters": {
            "full_attention": LLAMA3 | {"rope_theta": 1e4},
            "sliding_attention": {"rope_theta": 9},
        }
    }
    config = JsonConfig(raw, "config.json", "a target")
    assert read_rope(config, "sliding_attention") == (9.0, None)
    assert read_rope(config, "full_attention") == (1e4, RopeScaling("llama3", 8.0, 512))


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        ({"rope_scaling": YARN | {"low_freq_factor": 1.0}}, "'low_freq_factor' is 1.0"),
        ({"rope_scaling": YARN | {"factor": -1}}, "'factor' is -1.*positive"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast is 0.5; expected at least"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "is 0.5"),
        ({"rope_scaling": YARN | {"extrapolation_factor": 0.5}}, "'extrapolation_factor' is"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'original_max_position"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor is 0.5"),
    ],
)
def test_broken_scaling_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        scaling(raw)
