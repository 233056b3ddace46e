"""Published drafter formats: read, written back bit for bit, refused where they do not fit."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspec import checkpoints
from jaxspec.checkpoints.drafter_config import from_json, recognise, to_json
from jaxspec.checkpoints.drafters import drafter_folder, load_drafter, save_drafter
from jaxspec.config import DrafterConfig, RopeScaling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import block_params
from tests import tiny
from tests.checkpoints.drafter_folders import FORMATS, load, save
from tests.drafters import cases

GOLDEN = {
    "jetspec_a": "dflash",
    "dflash_a": "dflash",
    "dflash2_a": "dflash",
    "dflash2_window_a": "dflash",
    "treeflash_a": "treeflash",
    "dspark_vanilla": "deepspec",
    "dspark_rnn": "deepspec",
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_export_then_import_is_bit_exact(tmp_path, kind, dtype):
    saved = save(tmp_path / "a", kind, dtype)
    loaded = load(tmp_path / "a", dtype)
    assert loaded.drafter == saved.drafter
    before, after = (nnx.to_flat_state(x.params.head) for x in (saved, loaded))
    assert [path for path, _ in after] == [path for path, _ in before]
    for (_, x), (_, y) in zip(before, after, strict=True):
        assert y[...].dtype == dtype
        np.testing.assert_array_equal(x[...], y[...])
    # The vocabulary is the target's own, whatever the file held.
    assert loaded.params.vocabulary.embed is tiny.target().params.embed


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_folder_is_written_back_as_it_was(golden, tmp_path, name):
    folder, _ = golden(name)
    loaded = load_drafter(folder / "draft", checkpoints.load(folder / "target"))
    save_drafter(tmp_path / "out", loaded, GOLDEN[name])

    theirs = load_file(folder / "draft" / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert set(ours) == set(theirs)
    for tensor, values in theirs.items():
        assert ours[tensor].dtype == values.dtype
        np.testing.assert_array_equal(ours[tensor], values)

    theirs = json.loads((folder / "draft" / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    # Who wrote the file, and what only initialisation and training read.
    free = {"transformers_version", "initializer_range", "max_window_layers", "num_anchors"}
    assert set(theirs) - set(ours) <= {"transformers_version"}
    for key in set(theirs) - free - {"dflash_config"}:
        assert ours[key] == theirs[key], key
    own = theirs.get("dflash_config", {})
    assert own.items() <= (own | ours.get("dflash_config", {})).items()
    assert recognise(ours, "") is recognise(theirs, "")
    assert recognise(ours, "").name == GOLDEN[name]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_transformers_reads_the_configuration(tmp_path, kind):
    from transformers import AutoConfig

    config = save(tmp_path / "a", kind).drafter.config
    found = AutoConfig.from_pretrained(tmp_path / "a")
    assert found.hidden_size == config.hidden_size
    assert found.rope_parameters["rope_theta"] == config.rope_theta


@pytest.mark.parametrize("format", ["dflash", "deepspec"])
@pytest.mark.parametrize("sequential", [None, "markov", "gated", "rnn"])
@pytest.mark.parametrize("confidence", [None, "hidden", "hidden_and_previous"])
def test_a_configuration_round_trips(format, sequential, confidence):
    if confidence == "hidden_and_previous" and sequential is None:
        pytest.skip("there is no embedding of the previous token")
    config = dataclasses.replace(
        cases.KINDS["dspark"],
        sequential=sequential,
        rank=6 if sequential else 0,
        confidence=confidence,
        rope_theta=5000.0,
        rope_scaling=RopeScaling("yarn", 4.0, 16, mscale=1.5, mscale_all_dim=0.5),
        rms_norm_eps=1e-5,
        max_positions=77,
    )
    raw = json.loads(json.dumps(to_json(config, format, "float32")))
    assert from_json(raw, "") == config


def test_a_subfolder_of_a_repository(tmp_path):
    saved = save(tmp_path / "repo" / "sweep" / "one", "jetspec")
    assert load(f"{tmp_path / 'repo'}::sweep/one").drafter == saved.drafter
    for inner in ("../repo", "/etc", "", "sweep/../../.."):
        with pytest.raises(ValueError, match="expected one inside"):
            drafter_folder(f"{tmp_path / 'repo'}::{inner}")
    with pytest.raises(ValueError, match="there is no folder .*missing"):
        drafter_folder(f"{tmp_path / 'repo'}::missing")


KEPT = [0, 2, 3, 7, 10]


def save_reduced(folder, kind):
    """A drafter that drafts the tokens of `KEPT`; its params."""
    whole = save(folder / "whole", kind)
    params = block_params(whole.params.head, tiny.target().params, kept=KEPT)
    save_drafter(folder / "reduced", LoadedDrafter(whole.drafter, params))
    return params


@pytest.mark.parametrize("kind", ["dflash", "treeflash", "rnn"])
def test_a_draft_vocabulary_is_one_more_tensor(tmp_path, kind):
    params = save_reduced(tmp_path, kind)
    whole, reduced = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "reduced")
    )
    ids = reduced.pop("draft_token_ids")
    assert ids.dtype == np.int32 and ids.tolist() == KEPT
    assert set(reduced) == set(whole)
    for name, values in whole.items():  # W2 too has a row for every token
        np.testing.assert_array_equal(reduced[name], values)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("whole", "reduced")]
    assert configs[0] == configs[1]

    loaded = load(tmp_path / "reduced")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.params.vocabulary.unembed.shape[0] == len(KEPT)
    save_drafter(tmp_path / "again", loaded)
    for name in ("config.json", "model.safetensors"):
        first, second = ((tmp_path / x / name).read_bytes() for x in ("reduced", "again"))
        assert first == second


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3], r"has shape \(1,\); expected 2 … 11 token ids"),
        (list(range(12)), r"has shape \(12,\)"),
        ([[1, 2], [3, 4]], r"has shape \(2, 2\)"),
        ([1, 11], "names token 11; expected .* 0 … 10"),
        ([-1, 4], "names token -1"),
        ([1, 4, 4, 5], "names token 4 twice"),
        ([1, 6, 4], "has 6 before 4; expected .* in ascending order"),
    ],
)
def test_a_draft_vocabulary_that_is_none(tmp_path, ids, message):
    save_reduced(tmp_path, "jetspec")
    path = tmp_path / "reduced" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"draft_token_ids": np.array(ids, np.int32)}, path)
    with pytest.raises(ValueError, match=f"reduced: tensor 'draft_token_ids' {message}"):
        load(tmp_path / "reduced")
    save_file(tensors | {"draft_token_ids": np.array([1.0, 2.0], np.float32)}, path)
    with pytest.raises(ValueError, match="'draft_token_ids' is stored as F32; expected I32"):
        load(tmp_path / "reduced")


def test_an_export_never_overwrites(tmp_path):
    save(tmp_path / "a", "dflash")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        save(tmp_path / "a", "jetspec")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "format", "message"),
    [
        ("jetspec", "deepspec", "'deepspec' has no key for causal blocks"),
        ("dflash", "deepspec", "no key for predict_own"),
        ("dspark", "treeflash", "no key for predict_next"),
        ("treeflash", "dflash", "no key for sequential 'mlp'"),
        ("dflash", "gguf", "format is 'gguf'; expected one of"),
    ],
)
def test_a_format_that_cannot_say_it_is_refused(tmp_path, kind, format, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "a", kind, format=format)
    assert not (tmp_path / "a").exists()


ANYTHING = ("x", None, -1, 0, 1.5, True, [], {}, [1], {"a": 1}, 1000, float("nan"))


@pytest.mark.filterwarnings("ignore:.*unknown and ignored")
@pytest.mark.parametrize("kind", ["dflash", "gated", "treeflash"])
def test_any_value_of_any_key_is_a_drafter_or_one_clear_refusal(kind):
    config = dataclasses.replace(cases.KINDS[kind], confidence=None)
    whole = to_json(config, FORMATS[kind], "float32")
    sections = ("dflash_config", "treeflash_config", "rope_parameters")
    changed = [whole | {key: value} for key in whole for value in ANYTHING]
    changed += [
        whole | {section: whole[section] | {key: value}}
        for section in sections
        for key in whole.get(section, ())
        for value in ANYTHING
    ]
    refused = 0
    for raw in changed:
        try:
            assert isinstance(from_json(raw, "drafts/a"), DrafterConfig)
        except ValueError as error:
            assert str(error).startswith("drafts/a"), raw
            refused += 1
    assert refused > len(changed) // 3


@pytest.mark.parametrize(
    ("value", "found"),
    [(np.nan, "NaN or inf"), (np.inf, "NaN or inf"), (-3.6e35, "3.6e.35; no weight is beyond")],
)
def test_a_value_that_no_weight_can_be(tmp_path, value, found):
    save(tmp_path / "a", "dspark")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.1.self_attn.v_proj.weight"][2, 3] = value
    save_file(tensors, path)
    message = f"'layers.1.self_attn.v_proj.weight' holds {found}"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


@pytest.mark.parametrize("value", [np.nan, 3.6e35])
def test_a_value_that_no_weight_can_be_is_not_saved(tmp_path, value):
    saved = save(tmp_path / "b", "dspark")
    head = jax.tree.map(lambda x: x, saved.params.head)
    head.fc = head.fc.replace(head.fc[...].at[1, 2].set(value))
    params = block_params(head, tiny.target().params)
    with pytest.raises(ValueError, match="a is not written: tensor 'fc.weight' holds"):
        save_drafter(tmp_path / "a", LoadedDrafter(saved.drafter, params))
    assert not (tmp_path / "a").exists()


def test_a_dtype_that_weights_cannot_have(tmp_path):
    save(tmp_path / "a", "dflash")
    for dtype in ("int8", "half-precision", "float64", "float8_e4m3fn", None):
        with pytest.raises(ValueError, match=f"dtype is {dtype}; weights need one of float32"):
            load(tmp_path / "a", dtype)


def test_pickled_weights_are_not_read(tmp_path):
    save(tmp_path / "a", "dflash")
    shutil.move(tmp_path / "a" / "model.safetensors", tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights only"):
        load(tmp_path / "a")


def test_fields_are_checked():
    assert DrafterConfig(**dataclasses.asdict(cases.KINDS["rnn"])) == cases.KINDS["rnn"]
    for change, message in (
        (dict(rank=0), "rank is 0; expected at least 1 with sequential = 'markov'"),
        (dict(sequential=None, confidence=None), "rank is 6; expected 0"),
        (dict(sequential="lstm"), "sequential is 'lstm'"),
        (dict(confidence="yes"), "confidence is 'yes'"),
        (dict(block_size=0), "depth is 0; expected a block with at least one"),
        (dict(taps=(1, 1)), r"taps is \(1, 1\); expected different layers"),
        (dict(window=0), r"window is \(0, 0\)"),
        (dict(causal=(True,)), r"causal is \(True,\); expected one value per layer"),
        (dict(candidates=4), "candidates is 4; expected 0 with sequential = 'markov'"),
        (dict(conv_taps=2), "conv_group is 0; expected a divisor"),
        (dict(conv_taps=5, conv_group=1), "conv_taps is 5; expected 0, or up to block_size"),
        (dict(logit_softcap=0.0), "logit_softcap is 0.0"),
        (dict(num_heads=3), "num_heads is 3; expected a multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cases.KINDS["dspark"], **change)
