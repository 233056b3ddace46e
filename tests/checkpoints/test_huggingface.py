"""config.json in both generations of keys, what it may not ask for, and names."""

import dataclasses
import fnmatch
import json

import pytest

from jaxspec import checkpoints
from jaxspec.checkpoints.huggingface import MASK, config_to_json, read_config, resolve
from jaxspec.config import RopeScaling, TargetConfig
from jaxspec.models.presets import PRESETS
from tests import tiny
from tests.checkpoints.writing import DENSE, LLAMA, MIXTURE, QWEN2, random_tensors, write_folder


def config_of(folder, raw, generation=None):
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


MIXTURE_KEYS = {
    key: value for key, value in MIXTURE.items() if key not in DENSE or key == "model_type"
}


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


def test_every_key_arrives(tmp_path):
    assert config_of(tmp_path, MIXTURE | {"eos_token_id": 3}) == TargetConfig(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=20,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        max_positions=64,
        tie_embeddings=False,
        qk_norm=True,
        attention_bias=False,
        num_experts=3,
        experts_per_token=2,
        moe_intermediate_size=5,
        norm_topk_prob=True,
        sparse_layers=(0,),
        eos_token_ids=(3,),
    )


@pytest.mark.parametrize(
    "raw, qk_norm, attention_bias, tied",
    [
        (DENSE, True, False, False),
        (MIXTURE, True, False, False),
        (LLAMA, False, False, True),
        (QWEN2, False, True, True),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_families(tmp_path, raw, qk_norm, attention_bias, tied):
    config = config_of(tmp_path, raw)
    assert config.qk_norm == qk_norm
    assert config.attention_bias == attention_bias
    assert config.tie_embeddings == tied


@pytest.mark.parametrize(
    "keys, theta",
    [
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0),
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_theta": 7, "rope_scaling": None}, 7.0),
        ({"rope_theta": 7.0, "rope_scaling": {"rope_type": "default"}}, 7.0),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 7.0}}, 7.0),
        ({}, 10_000.0),
    ],
)
def test_rope_theta_by_either_key(tmp_path, keys, theta):
    assert config_of(tmp_path, without(DENSE, "rope_parameters") | keys).rope_theta == theta


WINDOWED = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    "keys, windows",
    [
        ({}, ()),
        ({"sliding_window": 8}, ()),
        (WINDOWED | {"layer_types": ["full_attention", "sliding_attention"]}, (None, 8)),
        (WINDOWED | {"max_window_layers": 1}, (None, 8)),
        (WINDOWED, ()),  # layers from the 28th on, as transformers has it
    ],
)
def test_windows_of_every_layer(tmp_path, keys, windows):
    assert config_of(tmp_path, without(DENSE, "layer_types") | keys).windows == windows


def test_sliding_layers_may_rotate_at_their_own_base(tmp_path):
    kinds = {"layer_types": ["full_attention", "sliding_attention"]}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = {
        "full_attention": yarn | {"rope_theta": 5e5},
        "sliding_attention": {"rope_theta": 7},
    }
    found = config_of(tmp_path, DENSE | WINDOWED | kinds | {"rope_parameters": rope})
    assert found.rope_scaling == RopeScaling("yarn", 4.0, 64)
    assert (found.rope_theta, found.sliding_rope_theta) == (5e5, 7.0)
    yarn["rope_theta"] = 5e5
    both = {"full_attention": yarn, "sliding_attention": yarn}
    found = config_of(tmp_path, DENSE | WINDOWED | kinds | {"rope_parameters": both})
    assert found.sliding_rope_theta is None
    rope["sliding_attention"] = yarn | {"rope_theta": 7.0}
    with pytest.raises(ValueError, match="sliding layers that rotate unscaled"):
        config_of(tmp_path, DENSE | WINDOWED | kinds | {"rope_parameters": rope})


@pytest.mark.parametrize(
    "stated, rope, positions",
    [
        # As the cards of Qwen3 and Qwen2.5 say, without a change of the stated number.
        (40_960, {"rope_type": "yarn", "factor": 4.0}, 131_072),
        (32_768, {"type": "yarn", "factor": 4.0}, 131_072),
        (262_144, {"rope_type": "yarn", "factor": 4.0}, 262_144),
        (40_960, {"rope_type": "linear", "factor": 4.0}, 40_960),
        (40_960, {"rope_type": "default"}, 40_960),
    ],
)
def test_positions(tmp_path, stated, rope, positions):
    rope = rope | {"original_max_position_embeddings": 32_768, "rope_theta": 1e6}
    raw = without(DENSE, "rope_parameters") | {"rope_scaling": rope}
    found = config_of(tmp_path, raw | {"max_position_embeddings": stated})
    assert found.max_positions == positions


def test_number_of_experts_by_either_key(tmp_path):
    raw = without(MIXTURE, "num_experts") | {"num_local_experts": 3}
    assert config_of(tmp_path, raw) == config_of(tmp_path, MIXTURE)


WINDOWS = (None, 8, 8)
WRITTEN = {
    "Qwen3": tiny.QWEN3,
    "Qwen2": dataclasses.replace(tiny.LLAMA, attention_bias=True),
    "Llama": dataclasses.replace(
        tiny.LLAMA, rope_scaling=RopeScaling("llama3", 8.0, original_positions=64)
    ),
    "mixture": dataclasses.replace(tiny.MOE, norm_topk_prob=False, eos_token_ids=(3, 1)),
    "windows": dataclasses.replace(tiny.QWEN3, windows=WINDOWS),
    "bases of its own": dataclasses.replace(
        tiny.QWEN3,
        windows=WINDOWS,
        sliding_rope_theta=100.0,
        rope_scaling=RopeScaling("yarn", 4.0, 64, truncate=False),
    ),
} | {name: c for name, c in PRESETS.items() if c.delta_net is None}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_then_read(tmp_path, name):
    assert config_of(tmp_path, config_to_json(WRITTEN[name])) == WRITTEN[name]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (tiny.HYBRID, "qwen3"),
        (tiny.HYBRID_MOE, "qwen3_moe"),
        (dataclasses.replace(tiny.MOE, qk_norm=False), "qwen3_moe"),
        (dataclasses.replace(tiny.QWEN3, attention_bias=True), "qwen2"),
        (dataclasses.replace(tiny.LLAMA, rotary_dim=8), "llama"),
    ],
)
def test_what_no_model_type_has_is_not_written(config, kind):
    with pytest.raises(ValueError, match=f"'{kind}' does not have the layers of"):
        config_to_json(config)


@pytest.mark.parametrize(
    "keys, sparse",
    [
        ({"mlp_only_layers": []}, (0, 1, 2, 3, 4)),
        ({"mlp_only_layers": [0, 3]}, (1, 2, 4)),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [3], "decoder_sparse_step": 2}, (1,)),
    ],
)
def test_sparse_layers(tmp_path, keys, sparse):
    config = config_of(tmp_path, MIXTURE | {"num_hidden_layers": 5} | keys)
    assert config.sparse_layers == sparse


def test_head_dim_defaults_to_an_even_share(tmp_path):
    assert config_of(tmp_path, without(DENSE, "head_dim")).head_dim == 2
    assert config_of(tmp_path, DENSE | {"head_dim": None}).head_dim == 2


@pytest.mark.parametrize(
    "eos, generation, ids",
    [
        (None, None, ()),
        (4, None, (4,)),
        ([4, 2], None, (4, 2)),
        (4, {"eos_token_id": [4, 1]}, (4, 1)),
        (None, {"eos_token_id": 0}, (0,)),
        (4, {}, (4,)),
    ],
)
def test_ids_that_end_a_text(tmp_path, eos, generation, ids):
    assert config_of(tmp_path, DENSE | {"eos_token_id": eos}, generation).eos_token_ids == ids


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gemma3"}, r"'model_type' is 'gemma3'.*'qwen3' or 'qwen3_moe' or"),
        ({"hidden_act": "gelu"}, r"'hidden_act' is 'gelu'.*expected 'silu'"),
        (
            {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None},
            "no 'sliding_window'",
        ),
        ({"mlp_bias": True}, r"'mlp_bias' is True"),
        ({"attention_bias": True}, r"'attention_bias' is True"),
        ({"layer_types": ["linear_attention"] * 2}, r"'layer_types' is .*'full_attention'"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
            "'use_sliding_window' is .*true with sliding layers",
        ),
        (
            {"quantization_config": {"bits": 4}},
            r"'quantization_config'.*unquantised checkpoint",
        ),
        ({"quantization_config": {"quant_method": "hqq"}}, r"asks for 'hqq'.*fp8, modelopt"),
        ({"quantization": {"bits": 4, "group_size": 64}}, r"'quantization' asks for .*'bits'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0}},
            r"'rope_parameters' has no 'factor'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, r"is .*'rope_theta' in it"),
        ({"rope_scaling": {"type": "dynamic"}}, r"'rope_scaling' is .*dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"'rope_parameters' is .*longrope"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"'rope_parameters': 'partial_rotary_factor' is 0.5.*expected 1.0",
        ),
        ({"rope_parameters": [1]}, r"'rope_parameters' is \[1\].*expected an object"),
        ({"hidden_size": "12"}, r"'hidden_size' is '12'.*expected a positive integer"),
        ({"num_hidden_layers": 0}, r"'num_hidden_layers' is 0"),
        ({"rms_norm_eps": -1.0}, r"'rms_norm_eps' is -1.0.*a positive number"),
        ({"tie_word_embeddings": "no"}, r"'tie_word_embeddings' is 'no'"),
        ({"eos_token_id": "</s>"}, r"'eos_token_id' is '</s>'.*token id"),
        ({"layer_types": ["full_attention"]}, r"'layer_types' is .*for each of the 2 layers"),
        (
            {"eos_token_id": [1, 300]},
            r"config.json: .*ids names \[300\]; .*this model, 0 … 10",
        ),
        ({"layer_types": 1}, r"'layer_types' is 1.*a list of texts"),
        (MIXTURE_KEYS | {"mlp_only_layers": 1}, r"'mlp_only_layers' is 1.*list of integers"),
        (
            {"num_key_value_heads": 4},
            r"config.json: TargetConfig.num_heads is 6; .* a multiple of num_kv_heads = 4",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, DENSE | change)


def test_any_value_of_any_key_is_a_target_or_one_clear_refusal(tmp_path):
    raw = MIXTURE | dict(
        decoder_sparse_step=1, layer_types=["full_attention"] * 2, eos_token_id=1
    )
    anything = ("x", None, -1, 0, 1.5, True, [], {}, [1], {"a": 1}, 1000, float("nan"))
    rope = raw["rope_parameters"] | {"partial_rotary_factor": 1.0}
    changed = [raw | {key: value} for key in raw for value in anything]
    changed += [
        raw | {"rope_parameters": rope | {key: value}} for key in rope for value in anything
    ]
    refused = 0
    for one in changed:
        try:
            assert isinstance(config_of(tmp_path, one), TargetConfig)
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "config.json")), one
            refused += 1
    assert refused > len(changed) // 3


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "num_attention_heads"])
def test_missing_key(tmp_path, key):
    with pytest.raises(ValueError, match=rf"config.json has no '{key}'"):
        config_of(tmp_path, without(DENSE, key))


def test_damaged_config(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; expected a Hugging Face"):
        read_config(tmp_path)
    for nothing in ("", "\n", "\ufeff"):
        (tmp_path / "config.json").write_text(nothing)
        with pytest.raises(ValueError, match=r"config.json is empty; download it again"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"holds a JSON list; expected an object"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*config.json: .*directory"):
        read_config(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DENSE), encoding="utf-8-sig")
    assert read_config(tmp_path).num_layers == 2


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "o/m"}')
    with pytest.raises(
        ValueError, match=r"no config.json; it holds a PEFT adapter of 'o/m', no"
    ):
        read_config(tmp_path)


def test_a_folder_of_folders(tmp_path):
    (tmp_path / "b").mkdir()
    config_of(tmp_path / "b", DENSE)
    with pytest.raises(ValueError, match=r"no config.json; its folders have \(b\): pass one"):
        read_config(tmp_path)


def test_existing_paths_resolve_to_themselves(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"


@pytest.mark.parametrize(
    "name",
    ["./absent", "/absent/folder", "absent.gguf", "absent", "a/b/c", "~nosuchuser/x"],
)
def test_what_is_neither_a_path_nor_a_hub_name(name):
    with pytest.raises(
        ValueError,
        match=rf"there is no file or folder {name}; expected a path.* of smollm2-135m, qwen",
    ):
        resolve(name)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which is out of reach."""
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    original = huggingface_hub.snapshot_download

    def from_cache(name, **options):
        return original(name, cache_dir=tmp_path / "hub", **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", from_cache)
    return tmp_path / "hub"


def test_hub_out_of_reach(hub_cache):
    with pytest.raises(
        ValueError,
        match=r"no folder o/m, and the Hugging Face hub did not supply it .*pass the path of "
        r"a downloaded checkpoint, or run `hf download o/m`",
    ):
        resolve("o/m")


def test_hub_out_of_reach_but_cached(hub_cache):
    snapshot = hub_cache / "models--o--m" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (hub_cache / "models--o--m" / "refs").mkdir()
    (hub_cache / "models--o--m" / "refs" / "main").write_text("0123abc")
    write_folder(snapshot, DENSE, random_tensors(DENSE))
    target = checkpoints.load("o/m")
    assert target.config.hidden_size == DENSE["hidden_size"]
    assert target.tokenizer is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, whose files a test adds to the list."""
    names = ["config.json"]

    def snapshot(name, allow_patterns):
        for file in names:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: names)
    return names


def test_pickled_weights_of_the_hub_are_named_and_not_downloaded(hub, tmp_path):
    hub.append("pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^o/m holds pickled weights only \(pytorch_model\."):
        resolve("o/m")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    hub.append("model.safetensors")
    assert resolve("o/m") == tmp_path
    assert not (tmp_path / "pytorch_model.bin").exists()


def test_gguf_files_are_named(hub, tmp_path):
    hub += ["model-Q8_0.gguf", "model-Q4_0.gguf", "pytorch_model.bin"]
    with pytest.raises(ValueError, match=r"one \(`hf download o/m model-Q4_0.gguf`\) and pass"):
        resolve("o/m")
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"it holds GGUF files \(model.gguf\): pass the path"):
        read_config(tmp_path)


@pytest.mark.parametrize("folder", ["", "inner/"])
def test_a_mask_embedding_of_the_hub_is_seen(hub, tmp_path, folder):
    hub += [f"{folder}model.safetensors", f"{folder}mask_embedding.pt"]
    assert (resolve("o/m") / folder / MASK).exists()
