"""Rotary settings in every place that real files have them."""

import pytest

from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.rope import rope_theta

NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def theta(raw, **options):
    return rope_theta(JsonConfig(raw, "config.json", "a target"), **options)


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
