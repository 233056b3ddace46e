"""Quantised checkpoints load as the weights they stand for, bit for bit in float32."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxspec import checkpoints
from jaxspec.checkpoints import convert, huggingface
from jaxspec.checkpoints.drafters import load_drafter
from tests.checkpoints.writing import DENSE, MIXTURE, random_tensors, write_folder

CONFIG = DENSE | {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48,
                  "num_attention_heads": 4, "num_hidden_layers": 1}  # fmt: skip
LINEAR = re.compile(r".*(_proj|experts\.\d\.\w+)\.weight")
BLOCK = (20, 24)  # divides no axis: the last blocks are smaller
GROUP = 8
FP8 = ml_dtypes.float8_e4m3fn


# Each format: (weight's shape, random) -> (tensors in place of `weight`, what they stand for).
# Expected values are made element by element, as the formats are described.


def fp8(scale_shape, suffix):
    def quantise(shape, random):
        values = random.normal(size=shape).astype(FP8)
        scale = random.uniform(0.5, 2, scale_shape(shape)).astype(np.float32)
        per = [-(-n // m) for n, m in zip(shape, (*scale.shape, 1, 1)[:2], strict=True)]
        if suffix == "weight_scale_inv" and scale.ndim == 2:
            per = BLOCK
        expected = np.empty(shape, np.float32)
        for i, j in np.ndindex(shape):
            at = (i // per[0], j // per[1])[: scale.ndim]
            expected[i, j] = (
                np.float32(values[i, j]) * scale[at if scale.size > 1 else ...].item()
            )
        return {"weight": values, suffix: scale, "input_scale": np.float32([0.5])}, expected

    return quantise


def blocks(shape):
    return tuple(-(-n // m) for n, m in zip(shape, BLOCK, strict=True))


def pack(integers, bits, axis):
    """int32 words along an axis, the first integer in the lowest bits; missing ones are 0."""
    rows = np.moveaxis(integers, axis, -1).astype(np.int64)
    per = 32 // bits
    words = np.zeros((*rows.shape[:-1], -(-rows.shape[-1] // per)), np.int64)
    for k in range(rows.shape[-1]):
        words[..., k // per] |= rows[..., k] << (bits * (k % per))
    words = words.astype(np.uint32).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def int8(shape, random):
    values = random.integers(-128, 128, shape).astype(np.int8)
    scale = random.uniform(0.5, 2, (shape[0], 1)).astype(ml_dtypes.bfloat16)
    return {"weight": values, "weight_scale": scale}, values * scale.astype(np.float32)


def packed(symmetric, reordered=False):
    def quantise(shape, random):
        integers = random.integers(0, 16, shape)
        scale = random.uniform(0.5, 2, (shape[0], shape[1] // GROUP)).astype(np.float32)
        zero = random.integers(0, 16, scale.shape)
        group = np.arange(shape[1]) // GROUP
        if reordered:
            group = random.permutation(group)
        zeros = np.full(shape, 8) if symmetric else zero[:, group]
        tensors = {
            "weight_packed": pack(integers, 4, 1),
            "weight_scale": scale,
            "weight_shape": np.array(shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zero, 4, 0)
        if reordered:
            tensors["weight_g_idx"] = group.astype(np.int32)
        return tensors, ((integers - zeros) * scale[:, group]).astype(np.float32)

    return quantise


def gptq(bits, one):
    def quantise(shape, random):
        rows, columns = shape
        integers = random.integers(0, 2**bits, (columns, rows))
        scale = random.uniform(0.5, 2, (columns // GROUP, rows)).astype(np.float16)
        zero = random.integers(one, 2**bits, scale.shape)
        group = random.permutation(np.arange(columns) // GROUP).astype(np.int32)  # desc_act
        expected = (integers - zero[group]) * scale[group].astype(np.float32)
        tensors = {
            "qweight": pack(integers, bits, 0),
            "qzeros": pack(zero - one, bits, 1),
            "scales": scale,
            "g_idx": group,
        }
        return tensors, expected.T.astype(np.float32)

    return quantise


def awq(shape, random):
    rows, columns = shape

    def shuffled(x):  # nibble i of a word holds column 0, 2, 4, 6, 1, 3, 5, 7 of its eight
        return x.reshape(len(x), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape)

    integers = random.integers(0, 16, (columns, rows))
    scale = random.uniform(0.5, 2, (columns // GROUP, rows)).astype(np.float16)
    zero = random.integers(0, 16, scale.shape)
    group = np.arange(columns) // GROUP
    expected = (integers - zero[group]) * scale[group].astype(np.float32)
    tensors = {
        "qweight": pack(shuffled(integers), 4, 1),
        "qzeros": pack(shuffled(zero), 4, 1),
        "scales": scale,
    }
    return tensors, expected.T.astype(np.float32)


def compressed(format, **weights):
    group = {"weights": weights, "targets": ["Linear"], "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GROUPS = dict(type="int", num_bits=4, strategy="group", group_size=GROUP)
FORMATS = {
    "fp8 blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
        fp8(blocks, "weight_scale_inv"),
    ),
    "fp8 tensor": ({"quant_method": "fp8"}, fp8(lambda shape: (1,), "weight_scale")),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        fp8(lambda shape: (), "weight_scale"),
    ),
    "fp8 rows": (
        compressed("float-quantized", type="float", num_bits=8, strategy="channel"),
        fp8(lambda shape: (shape[0], 1), "weight_scale"),
    ),
    "int8 rows": (
        compressed("int-quantized", type="int", num_bits=8, strategy="channel"),
        int8,
    ),
    "int4 symmetric": (compressed("pack-quantized", **GROUPS), packed(True)),
    "int4 asymmetric": (compressed("pack-quantized", **GROUPS), packed(False)),
    "int4 reordered": (compressed("pack-quantized", **GROUPS), packed(True, True)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq(4, 1)),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8, "sym": True}, gptq(8, 1)),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        gptq(4, 0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
}


def write(folder, raw, name, spoilt="", change=None, *, head=False):
    """A quantised checkpoint; returns the tensors that it stands for.

    Args:
      spoilt, change: a tensor and what to do to it; where that gives None it is left out.
      head: the LM head is quantised too.
    """
    section, quantise = FORMATS[name]
    random = np.random.default_rng(0)
    stored, meant = {}, {}
    for tensor, value in random_tensors(raw).items():
        if not LINEAR.fullmatch(tensor) and not (head and tensor == "lm_head.weight"):
            stored[tensor] = meant[tensor] = value
            continue
        parts, values = quantise(value.shape, random)
        meant[tensor] = np.ascontiguousarray(values)
        base = tensor.removesuffix("weight")
        stored |= {base + part: array for part, array in parts.items()}
    if change is not None:
        stored[spoilt] = change(stored[spoilt])
    stored = {name: value for name, value in stored.items() if value is not None}
    write_folder(folder, raw | {"quantization_config": section}, stored)
    return meant


def load(folder, dtype="float32"):
    config = huggingface.read_config(folder)
    return jax.tree.map(np.asarray, huggingface.load_params(folder, config, dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_dequantised_checkpoint(tmp_path, name):
    meant = write(tmp_path / "quantised", CONFIG, name)
    write_folder(tmp_path / "plain", CONFIG, meant)
    with pytest.warns(UserWarning, match=r"is stored as .*; its weights are dequantised"):
        found = load(tmp_path / "quantised")
    jax.tree.map(np.testing.assert_array_equal, found, load(tmp_path / "plain"))


@pytest.mark.filterwarnings("ignore:.*is stored as")
def test_experts_of_a_mixture(tmp_path):
    raw = MIXTURE | {"hidden_size": 32, "moe_intermediate_size": 24}
    meant = write(tmp_path / "quantised", raw, "fp8 blocks")
    write_folder(tmp_path / "plain", raw, meant)
    found = load(tmp_path / "quantised")
    jax.tree.map(np.testing.assert_array_equal, found, load(tmp_path / "plain"))


@pytest.mark.filterwarnings("ignore:.*is stored as")
def test_modelopts_own_file(tmp_path):
    meant = write(tmp_path / "quantised", CONFIG, "modelopt")
    (tmp_path / "quantised/config.json").write_text(json.dumps(CONFIG))
    file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "quantised/hf_quant_config.json").write_text(json.dumps(file))
    write_folder(tmp_path / "plain", CONFIG, meant)
    found = load(tmp_path / "quantised")
    jax.tree.map(np.testing.assert_array_equal, found, load(tmp_path / "plain"))
    file["quantization"]["quant_algo"] = "NVFP4"
    (tmp_path / "quantised/hf_quant_config.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=r"hf_quant_config.json.*'quant_algo' is 'NVFP4'"):
        load(tmp_path / "quantised")


@pytest.mark.filterwarnings("ignore:.*is stored as")
@pytest.mark.parametrize("value", [0, 0.5, np.nan])
def test_biases_of_zeros_as_autogptq_writes_them_are_left_out(tmp_path, value):
    """Qwen2's own biases of queries, keys and values are read."""
    raw = CONFIG | {"model_type": "qwen2"}
    meant = write(tmp_path / "quantised", raw, "gptq")
    write_folder(tmp_path / "plain", raw, meant)
    stored = load_file(tmp_path / "quantised/model.safetensors")
    for name in [name for name in stored if name.endswith(".qweight")]:
        base = name.removesuffix("qweight")
        stored.setdefault(f"{base}bias", np.zeros(stored[name].shape[1], np.float16))
    stored["model.layers.0.mlp.up_proj.bias"][-1] = value
    save_file(stored, tmp_path / "quantised/model.safetensors")
    if value == 0:
        found, expected = load(tmp_path / "quantised"), load(tmp_path / "plain")
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    else:
        with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.bias' has no place"):
            load(tmp_path / "quantised")


@pytest.mark.filterwarnings("ignore:.*is stored as")
def test_conversion_writes_values(tmp_path):
    meant = write(tmp_path / "quantised", CONFIG, "fp8 blocks")
    with pytest.raises(
        ValueError, match=r"stored as fp8 in blocks of 20 x 24; give the dtype to wri"
    ):
        convert.convert(tmp_path / "quantised", tmp_path / "out", format="safetensors")
    convert.convert(
        tmp_path / "quantised", tmp_path / "out", format="safetensors", dtype="float32"
    )
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    write_folder(tmp_path / "plain", CONFIG, meant)
    jax.tree.map(
        np.testing.assert_array_equal, load(tmp_path / "out"), load(tmp_path / "plain")
    )


@pytest.mark.filterwarnings("ignore:.*is stored as")
def test_drafters(tmp_path, golden):
    """The target is as it was: only the drafter is stored in 8 bits."""
    folder, _ = golden("dspark_rnn")
    raw = json.loads((folder / "draft/config.json").read_text())
    section, quantise = FORMATS["fp8 blocks"]
    random, stored, meant = np.random.default_rng(0), {}, {}
    for name, value in load_file(folder / "draft/model.safetensors").items():
        if not LINEAR.fullmatch(name):
            stored[name] = meant[name] = value
            continue
        parts, meant[name] = quantise(value.shape, random)
        stored |= {name.removesuffix("weight") + part: x for part, x in parts.items()}
    write_folder(tmp_path / "quantised", raw | {"quantization_config": section}, stored)
    write_folder(tmp_path / "plain", raw, meant)
    target = checkpoints.load(folder / "target")
    found, expected = (load_drafter(tmp_path / kind, target) for kind in ("quantised", "plain"))
    assert stored.keys() != meant.keys()
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def with_first(value):
    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


def as_dtype(dtype):
    return lambda array: array.astype(dtype)


A = "model.layers.0.self_attn.q_proj"


@pytest.mark.filterwarnings("ignore:.*is stored as")
@pytest.mark.parametrize(
    "name, tensor, change, message",
    [
        (
            "fp8 blocks",
            "weight_scale_inv",
            lambda x: None,
            r"no tensor '.*q_proj.weight_scale'",
        ),
        (
            "fp8 blocks",
            "weight_scale_inv",
            lambda x: x[:1],
            r"shape \(1, 2\); expected \(4, 2\)",
        ),
        (
            "fp8 blocks",
            "weight_scale_inv",
            with_first(0),
            r"weight_scale_inv' holds 0.0; a sca",
        ),
        (
            "fp8 blocks",
            "weight_scale_inv",
            with_first(np.nan),
            r"holds nan; a scale is positive",
        ),
        ("fp8 blocks", "weight_scale_inv", with_first(-1), r"holds -1.0"),
        (
            "fp8 blocks",
            "weight_scale_inv",
            lambda x: x.T.copy(),
            r"\(2, 4\); expected \(4, 2\)",
        ),
        ("fp8 blocks", "weight_scale_inv", as_dtype(np.int32), r"_inv' is stored as int32; sc"),
        ("fp8 blocks", "weight_scale_inv", as_dtype(FP8), r"stored as float8_e4m3fn; scales"),
        ("fp8 blocks", "weight", as_dtype(ml_dtypes.float8_e5m2), r"q_proj.weight' .*F8_E5M2"),
        ("fp8 blocks", "weight", as_dtype(np.float32), r"q_proj.weight_scale_inv' has no plac"),
        ("modelopt", "weight_scale", with_first(-2), r"weight_scale' holds -2.0"),
        ("modelopt", "weight_scale", lambda x: None, r"no tensor '.*weight_scale'"),
        ("int8 rows", "weight_scale", with_first(np.nan), r"weight_scale' holds nan"),
        ("awq", "scales", with_first(-1), r"scales' holds -1.0"),
        ("fp8 rows", "weight_scale", with_first(np.inf), r"weight_scale' holds inf"),
        ("fp8 rows", "weight", with_first(np.nan), r"'.*q_proj.weight' holds NaN or infinity"),
        ("fp8 tensor", "weight_scale", lambda x: np.ones(3, np.float32), r"has shape \(3,\)"),
        ("int4 symmetric", "weight_scale", lambda x: None, r"no tensor .*weight_scale'"),
        (
            "int4 symmetric",
            "weight_scale",
            lambda x: x[:, :3].copy(),
            r"3 scales a row",
        ),
        ("int4 symmetric", "weight_shape", lambda x: x + 1, r"weight_packed' has shape"),
        ("int4 asymmetric", "weight_zero_point", lambda x: x[:1], r"zero_point' has shape"),
        ("int4 reordered", "weight_g_idx", with_first(9), r"names groups 0 … 9; there are 4"),
        (
            "gptq",
            "g_idx",
            lambda x: None,
            r"no tensor '.*g_idx', which a quanti",
        ),
        ("gptq", "g_idx", with_first(-1), r"g_idx' names groups -1"),
        ("gptq", "scales", with_first(0), r"scales' holds 0.0"),
        ("gptq", "qzeros", lambda x: x[:1], r"qzeros' has shape"),
        ("fp8 tensor", "weight", lambda x: x[0].copy(), r"q_proj.weight' .*expected two axes"),
        ("int4 symmetric", "weight_scale", lambda x: x[0].copy(), r"_scale' .*two axes"),
        ("gptq", "scales", lambda x: x[0].copy(), r"scales' has shape .*; expected two axes"),
        ("awq", "qweight", lambda x: x[0].copy(), r"qweight' .*expected two axes"),
        ("awq", "scales", lambda x: x[:3], r"3 scales a row"),
        ("awq", "qzeros", lambda x: None, r"no tensor '.*qzeros'"),
        ("awq", "qweight", lambda x: None, r"tensor '.*q_proj.qzeros' is stored as int32"),
        ("awq", "qweight", lambda x: x[:, :1].copy(), r"scales' has shape"),
    ],
)
def test_damage_is_named(tmp_path, name, tensor, change, message):
    write(tmp_path, CONFIG, name, f"{A}.{tensor}", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"quant_method": "bitsandbytes"}, "asks for 'bitsandbytes'.*expected .*fp8, modelopt"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'fmt' is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "'weight_block_size' is"),
        ({"quant_method": "gptq", "bits": 3}, "'bits' is 3.*expected 4 or 8"),
        ({"quant_method": "gptq"}, "has no 'bits'"),
        ({"quant_method": "awq", "version": "gemv"}, "'version' is 'gemv'"),
        (compressed("nvfp4-pack-quantized", type="float", num_bits=4), "'format' is 'nvfp4"),
        (compressed("pack-quantized", type="int", num_bits=3), "'num_bits' is 3"),
        (
            compressed("int-quantized", type="int", num_bits=8, strategy="token"),
            "'strategy' is 'token'",
        ),
        (
            compressed("pack-quantized", **GROUPS) | {"transform_config": {"rotation": 1}},
            "'transform_config' is",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "'config_groups' is"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, section, message):
    write_folder(tmp_path, CONFIG | {"quantization_config": section}, random_tensors(CONFIG))
    with pytest.raises(ValueError, match=message):
        huggingface.read_config(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is stored as")
@pytest.mark.parametrize(
    "keys",
    [
        {"modules_to_not_convert": []},
        {"modules_to_not_convert": [A, "lm_head"]},
        {"ignored_layers": ["model.layers.0.mlp"]},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    ],
)
def test_which_layers_are_quantised_follows_from_the_tensors(tmp_path, keys):
    meant = write(tmp_path / "quantised", CONFIG, "fp8 blocks")
    raw = json.loads((tmp_path / "quantised/config.json").read_text())
    raw["quantization_config"] |= keys
    (tmp_path / "quantised/config.json").write_text(json.dumps(raw))
    write_folder(tmp_path / "plain", CONFIG, meant)
    found = load(tmp_path / "quantised")
    jax.tree.map(np.testing.assert_array_equal, found, load(tmp_path / "plain"))


def test_a_key_that_nobody_knows_is_told(tmp_path):
    section = {"quant_method": "fp8", "hadamard": 7}
    write_folder(tmp_path, CONFIG | {"quantization_config": section}, random_tensors(CONFIG))
    with pytest.warns(
        UserWarning, match="'quantization_config': 'hadamard': unknown and ignored"
    ):
        huggingface.read_config(tmp_path)
