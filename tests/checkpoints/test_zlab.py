"""z-lab's format of DFlash, DFlash2, JetSpec and DSpark."""

import jax
import numpy as np
import pytest

from jaxspec.checkpoints.drafter_config import from_json, to_json
from tests.checkpoints.drafter_folders import change_tensors, edit, load, own, save
from tests.drafters import cases


def test_a_block_of_z_labs_default(tmp_path):
    save(tmp_path / "a", "dflash")
    edit(tmp_path / "a", lambda raw: raw.pop("block_size"))
    assert load(tmp_path / "a").drafter.config.block_size == 16


def ones(*shape):
    return np.ones(shape, np.float32)


def fuse(tensors, layer="layers.1."):
    """A layer's query, key and value as one tensor, gate and up as another."""
    a, mlp = f"{layer}self_attn.", f"{layer}mlp."
    for fused, parts in (
        (f"{a}qkv_proj.weight", [f"{a}{x}_proj.weight" for x in "qkv"]),
        (f"{mlp}gate_up_proj.weight", [f"{mlp}{x}_proj.weight" for x in ("gate", "up")]),
    ):
        tensors[fused] = np.concatenate([tensors.pop(part) for part in parts])


def test_fused_tensors_are_split(tmp_path):
    params = save(tmp_path / "a", "dflash").params
    change_tensors(tmp_path / "a", fuse)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "a").params, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update(
                {"layers.1.self_attn.k_proj.weight": np.ones((16, 32), np.float32)}
            ),
            "'layers.1.self_attn.qkv_proj.weight' and 'layers.1.self_attn.k_proj.weight' hold",
        ),
        (
            lambda t: t.update(
                {"layers.1.mlp.gate_up_proj.weight": np.ones((46, 32), np.float32)}
            ),
            r"gate_up_proj.weight' has shape \(46, 32\).* asks for \(48, 32\)",
        ),
        (
            lambda t: t.update({"layers.1.self_attn.qkv_proj.bias": ones(64)}),
            "'layers.1.self_attn.qkv_proj.bias' has no place",
        ),
    ],
)
def test_fused_tensors_that_do_not_fit(tmp_path, change, message):
    save(tmp_path / "a", "dflash")
    change_tensors(tmp_path / "a", lambda tensors: [fuse(tensors), change(tensors)])
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


def test_tensors_without_effect_are_left_out(tmp_path):
    params = save(tmp_path / "a", "dflash").params
    unused = {
        "layers.0.self_attn.rotary_emb.inv_freq": ones(4),
        "layers.1.mlp.up_proj.bias": 0 * ones(24),
    }
    change_tensors(tmp_path / "a", lambda tensors: tensors.update(unused))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "a").params, params)
    change_tensors(tmp_path / "a", lambda t: t["layers.1.mlp.up_proj.bias"].__setitem__(3, 1))
    with pytest.raises(ValueError, match="'layers.1.mlp.up_proj.bias' has no place"):
        load(tmp_path / "a")


@pytest.mark.parametrize("prefix", ["model.", "draft_model."])
def test_prefixes_of_other_programs(tmp_path, prefix):
    params = save(tmp_path / "a", "dflash2").params

    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    change_tensors(tmp_path / "a", rename)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "a").params, params)


def test_keys_of_the_section_may_stand_at_the_top(tmp_path):
    drafter = save(tmp_path / "a", "dflash2").drafter
    edit(tmp_path / "a", lambda raw: raw.update(raw["dflash_config"], dflash_config={}))
    assert load(tmp_path / "a").drafter == drafter


def test_a_mask_outside_of_the_vocabulary(tmp_path):
    save(tmp_path / "a", "dflash")
    (tmp_path / "a" / "mask_embedding.pt").touch()
    with pytest.raises(ValueError, match="holds 'mask_embedding.pt'"):
        load(tmp_path / "a")


def test_the_depth_of_the_target_need_not_be_named(tmp_path):
    drafter = save(tmp_path / "a", "dflash").drafter
    edit(tmp_path / "a", lambda raw: raw.pop("num_target_layers"))
    assert load(tmp_path / "a").drafter == drafter


def test_older_and_newer_keys_are_the_same_drafter():
    raw = to_json(cases.KINDS["jetspec"], "dflash", "float32")
    expected = from_json(raw, "")
    newer = raw | {"rope_parameters": {"rope_theta": raw["rope_theta"], "rope_type": "default"}}
    del newer["rope_theta"]
    assert from_json(newer, "") == expected
    inside = {k: v for k, v in raw.items() if k != "block_size"}
    inside["dflash_config"] = raw["dflash_config"] | {"block_size": raw["block_size"]}
    assert from_json(inside, "") == expected
    raw.pop("is_causal")
    for key in ("causal", "causal_head"):
        own = {k: v for k, v in raw["dflash_config"].items() if not k.startswith("causal")}
        assert from_json(raw | {"dflash_config": own | {key: True}}, "") == expected
        assert not any(from_json(raw | {"dflash_config": own}, "").causal)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dflash", lambda c: c.update(hidden_size=64), "hidden size is 64, the target's is 32"),
        ("dflash", lambda c: c.update(vocab_size=12), "vocabulary is 12, the target's is 11"),
        ("dflash", lambda c: c.update(num_target_layers=9), "target layers is 9, the target's"),
        (
            "dflash",
            lambda c: own(c).update(target_layer_ids=[0, 3]),
            "layers of the target, -1",
        ),
        ("dflash", lambda c: own(c).update(mask_token_id=11), "a row of the embedding, 0 … 10"),
        ("dflash", lambda c: own(c).pop("mask_token_id"), "has no 'mask_token_id'"),
        (
            "dflash",
            lambda c: own(c).update(block_size=7),
            r"expected one 'block_size' .* found \[5, 7\]",
        ),
        ("dflash", lambda c: c.pop("dflash_config"), "is not a drafter's"),
        ("dflash", lambda c: c.update(attention_bias=True), "'attention_bias' is True"),
        (
            "dflash",
            lambda c: c.update(model_type="gemma4_text"),
            "'model_type' is 'gemma4_text'",
        ),
        ("dflash", lambda c: own(c).update(projector_type="domino"), "expected 'dspark'"),
        ("dflash", lambda c: own(c).update(attention_value_scale=0.7), "value_scale' is 0.7"),
        ("dflash", lambda c: c.update(use_gemma_norm=True), "'use_gemma_norm' is True"),
        ("dflash", lambda c: c.update(hidden_act="gelu"), "'hidden_act' is 'gelu'"),
        (
            "dflash",
            lambda c: (c.pop("rope_theta"), c.update(rope_scaling={"type": "linear"})),
            "'rope_scaling' is .*'rope_theta' in it, or beside it",
        ),
        ("dflash", lambda c: own(c).update(draft_shift=True), "'draft_shift' is True"),
        (
            "dflash",
            lambda c: own(c).update(target_hidden_size=48),
            "'target_hidden_size' is 48",
        ),
        (
            "dflash",
            lambda c: c.update(layer_types=["full_attention", "sliding_attention"]),
            "no 'sliding_window'",
        ),
        (
            "dflash",
            lambda c: c.update(layer_types=["full_attention", "linear_attention"]),
            "'layer_types' is .*linear_attention",
        ),
        (
            "dflash",
            lambda c: c.update(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            "'rope_scaling' is .*dynamic.*expected 'rope_type': 'default'",
        ),
        (
            "dflash",
            lambda c: c.update(hidden_size="32"),
            "'hidden_size' is '32'.*a positive integer",
        ),
        ("dflash", lambda c: own(c).update(target_layer_ids=3), "is 3.* a list of integers"),
        ("dflash", lambda c: c.update(num_key_value_heads=0), "'num_key_value_heads' is 0"),
        ("dflash", lambda c: own(c).update(causal_head="no"), "'causal_head' is 'no'"),
        (
            "window",
            lambda c: c.update(use_sliding_window=False),
            "'use_sliding_window' is False.*true with sliding layers",
        ),
        ("dflash2", lambda c: own(c).pop("selector_rank"), "no 'selector_rank'"),
        ("dflash2", lambda c: own(c).pop("conv_group_size"), "no 'conv_group_size'"),
        (
            "dflash2",
            lambda c: own(c).update(conv_group_size=5),
            "conv_group is 5; expected a divisor of hidden_size = 32",
        ),
        (
            "dflash2",
            lambda c: own(c).update(output_multiplier=0),
            "'output_multiplier' is 0.*a positive number",
        ),
        (
            "dflash2",
            lambda c: own(c).update(markov_rank=4),
            "'selector_rank' asks for DFlash2's selector and 'markov_rank'",
        ),
        (
            "dflash2",
            lambda c: [own(c).pop(k) for k in ("selector_rank", "selector_top_k")],
            r"'candidate_selector.\w+.weight' .and 2 more. has no place",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, kind, change, message):
    save(tmp_path / "a", kind)
    edit(tmp_path / "a", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")
