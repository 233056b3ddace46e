"""The format of vLLM's `speculators`, both ways."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspec import checkpoints
from jaxspec.checkpoints.drafter_config import from_json, recognise
from jaxspec.checkpoints.drafters import CHAIN, load_drafter, save_drafter
from jaxspec.checkpoints.speculators import verifier, verifier_name
from jaxspec.drafters.registry import trained
from jaxspec.drafters.weights import random_weights
from tests import tiny
from tests.drafters import cases

DFLASH2 = dataclasses.replace(
    cases.KINDS["dflash2"],
    causal=False,
    logit_scale=1.0,
    logit_softcap=None,
    embedding_scale=1.0,
    window=(9, None),
)
KINDS = {
    "dflash": cases.KINDS["dflash"],
    "dflash2": DFLASH2,
    "causal where it slides": dataclasses.replace(
        cases.KINDS["dflash"], window=(9, None), causal=(True, False)
    ),
    "dspark": cases.KINDS["dspark"],
    "gated": dataclasses.replace(cases.KINDS["gated"], confidence="hidden"),
}


def save(folder, config, kept=None):
    own = {}
    if kept is not None:
        own = dict(kept=kept, unembed=np.ones((len(kept), config.hidden_size), np.float32))
    weights = random_weights(config, jax.random.key(3))
    saved = trained(config, weights, tiny.target().params, CHAIN, **own)
    save_drafter(folder, saved, "speculators", verifier="../target")
    return saved.params


def load(folder):
    return load_drafter(folder, tiny.target())


def edit(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_export_then_import(tmp_path, kind):
    params = save(tmp_path / "a", KINDS[kind])
    loaded = load(tmp_path / "a")
    assert loaded.drafter.config == KINDS[kind]
    before, after = map(nnx.to_flat_state, (params.head, loaded.params.head))
    for (path, x), (again, y) in zip(before, after, strict=True):
        assert path == again
        np.testing.assert_array_equal(x[...], y[...])
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert recognise(raw, "").name == "speculators"
    assert raw["aux_hidden_state_layer_ids"] == [tap + 1 for tap in KINDS[kind].taps]
    assert "num_target_layers" not in json.dumps(raw)


def test_a_reduced_vocabulary_has_its_own_head(tmp_path):
    kept = np.array([1, 2, 4, 5, 8, 9], np.int32)
    save(tmp_path / "a", KINDS["dflash"], kept)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert tensors["d2t"].tolist() == [1, 1, 2, 2, 4, 4]
    assert np.flatnonzero(tensors["t2d"]).tolist() == kept.tolist()
    loaded = load(tmp_path / "a")
    assert loaded.params.vocabulary.kept.tolist() == kept.tolist()
    np.testing.assert_array_equal(loaded.params.vocabulary.unembed, np.ones((6, 32)))
    with pytest.raises(ValueError, match="its own LM head, for which format 'dflash'"):
        save_drafter(tmp_path / "b", loaded, "dflash")


@pytest.mark.parametrize("kind", ["dspark", "gated"])
def test_a_markov_head_has_rows_of_the_draft_vocabulary_alone(tmp_path, kind):
    kept = np.array([1, 2, 4, 5, 8, 9], np.int32)
    params = save(tmp_path / "a", KINDS[kind], kept)
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    assert tensors["markov_head.markov_w2.weight"].shape == (6, 6)
    assert tensors["markov_head.markov_w1.weight"].shape == (11, 6)
    loaded = load(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, loaded.params.head, params.head)
    save_drafter(tmp_path / "b", loaded, "speculators")
    again = load_file(tmp_path / "b" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, tensors)
    save_file(tensors | {"markov_head.markov_w2.weight": np.zeros((11, 6), np.float32)}, path)
    with pytest.raises(
        ValueError, match=r"'markov_head.markov_w2.weight' has shape \(11, \d+\); expected 6 ro"
    ):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["t2d"].__setitem__(0, True), "'d2t' and 't2d' name 6 and 7 tokens"),
        (lambda t: t["d2t"].__setitem__(5, 9), "'d2t' does not give distinct token ids"),
        (lambda t: t["d2t"].__setitem__(1, 0), "'d2t' does not give distinct token ids"),
        (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
    ],
)
def test_vocabularies_that_contradict_themselves(tmp_path, change, message):
    save(tmp_path / "a", KINDS["dflash"], np.array([1, 2, 4, 5, 8, 9], np.int32))
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aux_hidden_state_layer_ids": [1, 3]}, "reads the last layer, 2"),
        ({"aux_hidden_state_layer_ids": [1, 9]}, "expected different layers of the target"),
        ({"draft_vocab_size": 6}, "'draft_vocab_size' is 6.*selectors have no other"),
        ({"target_hidden_size": 48}, "'target_hidden_size' is 48"),
        ({"transformer_layer_config": {"model_type": "llama"}}, "layer_config"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    save(tmp_path / "a", KINDS["dflash2"])
    edit(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("xpress", "another kind: XPress refines what it drafts by a network"),
        ("mtp", "another kind: layers of the target's own checkpoint are drafter 'mtp'"),
        ("medusa", "'dflash' or 'dflash2' or 'dspark' or 'eagle3'"),
        (["dflash"], "'dflash' or 'dflash2'"),
    ],
)
def test_kinds_that_are_not_supported(tmp_path, kind, expected):
    save(tmp_path / "a", KINDS["dflash"])
    edit(tmp_path / "a", speculators_model_type=kind)
    with pytest.raises(ValueError, match=rf"'speculators_model_type' is .*expected {expected}"):
        load(tmp_path / "a")


def test_a_recurrence_that_begins_before_the_first_prediction(tmp_path):
    rnn = dataclasses.replace(cases.KINDS["rnn"], causal=False)
    save(tmp_path / "a", rnn)
    edit(tmp_path / "a", sample_from_anchor=False)
    with pytest.raises(ValueError, match="'sample_from_anchor' is False.*'rnn'"):
        load(tmp_path / "a")
    with pytest.raises(ValueError, match="has no key for slots that predict their own"):
        save(tmp_path / "b", dataclasses.replace(rnn, predict_next=False))


def test_a_vocabulary_is_as_large_as_the_configuration_says(tmp_path):
    save(tmp_path / "a", KINDS["dflash"])
    edit(tmp_path / "a", draft_vocab_size=6)
    with pytest.raises(
        ValueError, match="'draft_vocab_size' is 6, but tensor 'd2t' is missing"
    ):
        load(tmp_path / "a")


def test_defaults_of_absent_keys(tmp_path):
    save(tmp_path / "a", KINDS["dflash2"])
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    for key in ("block_size", "sliding_window_non_causal", "conv_kernel_size", "selector_rank"):
        raw.pop(key)
    raw["transformer_layer_config"].update(hidden_size=64, vocab_size=40)
    raw.update(draft_vocab_size=40, conv_group_size=16, selector_top_k=16)
    found = from_json(raw, "")
    assert (found.block_size, found.conv_taps, found.rank) == (8, 2, 256)
    assert not any(found.causal)
    raw.pop("aux_hidden_state_layer_ids")
    deep = dataclasses.replace(tiny.QWEN3, num_layers=9, hidden_size=64, vocab_size=40)
    assert from_json(raw, "", deep).taps == (1, 3, 5)  # streams that enter 2, n / 2 and n - 3
    with pytest.raises(ValueError, match="has no 'aux_hidden_state_layer_ids', so"):
        from_json(raw, "")
    raw["aux_hidden_state_layer_ids"] = [1, 2]
    raw |= {"speculators_model_type": "dflash", "sample_from_anchor": True}
    with pytest.warns(UserWarning, match="'conv_group_size', 'selector_top_k'"):
        found = from_json(raw, "")
    assert found.causal == (True, False) and found.predict_next


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (dict(logit_scale=0.5), "scaled logits"),
        (dict(causal=True, window=(9, None)), "causal layers without a window"),
        (dict(taps=(0, 2)), "a tap of the last layer"),
        (dict(conv_taps=0, conv_group=0), "a selector without convolutions"),
    ],
)
def test_what_the_format_cannot_say(tmp_path, changes, what):
    with pytest.raises(ValueError, match=f"'speculators' has no key for {what}"):
        save(tmp_path / "a", dataclasses.replace(DFLASH2, **changes))


def test_the_target_by_name(tmp_path):
    raw = {"speculators_config": {"verifier": {"name_or_path": "Qwen/Qwen3-8B"}}}
    assert verifier(raw, tmp_path) == "Qwen/Qwen3-8B"
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
    raw["speculators_config"]["verifier"]["name_or_path"] = "../target"
    assert verifier(raw, tmp_path / "draft") == str(tmp_path / "target")
    assert verifier_name(str(tmp_path / "target"), tmp_path / "draft") == "../target"
    assert verifier_name("Qwen/Qwen3-8B", tmp_path / "draft") == "Qwen/Qwen3-8B"
    raw["speculators_config"]["verifier"]["name_or_path"] = ""
    assert verifier(raw, tmp_path / "draft") is None
    assert verifier({}, tmp_path) is None


def test_a_published_folder(golden, tmp_path):
    """Every tensor and key comes back as it was."""
    folder, _ = golden("dflash_speculators_a")
    loaded = load_drafter(folder / "draft", checkpoints.load(folder / "target"))
    save_drafter(tmp_path / "out", loaded, "speculators", verifier="../target")
    theirs = load_file(folder / "draft" / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        np.testing.assert_array_equal(ours[name], values)
    theirs = json.loads((folder / "draft" / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(theirs) - set(ours) == {"auto_map", "transformers_version"}
    free = {
        "auto_map",
        "transformers_version",
        "transformer_layer_config",
        "speculators_config",
    }
    assert {k: ours[k] for k in set(theirs) - free} == {
        k: theirs[k] for k in set(theirs) - free
    }
    layer, own = theirs["transformer_layer_config"], ours["transformer_layer_config"]
    free = {"initializer_range", "max_window_layers"}
    assert {k: own[k] for k in set(layer) - free} == {k: layer[k] for k in set(layer) - free}
