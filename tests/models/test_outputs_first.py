"""Weights whose outputs come first: the same products, and what reads them back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxspec import checkpoints
from jaxspec.checkpoints.convert import save_safetensors
from jaxspec.checkpoints.tensors import SINGLE
from jaxspec.drafters.weights import random_weights
from jaxspec.models.layers import project
from jaxspec.models.params import outputs_first, random_params
from jaxspec.models.scaled import OutputsFirst, by_value, is_outputs_first
from jaxspec.models.target import Target
from jaxspec.training.networks import copy_layers
from jaxspec.training.recipe import Preset, drafter_config
from tests import tiny
from tests.checkpoints.writing import DENSE, random_tensors, write_folder

multiply = jax.jit(project, static_argnums=0)
is_turned = is_outputs_first


def by_rows(config):
    return random_params(config, jax.random.key(0), scale=0.3)


def turned(config):
    return outputs_first(by_rows(config))


@pytest.mark.parametrize(
    "spec, shape", [("...m,mcf->...cf", (2, 3)), ("tm,mn->tn", (5,)), ("bnm,mjw->bnjw", (3, 4))]
)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_the_same(spec, shape, rows, dtype):
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((16, *shape)).astype(jnp.dtype(dtype))
    x = np.float32(draw.standard_normal((rows, 16) if spec[0] == "t" else (1, rows, 16)))
    turned = OutputsFirst(jnp.asarray(np.moveaxis(weight, 0, -1)), inputs=1)
    found, expected = multiply(spec, x, turned), multiply(spec, x, weight)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [tiny.QWEN3, tiny.HYBRID, tiny.MOE])
def test_a_forward_is_the_same(config):
    expected = tiny.logits(Target("", config, by_rows(config)), [1, 2, 3])
    found = tiny.logits(Target("", config, turned(config)), [1, 2, 3])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [tiny.QWEN3, tiny.HYBRID, tiny.MOE])
def test_turned_back_they_are_the_weights(config):
    params = turned(config)
    back = jax.tree.map(by_value, params, is_leaf=is_turned)
    expected = by_rows(config)
    jax.tree.map(np.testing.assert_array_equal, back, expected)
    shapes = [x.shape for x in jax.tree.leaves(params, is_leaf=is_turned)]
    assert shapes == [x.shape for x in jax.tree.leaves(expected)]


def test_bfloat16_is_loaded_so_on_a_cpu_and_float32_is_not(tmp_path):
    folder = write_folder(tmp_path, DENSE, random_tensors(DENSE))
    narrow, wide = (checkpoints.load(folder, dtype).params for dtype in ("bfloat16", "float32"))
    assert not any(map(is_turned, jax.tree.leaves(wide, is_leaf=is_turned)))
    for layer, exact in zip(narrow.layers, wide.layers, strict=True):
        for name in ("qkv", "out"):
            found = getattr(layer.attention, name)
            assert is_turned(found)
            expected = getattr(exact.attention, name).astype(jnp.bfloat16)
            np.testing.assert_array_equal(by_value(found), expected)


@pytest.mark.parametrize("config", [tiny.QWEN3, tiny.HYBRID, tiny.MOE])
def test_they_are_saved_as_the_same_tensors(config, tmp_path):
    for name, params in (("found", turned(config)), ("expected", by_rows(config))):
        (tmp_path / name).mkdir()
        save_safetensors(tmp_path / name, config, params)
    found, expected = (load_file(tmp_path / x / SINGLE) for x in ("found", "expected"))
    assert len(expected) > 10
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_drafter_starts_from_them():
    config = drafter_config("dflash", tiny.QWEN3, Preset(mask_token_id=0, layers=1, taps=1))
    weights = random_weights(config, jax.random.key(2))
    expected = copy_layers(config, weights, by_rows(tiny.QWEN3))
    found = copy_layers(config, weights, turned(tiny.QWEN3))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
