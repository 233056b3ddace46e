"""Weights and sequences cut over a mesh give what one device does, and none of them moves."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from jaxspec.models.layers import lookup
from jaxspec.models.moe import mixture_of_experts
from jaxspec.models.params import abstract_params
from jaxspec.models.scaled import ScaledWeight, scaled_product
from tests.tiny import MOE

# A process of its own, because the number of devices is fixed when JAX starts.
SCRIPT = """
import dataclasses, functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.layers import lookup
from jaxspec.models.moe import mixture_of_experts
from jaxspec.models.params import random_params
from jaxspec.models.state import init_states
from tests.tiny import MOE

config = dataclasses.replace(MOE, num_experts=16, experts_per_token=4)
params = random_params(config, jax.random.key(0), scale=0.3)
experts = jax.jit(lambda p, x: mixture_of_experts(p, config, x))

def mesh_of(**axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )

def cut(params, mesh):
    def place(path, x):
        expert = path[-1].name in ("gate_up", "down") and x.shape[0] == 16
        axes = [name for name in mesh.axis_names if name != "data"]
        spec = P(axes) if expert else P()
        return jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map_with_path(place, params)

def check(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())

layer = params.layers[0].mlp
for tokens in (1, 5, 64):
    x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size))
    whole = experts(layer, x)
    for mesh in (mesh_of(model=8), mesh_of(model=2, rest=4)):
        with jax.set_mesh(mesh):
            check(experts(cut(layer, mesh), x), whole)
            text = experts.lower(cut(layer, mesh), x).compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text
        assert text.count("all-reduce(") == 1, text.count("all-reduce(")

for shared in (mesh_of(data=8), mesh_of(data=2, model=4)):
    rows = jax.device_put(x, NamedSharding(shared, P("data")))
    with jax.set_mesh(shared):
        out = experts(cut(layer, shared), rows)
        text = experts.lower(cut(layer, shared), rows).compile().as_text()
    check(out, whole)
    assert out.sharding.spec == P("data"), out.sharding
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert all("[64,16]" in line for line in gathered), gathered  # of the router, for its top k
    assert "all-to-all" not in text

table = jax.random.normal(jax.random.key(2), (48, 8))
find = jax.jit(lookup)
for index in (jnp.array([[37]]), jnp.array([[0, 47], [5, 6]])):
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, NamedSharding(mesh, P(("model", "rest"))))
        assert (find(placed, index) == table[index]).all()
        assert "all-gather" not in find.lower(placed, index).compile().as_text()

@functools.partial(jax.jit, static_argnames="n")
def logits(params, tokens, n):
    cache = init_states(config, 4, 32, jnp.float32)
    out = forward_chain(params, config, tokens, cache, jnp.zeros(4, jnp.int32))
    return unembed(params, out.hidden)

tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, config.vocab_size)
whole = logits(params, tokens, 16)
mesh = mesh_of(model=2, rest=4)
with jax.set_mesh(mesh):
    check(logits(cut(params, mesh), tokens, 16), whole)

with jax.set_mesh(mesh_of(model=8)):
    three = dataclasses.replace(layer, gate_up=layer.gate_up[:12], down=layer.down[:12])
    try:
        jax.eval_shape(experts, three, x)
    except ValueError as error:
        print(error)
"""


HYBRID = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.params import random_params
from jaxspec.models.state import init_states
from jaxspec.sharding import make_mesh, place, shardings
from tests.tiny import HYBRID

delta = dataclasses.replace(HYBRID.delta_net, key_heads=8, value_heads=16)
config = dataclasses.replace(HYBRID, delta_net=delta, num_kv_heads=4)
params = random_params(config, jax.random.key(0), scale=0.3)
lengths, counts, start = jnp.array([7, 7]), jnp.array([5, 0]), jnp.int32(7)

@jax.jit
def step(params, states, tokens):
    out = forward_chain(params, config, tokens, states, lengths)
    return unembed(params, out.hidden), states.write(out.rows, start, counts)

states = init_states(config, 2, 32, jnp.float32)
draw = lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape)
states = jax.tree.map(draw, states)
tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, config.vocab_size)
whole = step(params, states, tokens)
for axes in (dict(model=4, rest=2), dict(model=2), dict(data=2, model=4)):
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        cut = place(mesh, params), place(mesh, states)
        compiled = step.lower(*cut, tokens).compile()
        done = step(*cut, tokens)
        for found, expected in zip(jax.tree.leaves(done), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    memory = cut[1].delta[0].memory
    assert memory.sharding.shard_shape(memory.shape)[1] == 8 * axes.get("data", 1) // mesh.size
    memory = done[1].delta[0].memory
    assert memory.sharding.shard_shape(memory.shape)[0] == 2 // axes.get("data", 1)
    gathered = [x for x in compiled.as_text().splitlines() if " all-gather" in x]
    assert not [x for x in gathered if "8,24]" in x.split(" all-gather")[0]], gathered
"""


def run(script):
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | dict(JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu"),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_gated_delta_nets_are_cut_by_head_and_no_state_moves():
    done = run(HYBRID)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_experts_and_vocabulary_are_cut_over_the_mesh():
    done = run(SCRIPT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "12 experts cannot be sharded over 8 devices" in done.stdout


def shapes_on_a_device(function, *arrays, **axes):
    """Shapes that a device of a mesh computes with, where the work is cut over the mesh."""
    kinds = (AxisType.Auto,) * len(axes)
    with use_abstract_mesh(AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds)):
        traced = jax.make_jaxpr(function)(*arrays)
    (cut,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "shard_map"]
    return [x.aval.shape for x in cut.params["jaxpr"].invars]


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def test_tokens_are_cut_over_data_where_a_kernel_multiplies_them_by_experts():
    layer = abstract_params(MOE).layers[0].mlp  # 4 experts, 2 per token

    def experts(layer, x):
        return mixture_of_experts(layer, MOE, x)

    for axes, held in ((dict(data=2), 4), (dict(data=2, model=2), 2)):
        x, gate_up, _, expert, weight = shapes_on_a_device(experts, layer, zeros(6, 32), **axes)
        assert x == (3, 32) and expert == weight == (3, 2)
        assert gate_up == (held, 32, 2, 16)


def test_sequences_are_cut_over_data_where_a_kernel_multiplies_them_by_8_bits():
    values = zeros(32, 16, dtype=jnp.float8_e4m3fn)
    weight = ScaledWeight(values, zeros(4, 1), 1, jnp.dtype("bfloat16"))
    for axes, outputs in ((dict(data=2), 32), (dict(data=2, model=2), 16)):
        product = functools.partial(scaled_product, "bnm,mf->bnf", weight=weight)
        x, own, _ = shapes_on_a_device(product, zeros(4, 3, 16), **axes)
        assert x == (2, 3, 16) and own == (outputs, 16)


def test_sequences_are_cut_over_data_where_embeddings_are_looked_up():
    found = shapes_on_a_device(lookup, zeros(8, 5), zeros(4, 3, dtype=int), data=2, model=2)
    assert found == [(4, 5), (2, 3)]
