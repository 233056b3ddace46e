"""Drafters from format to format, and drafters that name their target."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxspec.checkpoints.convert_drafter import convert_drafter
from jaxspec.checkpoints.drafters import CHAIN, save_drafter
from jaxspec.cli import main
from jaxspec.cli.options import target_name
from jaxspec.drafters.registry import trained
from jaxspec.drafters.weights import random_weights
from jaxspec.loading import load_target, named_target
from tests.checkpoints.writing import DENSE, random_tensors, write_folder
from tests.drafters import cases, eagle_cases


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A folder with a target, and the target."""
    folder = write_folder(tmp_path_factory.mktemp("target"), DENSE, random_tensors(DENSE))
    return folder, load_target(str(folder))


def fitted(config, target):
    """A configuration of the tiny target, of this one's sizes."""
    c = target.config
    changes = dict(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, target_layers=c.num_layers
    )
    if hasattr(config, "target_hidden_size"):
        changes["target_hidden_size"] = c.hidden_size
    return dataclasses.replace(config, taps=(0,), **changes)


def save(folder, config, target, format, verifier=None, **own):
    config = fitted(config, target)
    weights = random_weights(config, jax.random.key(0))
    loaded = trained(config, weights, target.params, CHAIN, **own)
    save_drafter(folder, loaded, format, verifier)


NAME, LAYERS = "the target's name", "the number of the target's layers"
STEPS = "how many tokens to draft"
CASES = {
    "z-lab to speculators": (cases.KINDS["dflash"], "dflash", "speculators", [LAYERS]),
    "speculators to z-lab": (cases.KINDS["dflash"], "speculators", "dflash", [NAME]),
    "DeepSpec to speculators": (cases.KINDS["gated"], "deepspec", "speculators", [LAYERS]),
    "DeepSpec to z-lab": (cases.KINDS["dspark"], "deepspec", "dflash", []),
    "TreeFlash to itself": (
        dataclasses.replace(cases.KINDS["treeflash"], confidence=None),
        *("treeflash", "treeflash", []),
    ),
    "EAGLE-3, DeepSpec to speculators": (
        *(eagle_cases.KINDS["qwen"], "deepspec", "speculators", [LAYERS]),
    ),
    "EAGLE-3, speculators to DeepSpec": (
        *(eagle_cases.KINDS["qwen"], "speculators", "deepspec", [NAME]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tmp_path, target, case):
    folder, loaded = target
    config, source, format, lost = CASES[case]
    save(tmp_path / "a", config, loaded, source, verifier=str(folder))
    done = convert_drafter(tmp_path / "a", tmp_path / "b", format=format, target=str(folder))
    assert (done.source, done.format) == (source, format)
    assert [what.split(",")[0].split(":")[0] for what in done.lost] == lost
    convert_drafter(tmp_path / "b", tmp_path / "c", format=source, target=str(folder))
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in "ac")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_a_draft_vocabulary_is_spelt_otherwise(tmp_path, target):
    folder, loaded = target
    kept = dict(kept=np.array([1, 2, 4, 5, 8, 9], np.int32))
    save(tmp_path / "a", cases.KINDS["dflash"], loaded, "dflash", **kept)
    convert_drafter(tmp_path / "a", tmp_path / "b", format="speculators", target=str(folder))
    assert load_file(tmp_path / "b" / "model.safetensors")["d2t"].tolist() == [1, 1, 2, 2, 4, 4]
    # From there the target's name is known.
    done = convert_drafter(tmp_path / "b", tmp_path / "c", format="dflash")
    assert "the draft vocabulary: other programs do not read 'draft_token_ids'" in done.lost[0]
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    assert tensors["draft_token_ids"].tolist() == kept["kept"].tolist()


def test_a_markov_head_keeps_the_rows_of_drafted_tokens(tmp_path, target):
    folder, loaded = target
    kept = dict(kept=np.array([1, 2, 4, 5, 8, 9], np.int32))
    save(tmp_path / "a", cases.KINDS["dspark"], loaded, "dflash", **kept)
    done = convert_drafter(
        tmp_path / "a", tmp_path / "b", format="speculators", target=str(folder)
    )
    rows = "rows of the Markov head for tokens outside of the draft vocabulary"
    assert done.lost == (rows, LAYERS)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    name = "markov_head.markov_w2.weight"
    np.testing.assert_array_equal(before[name][kept["kept"]], after[name])


@pytest.mark.parametrize(
    ("kind", "format", "message"),
    [
        ("dspark", "treeflash", "'treeflash' has no key for predict_next"),
        ("dflash", "eagle3", "format is 'eagle3'; expected one of"),
        ("dflash", "onnx", "format is 'onnx'"),
    ],
)
def test_what_cannot_be_said_is_refused_and_nothing_written(
    tmp_path, target, kind, format, message
):
    folder, loaded = target
    save(tmp_path / "a", cases.KINDS[kind], loaded, "dflash")
    with pytest.raises(ValueError, match=message):
        convert_drafter(tmp_path / "a", tmp_path / "b", format=format, target=str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_there_stays(tmp_path, target):
    save(tmp_path / "a", cases.KINDS["dflash"], target[1], "dflash")
    with pytest.raises(ValueError, match="does not name its target; give --target"):
        convert_drafter(tmp_path / "a", tmp_path / "b", format="dflash")
    with pytest.raises(ValueError, match="a exists; give --output a new folder"):
        convert_drafter(tmp_path / "a", tmp_path / "a", format="dflash")


def test_the_command(tmp_path, target, capsys):
    folder, loaded = target
    save(tmp_path / "a", eagle_cases.PLAIN, loaded, "speculators", verifier=str(folder))
    options = ["--drafter", str(tmp_path / "a"), "--output", str(tmp_path / "b")]
    assert main(["convert-drafter", *options, "--to", "speculators", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lost"] == [LAYERS]


def test_a_drafter_alone_knows_its_target(tmp_path, target):
    """`generate --drafter X` without --target."""
    folder, loaded = target
    save(tmp_path / "a", eagle_cases.PLAIN, loaded, "speculators", verifier=str(folder))
    assert named_target(f"{tmp_path / 'a'}+ngram") == str(folder)
    for spec in ("ngram", "shipped", f"small:{folder}"):
        assert named_target(spec) is None


@pytest.mark.slow
def test_its_target_need_not_be_given(tmp_path, target, capsys):
    folder, loaded = target
    save(tmp_path / "a", eagle_cases.PLAIN, loaded, "speculators", verifier=str(folder))
    ids = tmp_path / "ids.json"
    ids.write_text("[[1, 2, 3]]")
    options = ["--drafter", str(tmp_path / "a"), "--prompt-ids", str(ids)]
    assert main(["generate", *options, "--max-new-tokens", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 4


def test_targets_that_are_not_there_or_not_one(tmp_path, target):
    folder, loaded = target
    for name, verifier in (("a", "../gone"), ("b", str(folder)), ("c", str(tmp_path / "c"))):
        save(tmp_path / name, eagle_cases.PLAIN, loaded, "speculators", verifier=verifier)
    a, b, c = (str(tmp_path / name) for name in "abc")
    with pytest.raises(ValueError, match="names its target, '../gone', which cannot be found"):
        target_name(None, a)
    assert target_name("mine", a) == "mine"
    assert target_name(None, "ngram", None) == "smollm2-135m"
    assert target_name(None, "ngram", b) == str(folder)
    with pytest.raises(ValueError, match="the drafters name different targets"):
        target_name(None, b, c)
