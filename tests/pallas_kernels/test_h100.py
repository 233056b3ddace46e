"""Compiling for an H100 without one: the report sees the faults that the gate is there for.

The gates are `python -m pallas_kernels.h100` and `python -m jaxspec.planning`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxspec.models.decoder import forward_chain
from jaxspec.models.moe import mixture_of_experts
from jaxspec.models.params import abstract_params
from jaxspec.models.presets import PRESETS
from jaxspec.models.state import init_states
from jaxspec.sharding import shardings
from pallas_kernels.h100.compile import compile_for_h100
from pallas_kernels.h100.kernels import attention, delta_rule, heads
from pallas_kernels.h100.target import mesh
from pallas_kernels.tree_attention.config import Shape, TileConfig

pytestmark = pytest.mark.h100

QWEN3_8B = Shape(1, 64, 32, 8, 128, 4096, jnp.dtype("bfloat16"))
QWEN3_5_9B = Shape(1, 64, 16, 4, 256, 4096, jnp.dtype("bfloat16"))


def array(*shape, spec=(), devices=1):
    sharding = NamedSharding(mesh(devices, heads=devices), PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


@pytest.mark.parametrize("shape, grid", [(QWEN3_8B, (2, 8, 8)), (QWEN3_5_9B, (2, 4, 16))])
def test_the_chosen_tile_of_a_verify_step_compiles_to_warpgroup_products(shape, grid):
    case = attention(shape)
    kernels = case.compile()
    (main,) = [kernel for kernel in kernels if kernel.name == "tree_attention"]
    assert main.grid == grid and main.threads == 256
    assert main.wgmma > 0 and main.mma == 0 and main.async_copies > 0
    assert case.faults(kernels) == []


@pytest.mark.parametrize(
    "case, name, grid",
    [
        (delta_rule(256), "tree_delta_rule", (4, 32, 1)),
        (heads(256), "delta_heads", (256, 16, 1)),
    ],
    ids=str,
)
def test_kernels_of_gated_delta_nets_compile_without_spills(case, name, grid):
    kernels = case.compile()
    (main,) = [kernel for kernel in kernels if kernel.name == name]
    assert main.grid == grid and main.spills == 0
    assert case.faults(kernels) == []


def test_a_tile_that_spills_is_a_fault():
    case = attention(QWEN3_8B, tile=TileConfig(128, 64, 64, 2, 4, 2))
    assert any("spills" in fault for fault in case.faults(case.compile()))


def test_a_tile_too_large_for_shared_memory_does_not_compile():
    case = attention(QWEN3_8B, tile=TileConfig(128, 128, 64, 2, 8, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit"):
        case.compile()


@functools.partial(jax.jit, donate_argnames="cache")
def sound_step(x, weight, cache):
    return x @ weight, cache.at[:16].set(x)


@jax.jit
def two_products(x, first, second):
    return x @ first, x @ second  # XLA joins the weights to make one product of it


def test_a_joined_weight_is_seen_and_a_cache_updated_in_place_is_not():
    x, weight, cache = array(16, 1024), array(1024, 1024), array(4096, 1024)
    sound = compile_for_h100(sound_step, x, weight, cache)
    assert sound.module.large_copies(2**20) == []
    assert sound.module.host_transfers() == []
    assert sound.aliased == 4096 * 1024 * 2
    copying = compile_for_h100(two_products, x, weight, weight)
    assert len(copying.module.large_copies(2**20)) == 1


def test_a_mesh_shares_the_work():
    whole = compile_for_h100(sound_step, array(16, 1024), array(1024, 1024), array(64, 1024))
    cut = array(1024, 1024, spec=(None, "model"), devices=4)
    arguments = array(16, 1024, devices=4), cut, array(64, 1024, devices=4)
    assert compile_for_h100(sound_step, *arguments).arguments < whole.arguments / 2


def test_a_result_is_found_again_by_what_was_compiled(tmp_path, monkeypatch):
    x, weight, cache = array(16, 1024), array(1024, 1024), array(4096, 1024)
    first = compile_for_h100(sound_step, x, weight, cache, cache=tmp_path)
    with monkeypatch.context() as forbidden:
        forbidden.setattr("pallas_kernels.h100.compile._compile", None)
        assert compile_for_h100(sound_step, x, weight, cache, cache=tmp_path) == first
    compile_for_h100(sound_step, x, weight, array(8192, 1024), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@functools.partial(jax.jit, static_argnames="config")
def mixture(params, config, x):
    return mixture_of_experts(params, config, x)


def compile_mixture(tokens, devices):
    """A layer of Qwen3-30B-A3B's experts; returns it and the bytes of one expert."""
    config = dataclasses.replace(PRESETS["qwen3-30b-a3b"], num_layers=1, sparse_layers=(0,))
    on = mesh(devices, heads=math.gcd(devices, config.num_kv_heads))
    layer = abstract_params(config, jnp.bfloat16).layers[0].mlp
    x = jax.ShapeDtypeStruct((tokens, config.hidden_size), jnp.float32)
    layer, x = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (layer, x),
        shardings(on, (layer, x)),
    )
    expert = 3 * 2 * config.hidden_size * config.moe_intermediate_size
    return compile_for_h100(mixture, layer, config, x, mesh=on), expert


@pytest.mark.parametrize(
    "tokens, devices, experts",
    [(1, 1, 8), (4, 1, 32), (64, 1, 128), (1, 8, 1), (4, 4, 8), (64, 8, 16)],
)
def test_a_mixture_moves_the_experts_its_nodes_choose_and_no_others(tokens, devices, experts):
    """At most 8 per node; of those, each device reads its own share and sends none."""
    program, expert = compile_mixture(tokens, devices)
    rest = 2**20 + tokens * 2**19  # router and activations
    assert 0 < program.module.moved_bytes() - experts * expert < rest
    assert 0 < program.arguments - 128 * expert // devices < 2**21
    sent = 0 if devices == 1 else 4 * tokens * 2048  # the sum over the devices
    assert program.module.exchanged_bytes() == sent
    assert program.module.large_copies(expert) == []


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def features(params, config, tokens, capacity):
    """The hidden states of a prompt's tokens, and their rows in caches."""
    batch = len(tokens)
    states = init_states(config, batch, capacity, jnp.bfloat16)
    start = jnp.zeros(batch, jnp.int32)
    out = forward_chain(params, config, tokens, states, start, implementation="triton")
    written = states.write(out.rows, start, start + tokens.shape[1])
    return out.hidden, written


def test_a_mesh_of_data_shares_sequences_and_sends_none():
    """As `train --devices 4` runs the target."""
    config = dataclasses.replace(PRESETS["qwen3-0.6b"], num_layers=1)
    on = Mesh(mesh(4).devices.reshape(4, 1), ("data", "model"))
    whole, by_sequence = (NamedSharding(on, PartitionSpec(*axes)) for axes in ((), ("data",)))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        abstract_params(config, jnp.bfloat16),
    )
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=by_sequence)
    program = compile_for_h100(features, params, config, tokens, 1024, mesh=on)
    assert program.module.exchanged_bytes() == 0
    hidden, caches = 2 * 128 * 1024 * 4, 2 * (2 * 8 * 1024 * 128) * 2  # of 2 sequences
    assert 0 <= program.outputs - hidden - caches < 100


def hybrid_of_two_layers():
    hybrid = PRESETS["qwen3.5-0.8b"]
    one = dataclasses.replace(hybrid.delta_net, layers=(0,))
    return dataclasses.replace(hybrid, num_layers=2, delta_net=one)


FORWARDS = {
    "dense": (
        dataclasses.replace(PRESETS["qwen3-0.6b"], num_layers=1),
        64,
        {"tree_attention", "rotary_heads"},
    ),
    "hybrid": (
        hybrid_of_two_layers(),
        64,
        {"tree_attention", "rotary_heads", "delta_heads", "tree_delta_rule"},
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_with_every_kernel_has_a_derivative(name):
    narrow = jnp.dtype("bfloat16")
    config, n, expected = FORWARDS[name]
    shape = jax.eval_shape
    states = shape(lambda: init_states(config, 1, 128, narrow))

    def loss(params, tokens, states):
        start = jnp.zeros(1, jnp.int32)
        return forward_chain(
            params, config, tokens, states, start, implementation="triton"
        ).hidden.sum()

    def placed(tree):
        one = NamedSharding(mesh(1), PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree
        )

    arguments = abstract_params(config, narrow), shape(lambda: jnp.zeros((1, n), int)), states
    compiled = compile_for_h100(jax.jit(jax.grad(loss)), *map(placed, arguments))
    assert expected <= {kernel.name for kernel in compiled.kernels}
