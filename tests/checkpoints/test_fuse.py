"""The fused layout against one element at a time, and what is refused."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxspec.checkpoints.huggingface import load_params, read_config
from jaxspec.models.params import abstract_params
from tests.checkpoints.writing import (
    DENSE,
    LLAMA,
    MIXTURE,
    QWEN2,
    random_tensors,
    write_folder,
)


def loaded(folder, raw, tensors, dtype=jnp.float32, **writing):
    write_folder(folder, raw, tensors, **writing)
    config = read_config(folder)
    return config, load_params(folder, config, dtype)


@pytest.mark.parametrize("raw", [DENSE, MIXTURE, LLAMA, QWEN2], ids=lambda r: r["model_type"])
def test_shapes_and_dtypes_are_those_of_the_layout(tmp_path, raw):
    config, params = loaded(tmp_path, raw, random_tensors(raw), jnp.bfloat16)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert specs == abstract_params(config, jnp.bfloat16)


@pytest.mark.parametrize("shards", [1, 3])
def test_every_attention_weight_is_in_its_place(tmp_path, shards):
    tensors = random_tensors(DENSE)
    c, params = loaded(tmp_path, DENSE, tensors, shards=shards)
    for i, layer in enumerate(params.layers):
        a = f"model.layers.{i}.self_attn."
        q, k, v, o = (tensors[f"{a}{name}_proj.weight"] for name in "qkvo")
        qkv, out = np.asarray(layer.attention.qkv), np.asarray(layer.attention.out)
        for m in range(c.hidden_size):
            for head in range(c.num_kv_heads):
                for d in range(c.head_dim):
                    for g in range(c.group_size):
                        row = (head * c.group_size + g) * c.head_dim + d
                        assert qkv[m, head, g, d] == q[row, m]
                        assert out[head, g, d, m] == o[m, row]
                    row = head * c.head_dim + d
                    assert qkv[m, head, c.group_size, d] == k[row, m]
                    assert qkv[m, head, c.group_size + 1, d] == v[row, m]
        np.testing.assert_array_equal(layer.attention.q_norm, tensors[f"{a}q_norm.weight"])
        np.testing.assert_array_equal(layer.attention.k_norm, tensors[f"{a}k_norm.weight"])


def test_biases_are_in_their_places(tmp_path):
    tensors = random_tensors(QWEN2)
    c, params = loaded(tmp_path, QWEN2, tensors)
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.bias"] for name in "qkv")
    bias = np.asarray(params.layers[1].attention.qkv_bias)
    for head in range(c.num_kv_heads):
        for d in range(c.head_dim):
            for g in range(c.group_size):
                assert bias[head, g, d] == q[(head * c.group_size + g) * c.head_dim + d]
            assert bias[head, c.group_size, d] == k[head * c.head_dim + d]
            assert bias[head, c.group_size + 1, d] == v[head * c.head_dim + d]


def test_dense_mlp_norms_embedding_and_head(tmp_path):
    tensors = random_tensors(DENSE)
    _, params = loaded(tmp_path, DENSE, tensors)
    layer, mlp = "model.layers.1.", params.layers[1].mlp
    same = np.testing.assert_array_equal
    same(mlp.gate_up[:, 0], tensors[f"{layer}mlp.gate_proj.weight"].T)
    same(mlp.gate_up[:, 1], tensors[f"{layer}mlp.up_proj.weight"].T)
    same(mlp.down, tensors[f"{layer}mlp.down_proj.weight"].T)
    same(mlp.norm, tensors[f"{layer}post_attention_layernorm.weight"])
    same(params.layers[1].attention.norm, tensors[f"{layer}input_layernorm.weight"])
    same(params.embed, tensors["model.embed_tokens.weight"])
    same(params.final_norm, tensors["model.norm.weight"])
    same(params.unembed, tensors["lm_head.weight"])


def test_experts_one_tensor_each(tmp_path):
    tensors = random_tensors(MIXTURE)
    _, params = loaded(tmp_path, MIXTURE, tensors, shards=2)
    mixture = params.layers[0].mlp
    mlp = "model.layers.0.mlp."
    same = np.testing.assert_array_equal
    same(mixture.router, tensors[f"{mlp}gate.weight"].T)
    for e in range(MIXTURE["num_experts"]):
        same(mixture.gate_up[e, :, 0], tensors[f"{mlp}experts.{e}.gate_proj.weight"].T)
        same(mixture.gate_up[e, :, 1], tensors[f"{mlp}experts.{e}.up_proj.weight"].T)
        same(mixture.down[e], tensors[f"{mlp}experts.{e}.down_proj.weight"].T)


def test_stacked_experts_load_as_separate_ones(tmp_path):
    separate = random_tensors(MIXTURE)
    mlp, experts = "model.layers.0.mlp.experts.", range(MIXTURE["num_experts"])
    stacked = {name: value for name, value in separate.items() if not name.startswith(mlp)}
    stacked[f"{mlp}gate_up_proj"] = np.stack(
        [
            np.concatenate(
                [separate[f"{mlp}{e}.{name}_proj.weight"] for name in ("gate", "up")]
            )
            for e in experts
        ]
    )
    stacked[f"{mlp}down_proj"] = np.stack(
        [separate[f"{mlp}{e}.down_proj.weight"] for e in experts]
    )
    assert {n: t.shape for n, t in stacked.items()} == {
        n: t.shape for n, t in random_tensors(MIXTURE, stacked_experts=True).items()
    }
    _, expected = loaded(tmp_path / "separate", MIXTURE, separate)
    _, found = loaded(tmp_path / "stacked", MIXTURE, stacked)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", [jnp.bfloat16, jnp.float32])
def test_weights_are_cast_to_the_dtype_asked_for(tmp_path, stored, wanted):
    tensors = {name: t.astype(stored) for name, t in random_tensors(LLAMA).items()}
    _, params = loaded(tmp_path, LLAMA, tensors, wanted)
    expected = tensors["model.embed_tokens.weight"].astype(wanted)
    assert params.embed.dtype == wanted
    np.testing.assert_array_equal(np.asarray(params.embed), expected)


def test_what_a_tied_head_or_rotary_buffers_repeat_is_left_out(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    _, params = loaded(tmp_path, LLAMA, tensors)
    assert params.lm_head is None


@pytest.mark.parametrize("change", [1e-6, None], ids=["one value", "another shape"])
def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path, change):
    tensors = random_tensors(LLAMA)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += change or 0
    tensors["lm_head.weight"] = head if change else head[:-1]
    message = r"'tie_word_embeddings' is true.* 'lm_head.weight' differs from 'model.embed_tok"
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, LLAMA, tensors)


def test_a_tied_head_may_have_been_rounded(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    assert loaded(tmp_path, LLAMA, tensors)[1].lm_head is None


def test_missing_tensor(tmp_path):
    tensors = random_tensors(DENSE)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(
        ValueError,
        match=r"no tensor 'model.layers.1.self_attn.k_proj.weight'; its configuration asks "
        r"for 25 tensors: the checkpoint is incomplete",
    ):
        loaded(tmp_path, DENSE, tensors)


def test_missing_tensors_are_counted(tmp_path):
    tensors = random_tensors(DENSE | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.1.\S+' \(and 10 more\)"):
        loaded(tmp_path, DENSE, tensors)


def test_unexpected_shape(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((21, 12), np.float32)
    with pytest.raises(
        ValueError,
        match=r"'model.layers.0.mlp.up_proj.weight' has shape \(21, 12\); its configuration "
        r"asks for \(20, 12\)",
    ):
        loaded(tmp_path, DENSE, tensors)


def test_tensor_without_a_place(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.float32([0] * 11 + [1e-3])
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.o_proj.bias' has no place in the model"
    ):
        loaded(tmp_path, DENSE, tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite(tmp_path, value):
    tensors = random_tensors(DENSE)
    tensors["model.layers.1.self_attn.v_proj.weight"][5, 7] = value
    with pytest.raises(
        ValueError, match=r"'model.layers.1.self_attn.v_proj.weight' holds NaN or infinity"
    ):
        loaded(tmp_path, DENSE, tensors)


def test_value_that_overflows_the_dtype_asked_for(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.norm.weight"][0] = 1e6
    with pytest.raises(ValueError, match=r"'model.norm.weight' holds .* infinity as float16"):
        loaded(tmp_path, DENSE, tensors, jnp.float16)


def test_dtype_that_is_not_a_float(tmp_path):
    with pytest.raises(ValueError, match="dtype is int8; weights need one of float32, bfloat"):
        loaded(tmp_path, DENSE, random_tensors(DENSE), jnp.int8)
