"""Layers that are alike are traced once; the program is the one without that."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxspec.models import decoder
from jaxspec.models.params import random_params
from jaxspec.models.state import init_states
from jaxspec.trees.packing import pack_nodes
from pallas_kernels.h100.target import lowering_for_h100
from tests import tiny

ROWS, NODES = 2, 8


def lowered(
    config, *, packed=False, dtype="float32", implementation=None, platform="cpu"
) -> str:
    """StableHLO of a forward, from shapes alone."""
    weights = jax.eval_shape(lambda: random_params(config, jax.random.key(0), dtype=dtype))
    states = jax.eval_shape(lambda: init_states(config, ROWS, 128, dtype))

    @jax.jit
    def forward(params, tokens, ancestors, states, lengths):
        packing = pack_nodes(tokens > 0, 10) if packed else None
        options = dict(packing=packing, implementation=implementation, taps=(0, 2))
        given = params, config, tokens, tokens, ancestors, states, lengths
        return decoder.forward(*given, **options)

    shapes = jnp.zeros((ROWS, NODES), int), jnp.zeros((ROWS, NODES, 1), jnp.uint32)
    with lowering_for_h100() if platform == "cuda" else contextlib.nullcontext():
        traced = forward.trace(weights, *shapes, states, jnp.zeros(ROWS, int))
        return traced.lower(lowering_platforms=(platform,)).as_text()


WIDE = dataclasses.replace(tiny.QWEN3, head_dim=64, hidden_size=256, intermediate_size=256)
GPU = dict(dtype="bfloat16", implementation="triton", platform="cuda")


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (tiny.QWEN3, {}),
        (tiny.LLAMA, dict(packed=True, dtype="bfloat16")),
        (tiny.MOE, dict(packed=True)),
        (tiny.HYBRID, {}),
        (WIDE, GPU),
    ],
)
def test_the_program_is_the_same(monkeypatch, config, options):
    calls = []

    def counted(*args, **more):
        calls.append(1)
        return attention(*args, **more)

    attention = decoder.attention
    monkeypatch.setattr(decoder, "attention", counted)
    once = lowered(config, **options)
    assert len(calls) == 1
    for name in ("_attend", "_add_mlp"):
        monkeypatch.setattr(decoder, name, getattr(decoder, name).__wrapped__)
    assert lowered(config, **options) == once
