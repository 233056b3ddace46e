"""Hybrid checkpoints: where every tensor goes, what is left out, what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxspec.checkpoints import huggingface
from jaxspec.checkpoints.convert import convert
from jaxspec.checkpoints.huggingface import load_params, read_config
from jaxspec.cli import main
from tests.checkpoints.writing import write_folder

J, R, DK, DV, TAPS = 2, 3, 4, 6, 4  # key heads, value heads each, their dimensions
WIDTH, HEADS, KV_HEADS, DIM, INNER, VOCAB = 12, 4, 2, 8, 20, 11
TEXT = {
    "model_type": "qwen3_5_text",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": J,
    "linear_num_value_heads": J * R,
    "linear_key_head_dim": DK,
    "linear_value_head_dim": DV,
    "linear_conv_kernel_dim": TAPS,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_theta": 1e7,
        "rope_type": "default",
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 0, 0],
        "mrope_interleaved": True,
    },
    "mtp_num_hidden_layers": 1,
}
MULTIMODAL = {
    "model_type": "qwen3_5",
    "text_config": TEXT,
    "vision_config": {"depth": 1},
    "image_token_id": 9,
    "tie_word_embeddings": False,
}
NEXT = TEXT | {
    "model_type": "qwen3_next",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 5,
    "shared_expert_intermediate_size": 7,
    "mlp_only_layers": [1],
    "partial_rotary_factor": 0.5,
    "rope_parameters": {"rope_theta": 1e7, "rope_type": "default"},
}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensors(*, interleaved=False):
    keys, values = J * DK, J * R * DV
    a, l0, l1 = "model.layers.0.linear_attn.", "model.layers.0.", "model.layers.1."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
        f"{a}conv1d.weight": (2 * keys + values, 1, TAPS),
        f"{a}A_log": (J * R,),
        f"{a}dt_bias": (J * R,),
        f"{a}norm.weight": (DV,),
        f"{a}out_proj.weight": (WIDTH, values),
        f"{l1}self_attn.q_proj.weight": (2 * HEADS * DIM, WIDTH),
        f"{l1}self_attn.k_proj.weight": (KV_HEADS * DIM, WIDTH),
        f"{l1}self_attn.v_proj.weight": (KV_HEADS * DIM, WIDTH),
        f"{l1}self_attn.o_proj.weight": (WIDTH, HEADS * DIM),
        f"{l1}self_attn.q_norm.weight": (DIM,),
        f"{l1}self_attn.k_norm.weight": (DIM,),
    }
    if interleaved:
        shapes |= {
            f"{a}in_proj_qkvz.weight": (2 * keys + 2 * values, WIDTH),
            f"{a}in_proj_ba.weight": (2 * J * R, WIDTH),
            f"{l0}mlp.gate.weight": (3, WIDTH),
            f"{l0}mlp.shared_expert_gate.weight": (1, WIDTH),
        }
        swiglus = [(f"{l0}mlp.experts.{i}.", 5) for i in range(3)]
        swiglus += [(f"{l0}mlp.shared_expert.", 7), (f"{l1}mlp.", INNER)]
    else:
        shapes |= {
            f"{a}in_proj_qkv.weight": (2 * keys + values, WIDTH),
            f"{a}in_proj_z.weight": (values, WIDTH),
            f"{a}in_proj_b.weight": (J * R, WIDTH),
            f"{a}in_proj_a.weight": (J * R, WIDTH),
        }
        swiglus = [(f"{l0}mlp.", INNER), (f"{l1}mlp.", INNER)]
    for name, inner in swiglus:
        shapes |= {f"{name}{x}_proj.weight": (inner, WIDTH) for x in ("gate", "up")}
        shapes[f"{name}down_proj.weight"] = (WIDTH, inner)
    for layer in (l0, l1):
        shapes |= {
            f"{layer}{x}_layernorm.weight": (WIDTH,) for x in ("input", "post_attention")
        }
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def nested(named):
    """As a multimodal file names them, beside its other parts."""
    renamed = {
        name.replace("model.", "model.language_model.", 1): x for name, x in named.items()
    }
    others = ("model.visual.blocks.0.attn.qkv.weight", "mtp.layers.0.mlp.up_proj.weight")
    return renamed | {name: random(3, 2) for name in others}


def load(folder):
    return load_params(folder, read_config(folder))


def test_every_tensor_of_a_gated_delta_net_has_its_place(tmp_path):
    named = tensors()
    layer = load(write_folder(tmp_path / "plain", TEXT, named)).layers[0].attention
    a, keys = "model.layers.0.linear_attn.", J * DK
    qkv = named[f"{a}in_proj_qkv.weight"]
    found = np.asarray(layer.inputs)
    assert found.shape == (WIDTH, J, 2 * DK + 2 * R * DV + 2 * R)
    q, k, v, z, b, step = np.split(found, np.cumsum([DK, DK, R * DV, R * DV, R]), axis=-1)
    parts = {
        "q": (q, qkv[:keys]),
        "k": (k, qkv[keys : 2 * keys]),
        "v": (v, qkv[2 * keys :]),
        "z": (z, named[f"{a}in_proj_z.weight"]),
        "b": (b, named[f"{a}in_proj_b.weight"]),
        "a": (step, named[f"{a}in_proj_a.weight"]),
    }
    for ours, theirs in parts.values():
        np.testing.assert_array_equal(ours.reshape(WIDTH, -1), theirs.T)
    taps, kernel = named[f"{a}conv1d.weight"][:, 0], np.asarray(layer.convolution)
    np.testing.assert_array_equal(kernel[:, :DK].reshape(-1, TAPS), taps[:keys])
    np.testing.assert_array_equal(kernel[:, 2 * DK :].reshape(-1, TAPS), taps[2 * keys :])
    np.testing.assert_array_equal(np.ravel(layer.log_rate), named[f"{a}A_log"])
    np.testing.assert_array_equal(
        layer.norm, 1 + named["model.layers.0.input_layernorm.weight"]
    )
    np.testing.assert_array_equal(layer.head_norm, named[f"{a}norm.weight"])
    out = np.asarray(layer.output).reshape(-1, WIDTH)
    np.testing.assert_array_equal(out, named[f"{a}out_proj.weight"].T)


def test_every_query_is_followed_by_its_gate(tmp_path):
    named = tensors()
    qkv = np.asarray(
        load(write_folder(tmp_path / "plain", TEXT, named)).layers[1].attention.qkv
    )
    q = named["model.layers.1.self_attn.q_proj.weight"].reshape(KV_HEADS, 2, 2, DIM, WIDTH)
    for head in range(2):
        for gate in (0, 1):
            expected = np.moveaxis(q[:, head, gate], -1, 0)
            np.testing.assert_array_equal(qkv[:, :, 2 * head + gate], expected)


def test_of_a_multimodal_file_the_text_model_is_read(tmp_path):
    plain = write_folder(tmp_path / "plain", TEXT, tensors())
    packed = write_folder(tmp_path / "packed", MULTIMODAL, nested(tensors()))
    assert read_config(plain) == read_config(packed)
    for x, y in zip(jax.tree.leaves(load(plain)), jax.tree.leaves(load(packed)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_interleaved_projections_stay_by_key_head(tmp_path):
    named = tensors(interleaved=True)
    params = load(write_folder(tmp_path / "next", NEXT, named))
    a, layer = "model.layers.0.linear_attn.", params.layers[0]
    found = np.asarray(layer.attention.inputs)
    qkvz = named[f"{a}in_proj_qkvz.weight"].reshape(J, -1, WIDTH)
    np.testing.assert_array_equal(np.moveaxis(found[..., : -2 * R], 0, -1), qkvz)
    ba = named[f"{a}in_proj_ba.weight"].reshape(J, -1, WIDTH)
    np.testing.assert_array_equal(np.moveaxis(found[..., -2 * R :], 0, -1), ba)
    gate = named["model.layers.0.mlp.shared_expert_gate.weight"][0]
    np.testing.assert_array_equal(layer.mlp.shared.gate, gate)
    config = read_config(tmp_path / "next")
    assert (config.sparse_layers, config.rotary_dim, config.norm_topk_prob) == ((0,), 4, True)


def test_rates_and_norms_stay_exact_in_bfloat16(tmp_path):
    folder = write_folder(tmp_path / "plain", TEXT, tensors())
    params = load_params(folder, read_config(folder), "bfloat16")
    layer = params.layers[0].attention
    assert layer.inputs.dtype == "bfloat16"
    exact = (layer.log_rate, layer.step_bias, layer.norm, params.final_norm)
    assert {x.dtype.name for x in exact} == {"float32"}


@pytest.mark.parametrize("raw, interleaved", [(TEXT, False), (NEXT, True)])
def test_converted_there_and_back(tmp_path, raw, interleaved):
    folder = write_folder(tmp_path / "first", raw, tensors(interleaved=interleaved))
    store, again = tmp_path / "store", tmp_path / "again"
    convert(folder, store, dtype="float32")
    convert(store, again, format="safetensors", dtype="float32")
    for x, y in zip(jax.tree.leaves(load(folder)), jax.tree.leaves(load(again)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-7)  # norms lose one, and gain it again


@pytest.mark.parametrize("to", ["safetensors", "orbax"])
def test_a_converted_multimodal_model_is_its_text_model(tmp_path, capsys, to):
    """Also for programs that read the configuration and the names of tensors."""
    nested = {
        name.replace("model.", "model.language_model."): x for name, x in tensors().items()
    }
    others = ["model.visual.patch_embed.proj.weight", "mtp.norm.weight", "mtp.fc.weight"]
    nested |= {name: np.ones(2, np.float32) for name in others}
    whole = MULTIMODAL | {
        "eos_token_id": 3,
        "architectures": ["Qwen3_5ForConditionalGeneration"],
    }
    write_folder(tmp_path / "whole", whole, nested)
    output = tmp_path / "text"
    command = ["convert", "--target", str(tmp_path / "whole"), "--output", str(output)]
    assert main([*command, "--to", to]) == 0
    assert "left out: 1 vision, 2 MTP tensors" in capsys.readouterr().out
    assert json.loads((output / "config.json").read_text()) == TEXT | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "dtype": "float32",
        "eos_token_id": [3],
        "tie_word_embeddings": False,
    }
    if to == "safetensors":
        assert load_file(output / "model.safetensors").keys() == tensors().keys()
    assert read_config(output) == read_config(tmp_path / "whole")
    found = load_params(output, read_config(output))
    jax.tree.map(np.testing.assert_array_equal, found, load(tmp_path / "whole"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_output_gate": False}, "'attn_output_gate' is False"),
        ({"output_gate_type": "sigmoid"}, "'output_gate_type' is 'sigmoid'"),
        ({"mamba_ssm_dtype": "bfloat16"}, "'mamba_ssm_dtype' is 'bfloat16'"),
        ({"layer_types": ["linear_attention"]}, "for each of 2 layers"),
        ({"num_hidden_layers": 10**12, "layer_types": None}, "expected at most 10000"),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "'layer_types' is"),
        ({"layer_types": ["linear_attention"] * 2}, "expected at least one attention layer"),
        (
            {"linear_num_value_heads": 5},
            "value_heads is 5; .* a multiple of key_heads = 2",
        ),
        ({"attention_bias": True}, "'attention_bias' is True"),
        ({"tie_word_embeddings": True}, "'tie_word_embeddings' is True.*expected False"),
        ({"quantization_config": {"quant_method": "fp8"}}, "expected it beside 'text_config'"),
        ({"num_experts": 4}, "'num_experts' is 4"),
        ({"model_type": "qwen3_5_moe_text"}, "'model_type' is 'qwen3_5_moe_text'"),
        ({"head_dim": 9}, "'partial_rotary_factor' is|rotary"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True"),
    ],
)
def test_what_a_text_model_may_not_ask_for(tmp_path, change, message):
    raw = MULTIMODAL | {"text_config": TEXT | change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "keys, rotated",
    [
        ({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5}}, 4),
        ({"rope_scaling": {"rope_theta": 1e7, "partial_rotary_factor": 0.5}}, 4),
        ({"rope_parameters": {"rope_theta": 1e7}, "partial_rotary_factor": 0.5}, 4),
        ({"rope_parameters": {"rope_theta": 1e7}}, 2),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e7, "partial_rotary_factor": 0.5},
                    "linear_attention": {"rope_theta": 1e7, "partial_rotary_factor": 1.0},
                }
            },
            4,
        ),
    ],
)
def test_rotated_dimensions(tmp_path, keys, rotated):
    """Of a head of 8."""
    raw = {key: value for key, value in TEXT.items() if key != "rope_parameters"} | keys
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path).rotary_dim == rotated


def test_no_key_of_a_published_configuration_is_unknown(tmp_path, recwarn):
    (tmp_path / "config.json").write_text(json.dumps(MULTIMODAL))
    read_config(tmp_path)
    assert not recwarn.list
    assert "qwen3_5_moe" in huggingface.MODEL_TYPES
