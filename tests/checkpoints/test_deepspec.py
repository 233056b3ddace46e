"""DeepSpec's format of DSpark."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxspec.checkpoints.drafters import save_drafter
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import block_params
from tests import tiny
from tests.checkpoints.drafter_folders import edit, load, own, save


def test_legacy_tensor_names(tmp_path):
    save(tmp_path / "a", "dspark")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    heads = ("markov_head", "confidence_head")
    renamed = {f"logit_head.{k}" if k.startswith(heads) else k: v for k, v in tensors.items()}
    assert set(renamed) != set(tensors)
    save_file(renamed, path)
    np.testing.assert_array_equal(
        load(tmp_path / "a").params.head.sequential.output[...],
        tensors["markov_head.markov_w2.weight"],
    )


def test_a_format_that_repeats_the_lm_head_has_no_draft_vocabulary(tmp_path):
    whole = save(tmp_path / "whole", "dspark")
    params = block_params(whole.params.head, tiny.target().params, kept=[0, 2, 3])
    with pytest.raises(ValueError, match="'deepspec' repeats the target's whole LM head"):
        save_drafter(tmp_path / "reduced", LoadedDrafter(whole.drafter, params), "deepspec")
    assert not (tmp_path / "reduced").exists()


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_a_drafter_of_other_weights_is_refused(tmp_path, name):
    save(tmp_path / "a", "dspark")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][3, 5] += 1e-3
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"'{name}' differs from the target's"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dspark", lambda c: own(c).update(target_layer_ids=[0, 2]), "reads the last layer, 2"),
        ("dspark", lambda c: c.pop("block_size"), "expected one 'block_size' .* found \\[\\]"),
        ("dspark", lambda c: c.update(markov_head_type="lstm"), "'markov_head_type' is 'lstm'"),
        (
            "dspark",
            lambda c: c.update(markov_rank=8),
            r"'confidence_head.proj.weight' has shape \(1, 38\).* asks for \(1, 40\)",
        ),
        (
            "dspark",
            lambda c: c.update(markov_head_type="gated"),
            "no tensor 'markov_head.gate_proj.bias' .and 1 more",
        ),
        (
            "gated",
            lambda c: c.update(markov_head_type="vanilla"),
            "has no place in the model",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, kind, change, message):
    save(tmp_path / "a", kind)
    edit(tmp_path / "a", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")
