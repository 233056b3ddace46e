"""Float32 targets multiply in float32 on every platform; narrower ones as the platform does."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxspec.config import TreeConfig
from jaxspec.decoding.loop import decode
from jaxspec.decoding.prefill import prefill
from jaxspec.decoding.requests import pack, request_keys
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.state import Decoder, Params
from jaxspec.drafters.block import BlockDrafter
from tests import tiny
from tests.drafters import cases

CHAIN = BlockDrafter(cases.KINDS["dspark"], TreeConfig("chain", size=5))


def lowered(dtype):
    """The programs of decoding for a target and a drafter of this dtype."""
    decoder = Decoder(tiny.QWEN3, CHAIN)
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    weights = cast(tiny.target().params)
    drafter = cases.params("dspark")
    params = Params(weights, drafter)
    requests = pack(
        decoder,
        tiny.prompts(5),
        batch=1,
        capacity=256,
        max_new_tokens=4,
        budget=5,
        sampling=[Sampling()],
        keys=request_keys(0, 1),
    )
    first = prefill.lower(decoder, params, requests)
    state = jax.eval_shape(functools.partial(prefill, decoder), params, requests)
    rounds = jax.ShapeDtypeStruct((), jnp.int32)
    return first, decode.lower(decoder, params, state, requests.sampling, rounds)


@pytest.mark.parametrize("dtype, exact", [("float32", True), ("bfloat16", False)])
def test_every_product_of_a_float32_target_is_exact_and_no_other_is(dtype, exact):
    for program in lowered(dtype):
        products = re.findall(r"stablehlo\.dot_general.*", program.as_text())
        asked = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
        assert len(products) > 20 and all(asked) == any(asked) == exact
