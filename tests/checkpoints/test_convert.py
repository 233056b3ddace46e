"""Conversion to an Orbax store and back, bit for bit; and to fp8."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxspec import checkpoints
from jaxspec.checkpoints.convert import convert
from jaxspec.checkpoints.fp8 import dequantised, quantise
from jaxspec.checkpoints.huggingface import WEIGHTS
from jaxspec.checkpoints.tensors import SafetensorsFolder
from jaxspec.cli import main
from jaxspec.models.scaled import by_value
from tests.checkpoints.writing import (
    DENSE,
    LLAMA,
    MIXTURE,
    QWEN2,
    random_tensors,
    write_folder,
    write_large_folder,
)


@pytest.mark.parametrize("raw", [DENSE, MIXTURE, LLAMA, QWEN2], ids=lambda r: r["model_type"])
def test_there_and_back(tmp_path, raw):
    source = tmp_path / "source"
    write_large_folder(source, raw, shards=2)
    store, again = tmp_path / "store", tmp_path / "again"
    done = convert(source, store)
    expected = checkpoints.load(source, "bfloat16")
    found = checkpoints.load(store, "bfloat16")
    assert found.config == expected.config
    assert done.dtype == "bfloat16" and done.arrays == len(jax.tree.leaves(found.params))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)

    convert(store, again, format="safetensors")
    before, after = SafetensorsFolder(source), SafetensorsFolder(again)
    assert before.shapes == after.shapes
    for name in before.shapes:
        np.testing.assert_array_equal(before.read(name), after.read(name))


def test_another_dtype(tmp_path):
    write_large_folder(tmp_path / "source", DENSE, shards=1)
    done = convert(tmp_path / "source", tmp_path / "store", dtype=jnp.float32)
    assert done.dtype == "float32"
    for folder in ("source", "store"):
        params = checkpoints.load(tmp_path / folder, "float32").params
        assert params.embed.dtype == jnp.float32
    narrow = checkpoints.load(tmp_path / "store", "bfloat16").params
    expected = checkpoints.load(tmp_path / "source", "bfloat16").params
    jax.tree.map(np.testing.assert_array_equal, narrow, expected)


def test_tensors_of_two_dtypes(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    write_folder(tmp_path / "source", DENSE, tensors)
    with pytest.raises(ValueError, match=r"tensors of float16 and float32; say which"):
        convert(tmp_path / "source", tmp_path / "store")


def test_an_output_that_exists_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match=r"exists; give --output a new folder"):
        convert(tmp_path, tmp_path)


def test_a_damaged_source_leaves_no_output(tmp_path):
    tensors = random_tensors(DENSE)
    tensors["model.norm.weight"][3] = np.nan
    write_folder(tmp_path / "source", DENSE, tensors)
    with pytest.raises(ValueError, match=r"'model.norm.weight' holds NaN"):
        convert(tmp_path / "source", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_store(tmp_path, damage):
    write_large_folder(tmp_path / "source", DENSE, shards=1)
    convert(tmp_path / "source", tmp_path / "store")
    files = (tmp_path / "store" / WEIGHTS).rglob("d/*")
    for path in [path for path in files if path.is_file()]:  # some hold what is not read
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights.orbax cannot be read .*; convert"):
        checkpoints.load(tmp_path / "store")


def test_a_store_of_another_model(tmp_path):
    write_large_folder(tmp_path / "source", DENSE, shards=1)
    convert(tmp_path / "source", tmp_path / "store")
    path = tmp_path / "store" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 11', '"vocab_size": 12'))
    with pytest.raises(
        ValueError, match=r"'embed' is of shape \(11, 12\), expected \(12, 12\)"
    ):
        checkpoints.load(tmp_path / "store")


FP8 = {"hidden_size": 160, "head_dim": 40, "num_attention_heads": 4, "intermediate_size": 200}


def test_fp8_in_blocks(tmp_path, capsys):
    tensors = random_tensors(DENSE | FP8)
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    write_folder(tmp_path / "source", DENSE | FP8, tensors)
    assert main(["convert", "--target", str(tmp_path / "source"), "--dtype", "fp8",
                 "--output", str(tmp_path / "fp8")]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "layers.1: relative rounding error 2." in out and "fp8, 39 arrays read back" in out

    found = SafetensorsFolder(tmp_path / "fp8", quantised=True)
    assert len(found.shapes) == 39  # 25, and the scales of 14
    for name, weight in tensors.items():
        if "_proj" not in name:
            assert found.read(name).tobytes() == weight.tobytes()
            continue
        scale = found.read(f"{name}_scale_inv")
        rows, columns = (-(-n // 128) for n in weight.shape)
        assert scale.shape == (rows, columns) and scale.dtype == np.float32
        for i, j in np.ndindex(scale.shape):
            block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            own = weight[block].astype(np.float32)
            assert scale[i, j] == np.abs(own).max() / np.float32(448)
            expected = (own / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
            assert found.read(name)[block].tobytes() == expected.tobytes()

    section = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "fp8" and section["weight_block_size"] == [128, 128]
    assert "lm_head" in section["modules_to_not_convert"]
    loaded = checkpoints.load(tmp_path / "fp8", weights="stored").params.layers[1].mlp.down
    raw = found.read("model.layers.1.mlp.down_proj.weight")
    assert np.asarray(loaded.values).tobytes() == raw.tobytes()
    with pytest.raises(
        ValueError, match=r"stored as fp8 in blocks of 128 x 128; expected an unq"
    ):
        convert(tmp_path / "fp8", tmp_path / "again", dtype="fp8")
    with pytest.raises(ValueError, match=r"format is 'orbax'; fp8 is written as safetensors"):
        convert(tmp_path / "source", tmp_path / "again", dtype="fp8", format="orbax")


def test_stacked_experts_in_fp8_are_one_tensor_each(tmp_path):
    raw = MIXTURE | FP8 | {"moe_intermediate_size": 136}
    stacked, mlp = random_tensors(raw, stacked_experts=True), "model.layers.0.mlp."
    write_folder(tmp_path / "source", raw, stacked)
    convert(tmp_path / "source", tmp_path / "fp8", dtype="fp8")
    found = SafetensorsFolder(tmp_path / "fp8", quantised=True)
    gate_up, down = (stacked[f"{mlp}experts.{name}_proj"] for name in ("gate_up", "down"))
    for e in range(3):
        own = {"gate": gate_up[e, :136], "up": gate_up[e, 136:], "down": down[e]}
        for kind, weight in own.items():
            name = f"{mlp}experts.{e}.{kind}_proj.weight"
            values, scale = quantise(weight)
            assert found.read(name).tobytes() == values.tobytes()
            assert found.read(f"{name}_scale_inv").tobytes() == scale.tobytes()
    assert not any(
        name.endswith(("gate_up_proj", "experts.down_proj")) for name in found.shapes
    )
    kept = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert f"{mlp}gate" in kept["modules_to_not_convert"]
    assert not any("experts" in name for name in kept["modules_to_not_convert"])
    params = checkpoints.load(tmp_path / "fp8", weights="stored").params
    assert params.layers[0].mlp.down.values.dtype == ml_dtypes.float8_e4m3fn


def test_stacked_experts_of_another_shape(tmp_path):
    tensors = random_tensors(MIXTURE, stacked_experts=True)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.ones((3, 9, 12), np.float32)
    write_folder(tmp_path / "source", MIXTURE, tensors)
    with pytest.raises(
        ValueError, match=r"'.*gate_up_proj' has shape \(3, 9, 12\); expected \(ex"
    ):
        convert(tmp_path / "source", tmp_path / "fp8", dtype="fp8")


@pytest.mark.parametrize("tied", [True, False])
def test_an_lm_head_in_fp8(tmp_path, tied):
    raw = DENSE | FP8 | {"tie_word_embeddings": tied}
    tensors = random_tensors(raw)
    write_folder(tmp_path / "source", raw, tensors)
    done = convert(tmp_path / "source", tmp_path / "fp8", dtype="fp8", fp8_lm_head=True)
    assert set(done.errors) == {"layers.0", "layers.1", "LM head"}

    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    values, scale = quantise(tensors[name])
    params = checkpoints.load(tmp_path / "fp8", weights="stored").params
    assert np.asarray(params.lm_head.values).tobytes() == values.tobytes()
    np.testing.assert_array_equal(by_value(params.lm_head), dequantised(values, scale))
    np.testing.assert_array_equal(params.embed, tensors["model.embed_tokens.weight"])
    written = json.loads((tmp_path / "fp8/config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert "lm_head" not in written["quantization_config"]["modules_to_not_convert"]

    # Of a configuration that still ties them the head is refused, not left out.
    written["tie_word_embeddings"] = True
    (tmp_path / "fp8/config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"ties the LM head to the embedding.*differs from"):
        checkpoints.load(tmp_path / "fp8", weights="stored")
    with pytest.raises(ValueError, match=r"fp8_lm_head needs dtype 'fp8'; dtype is None"):
        convert(tmp_path / "source", tmp_path / "again", fp8_lm_head=True)


def test_an_lm_head_that_is_missing_is_not_made_of_the_embedding(tmp_path):
    tensors = random_tensors(DENSE)
    del tensors["lm_head.weight"]
    write_folder(tmp_path / "source", DENSE, tensors)
    with pytest.raises(ValueError, match=r"has no tensor 'lm_head.weight'; the checkpoint is"):
        convert(tmp_path / "source", tmp_path / "fp8", dtype="fp8", fp8_lm_head=True)


def test_blocks_of_zeros_and_what_no_weight_can_be(tmp_path):
    values, scale = quantise(np.zeros((3, 130), np.float32))
    assert (values == 0).all() and scale.tolist() == [[1, 1]]
    for value, found in (
        (np.inf, "NaN or infin"),
        (1e7, r"1e\+07; no weight is beyond 1e\+06"),
    ):
        tensors = random_tensors(DENSE)
        tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = value
        write_folder(tmp_path / "source", DENSE, tensors)
        with pytest.raises(ValueError, match=rf"1\.self_attn\.k_proj\.weight' holds {found}"):
            convert(tmp_path / "source", tmp_path / "fp8", dtype="fp8")
        assert not (tmp_path / "fp8").exists()
