"""Rotary frequencies and factors of random settings against PyTorch's transformers."""

import numpy as np
import pytest

from jaxspec.checkpoints.json_config import JsonConfig
from jaxspec.checkpoints.rope import read_rope
from jaxspec.models.rope import attention_factor, frequencies

pytestmark = pytest.mark.parity

ORIGINAL = "original_max_position_embeddings"
ALWAYS = {
    "linear": {"factor": (2.0, 4, 8.0)},
    "yarn": {"factor": (1.0, 2, 4.0, 40.0)},
    "llama3": {
        "factor": (2, 8.0, 32.0),
        "low_freq_factor": (1.0, 2.0),
        "high_freq_factor": (4.0, 8),
    },
}
AT_TIMES = {
    "linear": {},
    "yarn": {
        ORIGINAL: (64, 512, 4096),
        "beta_fast": (8.0, 32, 64),
        "beta_slow": (1, 2.0),
        "truncate": (True, False),
        "attention_factor": (1.0, 1.3),
        "mscale": (0.7, 1.0),
        "mscale_all_dim": (0.0, 0.8, 1.0),
    },
    "llama3": {ORIGINAL: (64, 512, 8192)},
}


def settings(kind, random):
    """config.json's keys, in either spelling; the original positions at times beside."""

    def pick(values):
        return values[random.integers(len(values))]

    rope = {"rope_type": kind} | {key: pick(values) for key, values in ALWAYS[kind].items()}
    chosen = [key for key in AT_TIMES[kind] if random.random() < 0.5]
    rope |= {key: pick(AT_TIMES[kind][key]) for key in chosen}
    raw = dict(head_dim=pick((16, 64, 128)), max_position_embeddings=pick((2048, 131_072)))
    if kind != "linear" and random.random() < 0.3:
        raw[ORIGINAL] = pick((128, 1024))
    theta = pick((300.0, 1e4, 1e6))
    if random.random() < 0.5:
        return raw | {"rope_theta": theta, "rope_scaling": rope}
    return raw | {"rope_parameters": rope | {"rope_theta": theta}}


@pytest.mark.parametrize("kind", ALWAYS)
def test_frequencies(kind):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    random = np.random.default_rng(0)
    for _ in range(60):
        raw = settings(kind, random)
        theta, scaling = read_rope(JsonConfig(raw, "config.json", "a target"))
        expected = Qwen3RotaryEmbedding(Qwen3Config(**raw))
        found = frequencies(raw["head_dim"], theta, scaling)
        np.testing.assert_allclose(
            found, expected.inv_freq.numpy(), rtol=2e-5, err_msg=str(raw)
        )
        assert attention_factor(scaling) == pytest.approx(expected.attention_scaling)
