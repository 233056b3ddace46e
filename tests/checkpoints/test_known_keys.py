"""Every key of a configuration is read, has no effect, is refused by name, or is warned of."""

import json
import warnings

import pytest

from jaxspec.checkpoints.drafter_config import from_json
from jaxspec.checkpoints.huggingface import read_config
from jaxspec.checkpoints.json_config import JsonConfig
from tests.checkpoints.writing import DENSE, LLAMA, MIXTURE, QWEN2

DRAFT = {
    "model_type": "qwen3",
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_target_layers": 4,
    "rope_theta": 5000.0,
    "dflash_config": {"target_layer_ids": [0, 2], "mask_token_id": 3, "block_size": 4},
}


def target(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return read_config(tmp_path)


def draft(top=(), inside=()):
    own = DRAFT["dflash_config"] | dict(inside)
    return from_json(DRAFT | dict(top) | {"dflash_config": own}, "draft")


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    "key, value",
    [
        ("output_multiplier", 0.5),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("attention_sink_bias", True),
        ("attn_output_gate", True),
        ("query_pre_attn_scalar", 256),
        ("partial_rotary_factor", 0.5),
        ("rotary_dim", 2),
        ("rope_interleaved", True),
        ("use_swa", True),
        ("swa_window_size", 128),
        ("num_experts", 8),
        ("shared_expert_intermediate_size", 64),
        ("is_causal", False),
        ("no_rope_layers", [1, 0]),
        ("routed_scaling_factor", 2.5),
        ("use_mrope", True),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
    ],
)
def test_a_target_that_computes_otherwise_is_refused_by_its_key(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"config.json: '{key}' is .*not supported"):
        target(tmp_path, DENSE | {key: value})


@pytest.mark.parametrize("raw", [DENSE, MIXTURE, LLAMA, QWEN2], ids=lambda r: r["model_type"])
def test_what_changes_nothing_passes_in_silence(tmp_path, raw, no_warnings):
    plain = target(tmp_path, raw)
    neutral = {
        "output_multiplier": 1,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": 0.0,
        "attn_output_gate": False,
        "query_pre_attn_scalar": 4,
        "partial_rotary_factor": 1.0,
        "pretraining_tp": 2,
        "architectures": ["Any"],
        "sliding_window": 4096,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "_name_or_path": "a/b",
        "is_causal": True,
        "n_shared_experts": 0,
        "use_mrope": False,
        "is_llama_config": True,
        "has_no_defaults_at_init": False,
    }
    assert target(tmp_path, raw | neutral) == plain


@pytest.mark.parametrize("raw", [DENSE, MIXTURE, LLAMA, QWEN2], ids=lambda r: r["model_type"])
def test_keys_that_repeat_what_the_model_type_says(tmp_path, raw, no_warnings):
    """Qwen3-Coder's configuration has them."""
    normed, biased = raw["model_type"].startswith("qwen3"), raw is QWEN2
    own = {"use_qk_norm": normed, "qkv_bias": biased, "attention_bias": biased}
    assert target(tmp_path, raw | own) == target(tmp_path, raw)
    for key, value in own.items():
        with pytest.raises(ValueError, match=f"'{key}' is {not value}, .*expected {value}"):
            target(tmp_path, raw | {key: not value})


HUGE = 10**12


def test_counts_that_no_model_has(tmp_path):
    """Tuples of so many entries would fill the memory."""
    message = r"'num_{}' is 1000000000000, .*expected at most 10000"
    for raw in (DENSE, MIXTURE):
        with pytest.raises(ValueError, match=message.format("hidden_layers")):
            target(tmp_path, raw | {"num_hidden_layers": HUGE})
    with pytest.raises(ValueError, match=message.format("experts")):
        target(tmp_path, MIXTURE | {"num_experts": HUGE})
    with pytest.raises(ValueError, match=message.format("hidden_layers")):
        draft({"num_hidden_layers": HUGE})


def test_true_is_not_1(tmp_path):
    with pytest.raises(ValueError, match=r"'output_multiplier' is True"):
        target(tmp_path, DENSE | {"output_multiplier": True})
    with pytest.raises(ValueError, match=r"'mlp_bias' is 0"):
        target(tmp_path, DENSE | {"mlp_bias": 0})


def test_unknown_keys_are_named_in_one_warning(tmp_path):
    plain = target(tmp_path, DENSE)
    with pytest.warns(UserWarning) as caught:
        assert target(tmp_path, DENSE | {"moon_phase": 1, "tide": [2], "wind": None}) == plain
    assert [str(w.message) for w in caught] == [
        f"{tmp_path}/config.json: 'moon_phase', 'tide': unknown and ignored; if it "
        "changes what the model computes, the output is wrong"
    ]


def test_sections_are_accounted_for_with_their_name():
    raw = JsonConfig({"a": {"b": 1, "c": 2}, "d": 3}, "file", "a thing")
    raw.section("a").get("b")
    with pytest.warns(UserWarning, match=r"^file: 'd', 'c' in 'a': unknown"):
        raw.finish((), {})
    with pytest.raises(ValueError, match=r"^file, 'a': 'c' is 2.*expected 1 or 3"):
        raw.finish({"d"}, {"c": (1, 3)})


@pytest.mark.parametrize(
    "top, inside, message",
    [
        ({"quantization_config": {"quant_method": "hqq"}}, {}, "'quantization_config' .*'hqq'"),
        ({"attention_sink_bias": True}, {}, "'attention_sink_bias' is True"),
        ({}, {"attention_sink_bias": True}, "'dflash_config': 'attention_sink_bias' is True"),
        ({"use_swa": True}, {}, "'use_swa' is True"),
        ({}, {"swa_window_size": 64}, "'swa_window_size' is 64"),
        ({"layer_types": ["full_attention"]}, {}, "'layer_types' .*each of the 2 layers"),
        (
            {},
            {"causal": True, "causal_head": False},
            r"'causal_head' of draft.* is False but 'causal' of draft.* is True; these keys",
        ),
        ({"is_causal": True}, {"causal": False}, "'is_causal' of draft is True but 'causal'"),
        (
            {},
            {"sample_from_anchor": True, "query_zero_predicts_next": False},
            "'sample_from_anchor' of .* is True but 'query_zero_predicts_next' of .* is False",
        ),
    ],
)
def test_a_drafter_that_computes_otherwise_is_refused_by_its_key(top, inside, message):
    with pytest.raises(ValueError, match=message):
        draft(top, inside)


@pytest.mark.parametrize(
    "top, inside, changed",
    [
        ({"is_causal": True}, {}, {"causal": (True, True)}),
        ({}, {"is_causal": True}, {"causal": (True, True)}),
        ({"is_causal": False}, {"causal_head": False}, {"causal": (False, False)}),
        ({}, {"query_zero_predicts_next": True}, {"predict_next": True}),
        ({"sample_from_anchor": True}, {}, {"predict_next": True}),
        (  # Qwen's rule: layers from max_window_layers on
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 32},
            {},
            {"causal": (True, True), "window": (32, 32)},
        ),
        ({"use_sliding_window": True, "sliding_window": 32}, {}, {"window": (None, None)}),
        (  # a layer that slides is causal, unless a key says for all
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "use_sliding_window": True,
                "sliding_window": 9,
            },
            {},
            {"causal": (False, True), "window": (None, 9)},
        ),
        ({}, {"final_logit_softcapping": 20}, {"logit_softcap": 20.0}),
        ({"output_multiplier": 0.2}, {"output_multiplier": 0.5}, {"logit_scale": 0.5}),
        ({"input_embedding_scale": 3}, {}, {"embedding_scale": 3.0}),
        (
            {"conv_kernel_size": 2},
            {"conv_group_size": 4},
            {"conv_taps": 2, "conv_group": 4},
        ),
        (
            {"selector_rank": 8, "selector_top_k": 3},
            {},
            {"sequential": "bilinear", "rank": 8, "candidates": 3},
        ),
        ({"partial_rotary_factor": 0.25}, {}, {}),  # of the target it was copied from
        ({"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.25}}, {}, {}),
    ],
)
def test_a_drafters_switches_by_every_name(top, inside, changed, no_warnings):
    found, plain = draft(top, inside), draft()
    assert {name: getattr(found, name) for name in changed} == changed
    assert [n for n in vars(plain) if getattr(plain, n) != getattr(found, n)] == [
        name for name, value in changed.items() if getattr(plain, name) != value
    ]


def test_a_long_value_is_cut_in_a_refusal():
    with pytest.raises(ValueError, match=r"'ids' is \[0, 1, 2, .*…, which is not") as caught:
        JsonConfig({"ids": [*range(9999)]}, "file", "a target").items("ids", str)
    assert len(str(caught.value)) < 300
