"""EAGLE-3 files of every origin: read, written back bit for bit, refused by their keys."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxspec import checkpoints
from jaxspec.checkpoints.drafters import CHAIN, load_drafter, save_drafter
from jaxspec.drafters.block import BlockDrafter
from jaxspec.drafters.eagle_head import ParallelEagleConfig
from jaxspec.drafters.registry import trained
from jaxspec.drafters.weights import random_weights
from tests import tiny
from tests.checkpoints.drafter_folders import change_tensors
from tests.drafters import eagle_cases as cases

FORMATS = {
    "speculators": ["plain", "qwen", "normed", "each tap", "two layers"],
    "eagle3": ["plain", "each tap, fed back as it is", "raw logits"],
    "deepspec": ["qwen"],
}
KINDS = cases.KINDS | {
    "each tap, fed back as it is": dataclasses.replace(cases.PLAIN, tap_norm="each"),
    "two layers": dataclasses.replace(
        cases.PLAIN, taps=(0, 1), num_layers=2, window=(None, 3), qk_norm=True
    ),
}


def save(folder, kind="plain", format="speculators", reduced=False):
    config = KINDS[kind]
    kept = dict(kept=cases.KEPT) if reduced else {}
    weights = random_weights(config, jax.random.key(3))
    saved = trained(config, weights, tiny.target().params, CHAIN, **kept)
    save_drafter(folder, saved, format, verifier="../target")
    return saved


def load(folder):
    return load_drafter(folder, tiny.target())


def edit(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


def equal(before, after):
    pairs = (nnx.to_flat_state(x.params.head) for x in (before, after))
    for (path, x), (again, y) in zip(*pairs, strict=True):
        assert path == again
        np.testing.assert_array_equal(x[...], y[...])


@pytest.mark.parametrize(
    ("format", "kind"), [(format, kind) for format in FORMATS for kind in FORMATS[format]]
)
def test_export_then_import(tmp_path, format, kind):
    saved, loaded = save(tmp_path / "a", kind, format), load(tmp_path / "a")
    # The original files do not say how many tokens to draft.
    steps = KINDS[kind].steps if format != "eagle3" else 5
    assert loaded.drafter.config == dataclasses.replace(KINDS[kind], steps=steps)
    equal(saved, loaded)
    # The file's tables are the target's, which are not copied.
    assert loaded.params.vocabulary.embed is tiny.target().params.embed
    assert loaded.params.vocabulary.judge is None


@pytest.mark.parametrize("format", ["speculators", "eagle3"])
def test_a_draft_vocabulary(tmp_path, format):
    saved = save(tmp_path / "a", format=format, reduced=True)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert tensors["d2t"].tolist() == [0, 1, 1, 2, 2, 2, 4]
    assert np.flatnonzero(tensors["t2d"]).tolist() == list(cases.KEPT)
    change_tensors(
        tmp_path / "a", lambda t: t.__setitem__("lm_head.weight", 2 * t["lm_head.weight"])
    )
    loaded = load(tmp_path / "a")
    equal(saved, loaded)
    before, after = saved.params.vocabulary, loaded.params.vocabulary
    assert after.kept.tolist() == list(cases.KEPT)
    np.testing.assert_array_equal(after.unembed, 2 * before.unembed)
    np.testing.assert_array_equal(after.judge, before.unembed)


@pytest.mark.parametrize("prefix", ["draft_model.", "module.", "module.draft_model."])
def test_a_draft_vocabulary_under_a_prefix(tmp_path, prefix):
    saved = save(tmp_path / "a", format="eagle3", reduced=True)

    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    change_tensors(tmp_path / "a", rename)
    equal(saved, load(tmp_path / "a"))


@pytest.mark.parametrize("format", ["speculators", "eagle3"])
def test_an_embedding_of_its_own(tmp_path, format):
    own = np.random.default_rng(0).standard_normal((11, 32)).astype(np.float32)
    weights = random_weights(cases.PLAIN, jax.random.key(3))
    saved = trained(cases.PLAIN, weights, tiny.target().params, CHAIN, embed=own)
    save_drafter(tmp_path / "a", saved, format)
    vocabulary = load(tmp_path / "a").params.vocabulary
    np.testing.assert_array_equal(vocabulary.embed, own)
    assert vocabulary.own_embed and vocabulary.judge is None


@pytest.mark.parametrize("name", ["eagle3_a", "eagle3_speculators_a"])
def test_a_published_folder_is_written_back_as_it_was(golden, tmp_path, name):
    folder, _ = golden(name)
    loaded = load_drafter(folder / "draft", checkpoints.load(folder / "target"))
    format = "speculators" if "speculators" in name else "deepspec"
    save_drafter(tmp_path / "out", loaded, format, verifier="../target")
    theirs = load_file(folder / "draft" / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert set(ours) == set(theirs)
    for tensor, values in theirs.items():
        assert ours[tensor].dtype == values.dtype
        np.testing.assert_array_equal(ours[tensor], values)
    theirs, ours = (
        json.loads((place / "config.json").read_text())
        for place in (folder / "draft", tmp_path / "out")
    )
    for raw in (theirs, ours):  # who wrote the file, and what initialisation reads
        for section in (raw, raw.get("transformer_layer_config", {})):
            for key in ("auto_map", "transformers_version", "initializer_range"):
                section.pop(key, None)
        raw.pop("max_window_layers", None)
        raw.get("speculators_config", {}).get("verifier", {}).pop("architectures", None)
    assert ours == theirs


def test_names_of_other_programs(tmp_path):
    """NeMo's prefix; the first files of EAGLE-3.1."""
    saved = save(tmp_path / "a", "each tap, fed back as it is", "eagle3")
    old = {
        "fc_norm.0": "aux_norm_low",
        "fc_norm.1": "aux_norm_mid",
        "fc_norm.2": "aux_norm_high",
    }

    def rename(tensors):
        for name in list(tensors):
            new = re.sub(r"fc_norm\.\d", lambda match: old[match[0]], name)
            prefix = "" if name == "lm_head.weight" else "model."
            tensors[prefix + new] = tensors.pop(name)

    change_tensors(tmp_path / "a", rename)
    equal(saved, load(tmp_path / "a"))


def test_fused_tensors_are_split(tmp_path):
    saved = save(tmp_path / "a", format="eagle3")

    def fuse(tensors):
        names = [f"midlayer.self_attn.{x}_proj.weight" for x in "qkv"]
        parts = [tensors.pop(name) for name in names]
        tensors["midlayer.self_attn.qkv_proj.weight"] = np.concatenate(parts)

    change_tensors(tmp_path / "a", fuse)
    equal(saved, load(tmp_path / "a"))


@pytest.mark.parametrize(
    ("changes", "taps"),
    [
        (dict(eagle_config="absent"), (1, 2, 3)),  # outputs 1, n/2 - 1, n - 4 of 7 layers
        (dict(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 3, 4]}), (0, 3, 4)),
        (dict(eagle_config="absent", eagle_aux_hidden_state_layer_ids=[0, 4, 5]), (-1, 3, 4)),
    ],
)
def test_layers_it_reads(tmp_path, changes, taps):
    deep = dataclasses.replace(tiny.QWEN3, num_layers=7)
    save(tmp_path / "a", format="eagle3")
    edit(tmp_path / "a", **changes)
    assert load_drafter(tmp_path / "a", tiny.target(deep)).drafter.taps == taps


@pytest.mark.parametrize("window", [None, 4096])
def test_a_window_that_is_switched_off(tmp_path, window, recwarn):
    save(tmp_path / "a", format="eagle3")
    edit(tmp_path / "a", use_sliding_window=False, max_window_layers=36, sliding_window=window)
    assert load(tmp_path / "a").drafter.config.window == (None,)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_act="gelu"), "'hidden_act' is 'gelu'"),
        (dict(attention_bias=True), "'attention_bias' is True"),
        (dict(mlp_bias=True), "'mlp_bias' is True"),
        (dict(num_hidden_layers=10**12), "expected at most 10000"),
        (dict(use_qk_norm=True), "'use_qk_norm' is True"),
        (dict(use_sliding_window=True, sliding_window=9), "'sliding_window' is 9"),
        (dict(bias=True), "'bias' is True"),
        (dict(model_type="gemma"), "'model_type' is 'gemma'"),
        (dict(num_hidden_layers=2), "'num_hidden_layers' is 2.*disagree about further layers"),
        (dict(sliding_window=64), "'sliding_window' is 64"),
        (dict(fc_norm=True, norm_before_fc=True), "one of 'fc_norm' and 'norm_before_fc'"),
        (dict(eagle_config={"use_aux_hidden_state": False}), "'use_aux_hidden_state' is False"),
        (
            dict(eagle_aux_hidden_state_layer_ids=[2, 3, 3]),
            r"at the top means outputs of layers \[1, 2, 2\], in 'eagle_config' \[-1, 0, 1\]",
        ),
        (dict(parallel_drafting=True), "'parallel_drafting' is True"),
        (
            dict(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}),
            "reads the last layer, 2",
        ),
        (dict(target_hidden_size=48), "hidden size is 48, the target's is 32"),
        (dict(draft_vocab_size=9), "'draft_vocab_size' is 9, but tensor 'd2t' is missing"),
        (dict(vocab_size=40), "vocabulary is 40, the target's is 11"),
        (dict(intermediate_size=25), "'midlayer|layers.0.mlp.*has shape"),
    ],
)
def test_what_is_refused_by_its_key(tmp_path, changes, message):
    save(tmp_path / "a", format="eagle3")
    edit(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), "no tensor 'fc.weight'"),
        (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        (lambda t: t.__setitem__("fc.weight", t["fc.weight"][:, :64].copy()), "EAGLE-1"),
        (
            lambda t: t.__setitem__("midlayer.extra", t["norm.weight"]),
            "'layers.0.extra' has no",
        ),
        (lambda t: t.__setitem__("model.norm.weight", t["norm.weight"]), "are both 'norm.w"),
        (lambda t: t["t2d"].__setitem__(1, True), "'d2t' and 't2d' name 7 and 8 tokens"),
        (lambda t: t.__setitem__("t2d", t["t2d"][:0]), "'d2t' and 't2d' name 7 and 0 tokens"),
        (lambda t: t.__setitem__("d2t", t["d2t"][:0]), r"'d2t' has shape \(0,\); expected one"),
        (
            lambda t: t.__setitem__("d2t", np.array(0)),
            r"'d2t' has shape \(\); expected one off",
        ),
        (
            lambda t: t.__setitem__("d2t", np.arange(12)),
            r"'d2t' has shape \(12,\); .* 1 … 11 d",
        ),
        (lambda t: t["norm.weight"].__setitem__(0, np.nan), "'norm.weight' holds NaN"),
        (lambda t: t["lm_head.weight"].__setitem__(0, np.inf), "'lm_head.weight' holds NaN"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    save(tmp_path / "a", format="eagle3", reduced=True)
    change_tensors(tmp_path / "a", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


def test_a_vocabulary_of_zeros_is_named(tmp_path):
    """SpecForge writes it where none was counted."""
    save(tmp_path / "a", format="eagle3", reduced=True)

    def zero(tensors):
        tensors["d2t"][:] = 0
        del tensors["t2d"]

    change_tensors(tmp_path / "a", zero)
    with pytest.warns(UserWarning, match="only the first 7 tokens are drafted"):
        assert load(tmp_path / "a").params.vocabulary.kept.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("format", "kind", "what"),
    [
        ("eagle3", "normed", "a residual after the norm"),
        ("eagle3", "qwen", "norms of queries and keys"),
        ("eagle3", "two layers", "2 layers"),
        ("deepspec", "plain", "layers without norms of queries and keys"),
        ("speculators", "raw logits", "logits before the norm"),
    ],
)
def test_what_a_format_cannot_say(tmp_path, format, kind, what):
    with pytest.raises(ValueError, match=f"'{format}' has no key for {what}"):
        save(tmp_path / "a", kind, format)
    assert not (tmp_path / "a").exists()


def test_norm_output_means_two_things(tmp_path):
    """In SpecForge's files: what the head reads; in the others: what is fed back."""
    save(tmp_path / "a", "raw logits", "eagle3")
    config = load(tmp_path / "a").drafter.config
    assert (config.feedback_after_norm, config.logits_after_norm) == (False, False)
    edit(tmp_path / "a", norm_output=True, architectures=["LlamaEagle3DraftModel"])
    config = load(tmp_path / "a").drafter.config
    assert (config.feedback_after_norm, config.logits_after_norm) == (True, True)


def test_a_parallel_drafter(tmp_path):
    """P-EAGLE: EAGLE-3's keys with a mask, and the feature of the mask."""
    config = ParallelEagleConfig(**vars(cases.PLAIN) | dict(mask_token_id=9, steps=6))
    weights = random_weights(config, jax.random.key(3))
    saved = trained(config, weights, tiny.target().params, CHAIN, kept=cases.KEPT)
    save_drafter(tmp_path / "a", saved, verifier="../target")
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (raw["speculators_model_type"], raw["mask_token_id"]) == ("peagle", 9)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert tensors["mask_hidden"].shape == (1, 1, 3 * 32)
    loaded = load(tmp_path / "a")
    assert loaded.drafter == saved.drafter
    equal(saved, loaded)
    for changes, message in (
        (dict(mask_token_id="absent"), "has no 'mask_token_id'"),
        (dict(mask_token_id=11), "mask_token_id is 11; expected a row of the embedding"),
    ):
        edit(tmp_path / "a", **changes)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a")


def test_block_drafters_are_told_apart(tmp_path):
    from tests.checkpoints.drafter_folders import save as save_block

    save_block(tmp_path / "a", "dspark")
    assert isinstance(load(tmp_path / "a").drafter, BlockDrafter)
