"""The table of partitions: what is cut, by how many devices, and what stays whole."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from jaxspec.drafters.weights import abstract_weights
from jaxspec.models.cache import init_cache
from jaxspec.models.params import abstract_params
from jaxspec.models.presets import PRESETS
from jaxspec.planning.setup import published_drafter
from jaxspec.sharding import check_mesh, make_mesh, mesh_of, place, shardings
from pallas_kernels.mesh import batch_axis, cut_axes, devices_along, on_one_device

P = PartitionSpec
WIDE = ("model", "rest")
WHOLE = P()


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def specs(sizes, tree, **options):
    return jax.tree.map(lambda x: x.spec, shardings(mesh(**sizes), tree, **options))


def test_dense_layer_over_as_many_devices_as_heads():
    cut = specs(dict(model=8, rest=1), abstract_params(PRESETS["qwen3-8b"]))
    attention, mlp = cut.layers[3].attention, cut.layers[3].mlp
    assert attention.qkv == P(None, "model") and attention.out == P("model")
    assert mlp.gate_up == P(None, None, WIDE) and mlp.down == P(WIDE)
    assert cut.embed == cut.lm_head == P(WIDE)
    norms = attention.norm, attention.q_norm, attention.k_norm, mlp.norm, cut.final_norm
    assert set(norms) == {WHOLE}


def test_more_devices_than_heads_share_experts_and_vocabulary():
    cut = specs(dict(model=4, rest=2), abstract_params(PRESETS["qwen3-30b-a3b"]))
    attention, mlp = cut.layers[0].attention, cut.layers[0].mlp
    assert attention.qkv == P(None, "model")
    assert mlp.gate_up == mlp.down == P(WIDE) and mlp.router == WHOLE
    assert cut.embed == P(WIDE)


@pytest.mark.parametrize("names", [("data", "model"), ("model",)])
def test_axes_a_mesh_does_not_have_are_left_out(names):
    cut = specs(dict.fromkeys(names, 2), abstract_params(PRESETS["qwen3-8b"]))
    assert cut.layers[0].mlp.down == P("model") and cut.embed == P("model")


def test_what_does_not_divide_is_cut_less():
    tree = {"embed": jax.ShapeDtypeStruct((12, 5), jnp.float32)}
    assert specs(dict(model=4, rest=3), tree)["embed"] == P(WIDE)
    assert specs(dict(model=4, rest=2), tree)["embed"] == P("model")
    assert specs(dict(model=5, rest=2), tree)["embed"] == WHOLE


def test_caches_are_cut_by_key_value_head():
    cache = jax.eval_shape(lambda: init_cache(2, 4, 8, 16, 4, jnp.float32))
    cut = specs(dict(model=4, rest=1), {"state": cache})["state"]
    assert set(cut.keys + cut.values) == {P(None, "model")}


def test_drafters_are_cut_as_targets_are_or_not_at_all():
    weights = abstract_weights(published_drafter(PRESETS["qwen3-8b"]), jnp.bfloat16)
    layer = nnx.to_pure_dict(specs(dict(model=8), weights))["layers"][0]
    assert layer["q"] == layer["kv"] == P(None, "model")
    assert layer["gate_up"] == P(None, None, "model")
    assert layer["down"] == layer["out"] == P("model")
    whole = jax.tree.leaves(
        specs(dict(model=8), weights, rules=()), is_leaf=lambda x: isinstance(x, P)
    )
    assert set(whole) == {WHOLE}


def test_too_few_devices():
    with pytest.raises(ValueError, match=r"999 x 2 x 1 .* needs 1998 devices; there are"):
        make_mesh(data=999, model=2)


@pytest.mark.parametrize(
    ("kind", "rows", "weights", "alone"),
    [
        (AxisType.Auto, "data", ("model",), False),
        (AxisType.Explicit, None, (), False),
        (AxisType.Manual, None, (), True),  # inside a shard_map of the user's
    ],
)
def test_work_is_cut_over_axes_of_type_auto_alone(kind, rows, weights, alone):
    with use_abstract_mesh(AbstractMesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)):
        assert (batch_axis(4), batch_axis(3), cut_axes()) == (rows, None, weights)
        assert (devices_along("model"), on_one_device()) == (2 if weights else 1, alone)


def axes() -> tuple[str, ...]:
    return jax.sharding.get_abstract_mesh().axis_names


def test_arrays_are_computed_with_on_their_own_mesh():
    alone = jnp.zeros(3)
    placed = place(make_mesh(), {"x": jnp.zeros(3)})
    with jax.set_mesh(jax.make_mesh((1,), ("mine",))):
        with mesh_of(alone) as found:
            assert found is None and axes() == ()
        with mesh_of(placed) as found:
            assert found.axis_names == axes() == ("data", "model", "rest")

        @jax.jit
        def traced(x):
            with mesh_of(x) as found:
                assert found is None and axes() == ("mine",)
            return x

        traced(jnp.zeros(3))
        assert axes() == ("mine",)
    with mesh_of(alone):
        assert jnp.zeros(3).sharding == alone.sharding  # nothing was set, so nothing changes


def test_meshes_that_training_cannot_use():
    check_mesh(make_mesh())
    with pytest.raises(ValueError, match=r"axes \('mine',\) .*; expected one of"):
        check_mesh(jax.make_mesh((1,), ("mine",)))
    names = ("data", "model", "rest")
    with pytest.raises(ValueError, match=r"of types \(Explicit, .*make_mesh"):
        check_mesh(jax.make_mesh((1, 1, 1), names, axis_types=(AxisType.Explicit,) * 3))
