"""GGUF: weights against the same model as safetensors, the tokenizer, damaged files."""

import contextlib

import gguf
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxspec import checkpoints
from jaxspec.checkpoints.gguf import load_params, load_tokenizer, read_config
from jaxspec.checkpoints.gguf_file import GgufFile
from jaxspec.checkpoints.huggingface import load_params as load_folder
from jaxspec.checkpoints.huggingface import read_config as read_folder
from jaxspec.config import TargetConfig
from tests.checkpoints.gguf_files import METADATA, write_gguf
from tests.checkpoints.writing import (
    DENSE,
    LLAMA,
    MIXTURE,
    QWEN2,
    random_tensors,
    write_folder,
)

SIZES = {  # widths are multiples of 32, the length of a block
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
}
RAW = LLAMA | SIZES


@pytest.fixture
def tensors():
    return random_tensors(RAW)


@pytest.fixture
def path(tmp_path, tensors):
    return write_gguf(tmp_path / "model.gguf", tensors)


def test_every_key_arrives(path):
    assert read_config(path) == TargetConfig(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=5000.0,
        rms_norm_eps=0.5,
        max_positions=64,
        tie_embeddings=True,
        qk_norm=False,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize("tied", [True, False])
def test_weights_equal_those_of_the_same_model_as_safetensors(tmp_path, tied):
    raw = RAW | {"tie_word_embeddings": tied}
    tensors = random_tensors(raw)
    path = write_gguf(tmp_path / "model.gguf", tensors)
    config = read_config(path)
    assert config.tie_embeddings == tied
    expected = load_folder(write_folder(tmp_path / "hf", raw, tensors), config)
    jax.tree.map(np.testing.assert_array_equal, load_params(path, config), expected)


QWENS = {
    "qwen2": QWEN2 | SIZES,
    "qwen3": DENSE | SIZES | {"tie_word_embeddings": True},
    "qwen3moe": MIXTURE | SIZES | {"moe_intermediate_size": 32, "mlp_only_layers": []},
}


def qwen_metadata(arch, **more):
    """As llama.cpp's converter writes it: no vocabulary size, the head's dimension by name."""
    names = {name: name.replace("llama.", f"{arch}.") for name in METADATA}
    own = {names[name]: x for name, x in METADATA.items() if "vocab" not in name}
    own[f"{arch}.attention.key_length"] = own.pop(f"{arch}.rope.dimension_count")
    own[f"{arch}.attention.value_length"] = 16
    own[f"{arch}.attention.layer_norm_rms_epsilon"] = 2.0**-17
    if arch == "qwen3moe":
        own |= {f"{arch}.expert_count": 3, f"{arch}.expert_used_count": 2}
        own |= {f"{arch}.expert_feed_forward_length": 32}
    return own | {f"{arch}.{key}": value for key, value in more.items()}


def qwen_folder(folder, arch, tensors, **more):
    return write_folder(
        folder, QWENS[arch] | {"rms_norm_eps": 2.0**-17, "eos_token_id": 2} | more, tensors
    )


@pytest.mark.parametrize("arch", QWENS)
def test_a_qwen_equals_the_same_model_as_safetensors(tmp_path, arch):
    tensors = random_tensors(QWENS[arch])
    path = write_gguf(tmp_path / "model.gguf", tensors, qwen_metadata(arch), arch=arch)
    folder = qwen_folder(tmp_path / "hf", arch, tensors)
    config = read_config(path)
    assert config == read_folder(folder)
    jax.tree.map(
        np.testing.assert_array_equal, load_params(path, config), load_folder(folder, config)
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_an_expert_is_read_from_its_own_blocks(tmp_path, kind):
    tensors = random_tensors(QWENS["qwen3moe"])
    kind = gguf.GGMLQuantizationType[kind]
    metadata = qwen_metadata("qwen3moe")
    path = write_gguf(tmp_path / "a.gguf", tensors, metadata, arch="qwen3moe", kind=kind)
    file = GgufFile(path)
    for name in ("gate", "up", "down"):
        whole = file.read(f"blk.1.ffn_{name}_exps.weight")
        assert whole.shape[0] == 3
        for i in range(3):
            found = file.read(f"blk.1.ffn_{name}_exps.weight", i)
            np.testing.assert_array_equal(found, whole[i])


@pytest.mark.parametrize(
    "more, rope",
    [
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
    ],
)
def test_scaled_positions(tmp_path, more, rope):
    tensors = random_tensors(QWENS["qwen3"])
    metadata = qwen_metadata("qwen3", **more)
    path = write_gguf(tmp_path / "model.gguf", tensors, metadata, arch="qwen3")
    own = {"rope_parameters": {"rope_theta": 5000.0, **rope}}
    folder = qwen_folder(tmp_path / "hf", "qwen3", tensors, **own)
    assert read_config(path).rope_scaling == read_folder(folder).rope_scaling


def test_both_ends_of_a_qwen(tmp_path):
    tokens = TOKENS | {"pre": "qwen2"}
    tokens["tokens"] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOKENS["tokens"][3:]]
    tensors = random_tensors(QWENS["qwen3"])
    path = write_gguf(
        tmp_path / "a.gguf", tensors, qwen_metadata("qwen3"), arch="qwen3", tokens=tokens
    )
    assert read_config(path).eos_token_ids == (2, 0)


@pytest.mark.parametrize("kind, step", [("Q8_0", 1 / 127), ("Q4_1", 1 / 15), ("F16", 1e-3)])
def test_quantised_weights_are_within_a_step(tmp_path, tensors, kind, step):
    path = write_gguf(tmp_path / "model.gguf", tensors, kind=gguf.GGMLQuantizationType[kind])
    config = read_config(path)
    found = load_params(path, config)
    expected = load_folder(write_folder(tmp_path / "hf", RAW, tensors), config)
    # A block's values span at most 8 (standard normal); rounding moves one by half a step.
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=8 * step / 2)  # noqa: E731
    jax.tree.map(close, found, expected)
    assert np.any(np.asarray(found.embed) != np.asarray(expected.embed))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"llama.rope.scaling.type": "longrope"}, r"scaling.type' is 'longrope'.* or 'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, r"has no 'llama.rope.scaling.factor'"),
        ({"llama.rope.scaling.factor": 2.0}, r"'llama.rope.scaling.factor' is 2.0.*expected 1"),
        ({"split.count": 3}, r"'split.count' is 3.*join its parts by `llama-gguf-split"),
        ({"llama.expert_count": 8}, r"'llama.expert_count' is 8.*expected 0"),
        ({"llama.block_count": "two"}, r"'llama.block_count' is 'two'.*a positive integer"),
        ({"llama.attention.key_length": 8}, r"'llama.rope.dimension_count' is 16.*expected 8"),
        ({"llama.attention.sliding_window": 32}, r"'llama.attention.sliding_window' is 32"),
        ({"llama.logit_scale": 0.5}, r"'llama.logit_scale' is 0.5.*expected 1"),
        (
            {"tokenizer.ggml.eos_token_id": 11},
            r"ids names \[11\]; .*model, 0 … 10",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, tensors, change, message):
    path = write_gguf(tmp_path / "model.gguf", tensors, METADATA | change)
    with pytest.raises(ValueError, match=message):
        read_config(path)


def test_what_is_not_known_is_named(tmp_path, tensors):
    change = {"llama.moon": 1, "llama.attention.value_length": 16, "llama.logit_scale": 1.0}
    path = write_gguf(tmp_path / "model.gguf", tensors, METADATA | change)
    with pytest.warns(UserWarning, match=r"model.gguf: 'llama.moon': unknown and ignored"):
        read_config(path)


def test_every_end_of_text_turn_and_message(tmp_path, tensors):
    change = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    path = write_gguf(tmp_path / "model.gguf", tensors, METADATA | change)
    assert read_config(path).eos_token_ids == (2, 5)


def test_other_architecture(tmp_path, tensors):
    path = write_gguf(tmp_path / "model.gguf", tensors, arch="gemma3")
    with pytest.raises(ValueError, match=r"'general.architecture' is 'gemma3'.* or 'qwen3moe'"):
        read_config(path)


def test_missing_key(tmp_path, tensors):
    metadata = {key: value for key, value in METADATA.items() if "block_count" not in key}
    path = write_gguf(tmp_path / "model.gguf", tensors, metadata)
    with pytest.raises(ValueError, match=r"has no 'llama.block_count'; it is not a target's"):
        read_config(path)


def test_missing_tensor(tmp_path, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "model.gguf", tensors)
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight'"):
        load_params(path, read_config(path))


def test_tensor_without_a_place(tmp_path, tensors):
    tensors["rope_freqs.weight"] = np.ones(2, np.float32)
    path = write_gguf(tmp_path / "model.gguf", tensors)
    with pytest.raises(ValueError, match=r"'rope_freqs.weight' has no place in the model"):
        load_params(path, read_config(path))


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_truncated_file(path, fraction):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ValueError, match=r"model.gguf is not a whole GGUF file \(it ends at"):
        read_config(path)


def test_garbage(path):
    path.write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(ValueError, match=r"not a whole GGUF file \(it does not begin with"):
        read_config(path)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"absent.gguf does not exist"):
        read_config(tmp_path / "absent.gguf")


@pytest.mark.filterwarnings("ignore:.*unknown and ignored")
@settings(deadline=None, max_examples=200)
@given(at=st.integers(4, 2500), byte=st.integers(0, 255))
@example(at=1074, byte=39)  # another quantisation, whose scales overflow
def test_damaged_header_is_read_or_refused(tmp_path_factory, at, byte):
    path = tmp_path_factory.getbasetemp() / "whole.gguf"
    if not path.exists():
        write_gguf(path, random_tensors(RAW))
    data = bytearray(path.read_bytes())
    data[at] = byte
    damaged = path.with_name("damaged.gguf")
    damaged.write_bytes(data)
    try:
        GgufFile(damaged)
    except ValueError as error:
        assert "is not a whole GGUF file" in str(error)
    with contextlib.suppress(ValueError):
        checkpoints.load(damaged)


TOKENS = {
    "pre": "smollm",
    "tokens": ["<end>", "<say>", "a", "b", "1", "2", "Ġ", "Ã", "©", "ab", "Ġab", "12"],
    "types": [3, 3] + [1] * 10,
    "merges": ["a b", "Ġ ab", "1 2"],
    "template": "<say>{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


def test_tokenizer(tmp_path, tensors):
    metadata = METADATA | {"tokenizer.ggml.eos_token_id": 0}
    path = write_gguf(tmp_path / "model.gguf", tensors, metadata, tokens=TOKENS)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("ab ab") == [9, 10]
    assert tokenizer.encode("12é") == [4, 5, 7, 8]  # digits apart, in spite of the merge
    assert tokenizer.encode("ab<end>b") == [9, 0, 3]
    assert tokenizer.decode([9, 10, 4, 5, 7, 8, 0]) == "ab ab12é"
    assert tokenizer.chat("ab") == [1, 9]
    assert tokenizer.eos_token_ids == (0,)


def test_tokenizer_of_another_kind(tmp_path, tensors):
    path = write_gguf(tmp_path / "model.gguf", tensors, tokens=TOKENS | {"pre": "llama-bpe"})
    with pytest.raises(ValueError, match=r"'tokenizer.ggml.pre' is 'llama-bpe'.*'smollm'"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "change, metadata",
    [
        ({"merges": ["a x"]}, {}),
        ({}, {"tokenizer.ggml.eos_token_id": 99}),
        ({"types": [3] * 99}, {}),
    ],
    ids=["merge of an unknown token", "end past the last token", "more types than tokens"],
)
def test_damaged_tokenizer(tmp_path, tensors, change, metadata):
    path = write_gguf(
        tmp_path / "model.gguf", tensors, METADATA | metadata, tokens=TOKENS | change
    )
    with pytest.raises(ValueError, match=r"the tokenizer in .*model.gguf is damaged .*again"):
        load_tokenizer(path)


def test_load_without_a_tokenizer(path):
    assert checkpoints.load(path).tokenizer is None


@pytest.mark.real
def test_smollm2(smollm2):
    config, tokenizer = smollm2.config, smollm2.tokenizer
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.eos_token_ids == tokenizer.eos_token_ids == (2,)
    assert sum(x.size for x in jax.tree.leaves(smollm2.params)) == 134_515_008
    assert tokenizer.encode("Hello 1234") == [19556, 216, 33, 34, 35, 36]
    assert tokenizer.decode(tokenizer.chat("hi")) == (
        "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\n"
        "user\nhi\nassistant\n"
    )
