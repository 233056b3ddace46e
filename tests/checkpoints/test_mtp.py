"""MTP layers in a target's checkpoint: where every tensor goes, and what is refused."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxspec.checkpoints.convert import convert
from jaxspec.checkpoints.drafters import save_drafter
from jaxspec.drafters.mtp import MtpDrafter
from jaxspec.loading import load_drafter, load_target
from jaxspec.models.target import Target
from tests.checkpoints import test_hybrid as hybrid
from tests.checkpoints.writing import write_folder

WIDTH, LAYER = hybrid.WIDTH, "model.layers.1."


def tensors(*, sparse=False):
    """A hybrid's tensors, and of an MTP layer those of its attention layer in other numbers."""
    named, mlp = hybrid.tensors(interleaved=sparse), f"model.layers.{0 if sparse else 1}."
    layer = {
        name.replace(prefix, "mtp.layers.0."): hybrid.random(*x.shape, seed=100 + i)
        for prefix, part in ((LAYER, "self_attn."), (LAYER, "norm.weight"), (mlp, "mlp."))
        for i, (name, x) in enumerate(named.items())
        if name.startswith(prefix + part) or (name.startswith(prefix) and name.endswith(part))
    }
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    own = {f"mtp.{name}.weight": hybrid.random(WIDTH, seed=i) for i, name in enumerate(norms)}
    return named | layer | own | {"mtp.fc.weight": hybrid.random(WIDTH, 2 * WIDTH, seed=9)}


def load(folder, raw, named):
    return load_drafter("mtp", load_target(write_folder(folder, raw, named)))


def test_every_tensor_has_its_place(tmp_path):
    named = tensors()
    loaded = load(tmp_path / "plain", hybrid.TEXT, named)
    assert isinstance(loaded.drafter, MtpDrafter)
    w = loaded.params.head
    np.testing.assert_array_equal(w.fc, named["mtp.fc.weight"].T)
    for gain, name in (
        (w.norm, "norm"),
        (w.token_norm, "pre_fc_norm_embedding"),
        (w.feature_norm, "pre_fc_norm_hidden"),
        (w.layer.attention.norm, "layers.0.input_layernorm"),
        (w.layer.mlp.norm, "layers.0.post_attention_layernorm"),
    ):
        np.testing.assert_array_equal(gain, 1 + named[f"mtp.{name}.weight"])
    a = "mtp.layers.0.self_attn."
    k = named[f"{a}k_proj.weight"].reshape(hybrid.KV_HEADS, hybrid.DIM, WIDTH)
    np.testing.assert_array_equal(w.layer.attention.qkv[:, :, -2], np.moveaxis(k, -1, 0))
    np.testing.assert_array_equal(
        w.layer.mlp.down, named["mtp.layers.0.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(
        loaded.params.vocabulary.embed, named["model.embed_tokens.weight"]
    )


def test_other_prefixes_and_mixtures(tmp_path):
    named = tensors()
    plain = load(tmp_path / "plain", hybrid.TEXT, named)
    renamed = {name.replace("mtp.", "model.mtp.", 1): x for name, x in named.items()}
    again = load(tmp_path / "again", hybrid.TEXT, renamed)
    nested = {
        name
        if name.startswith("mtp.")
        else name.replace("model.", "model.language_model.", 1): x
        for name, x in named.items()
    }
    packed = load(tmp_path / "packed", hybrid.MULTIMODAL, nested)
    for other in (again, packed):
        same = jax.tree.map(np.array_equal, plain.params, other.params)
        assert all(jax.tree.leaves(same))
    sparse = load(tmp_path / "sparse", hybrid.NEXT, tensors(sparse=True))
    assert sparse.params.head.layer.mlp.gate_up.shape == (3, WIDTH, 2, 5)


def test_a_layer_apart_from_its_target(tmp_path):
    """As some publish it for targets whose checkpoint lacks it, quantised ones for example."""
    named = tensors()
    inside = load(tmp_path / "whole", hybrid.TEXT, named)
    own = {name: x for name, x in named.items() if name.startswith("mtp.")}
    target = load_target(write_folder(tmp_path / "without", hybrid.TEXT, hybrid.tensors()))
    single = tmp_path / "single"
    single.mkdir()
    save_file(own, single / "mtp.safetensors")
    config = {"model_type": "qwen3_5_mtp", "block_size": 3}
    bare = {name.removeprefix("mtp."): x for name, x in own.items()}
    split = write_folder(tmp_path / "split", config, bare)
    for folder in (tmp_path / "whole", single, split):
        apart = load_drafter(f"mtp:{folder}", target)
        same = jax.tree.map(np.array_equal, inside.params, apart.params)
        assert all(jax.tree.leaves(same))
    with pytest.raises(ValueError, match=f"MTP layer of a target .*; draft with 'mtp:{split}'"):
        load_drafter(str(split), target)
    with pytest.raises(ValueError, match="there is no file or folder nowhere"):
        load_drafter("mtp:nowhere", target)


def without(name):
    return lambda named: named.pop(name)


def with_tensor(name, *shape):
    return lambda named: named.update({name: hybrid.random(*shape)})


@pytest.mark.parametrize(
    "change, message",
    [
        (without("mtp.fc.weight"), "no tensor 'mtp.fc.weight'"),
        (without("mtp.layers.0.self_attn.q_norm.weight"), "'mtp.layers.0.self_attn.q_norm"),
        (with_tensor("mtp.fc.weight", WIDTH, WIDTH), r"'mtp.fc.weight' has shape \(12, 12\)"),
        (with_tensor("mtp.layers.1.mlp.up_proj.weight", 2), "belongs to a second MTP layer"),
        (with_tensor("mtp.embed_tokens.weight", 11, WIDTH), "'mtp.embed_tokens.weight' has no"),
    ],
)
def test_a_layer_that_is_another(tmp_path, change, message):
    named = tensors()
    change(named)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "plain", hybrid.TEXT, named)


def test_a_target_without_one(tmp_path):
    with pytest.raises(
        ValueError, match="no tensor 'mtp.…', so no MTP layer; draft with 'mtp'"
    ):
        load(tmp_path / "plain", hybrid.TEXT, hybrid.tensors())
    folder, store = write_folder(tmp_path / "whole", hybrid.TEXT, tensors()), tmp_path / "store"
    convert(folder, store, dtype="float32")
    with pytest.raises(ValueError, match="was converted, which leaves MTP layers out"):
        load_drafter("mtp", load_target(store))
    target = load_target(folder)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is a file, which holds no MTP layer"):
        load_drafter("mtp", Target(str(file), target.config, target.params))


def test_it_is_not_written_as_a_drafter_of_its_own(tmp_path):
    loaded = load(tmp_path / "plain", hybrid.TEXT, tensors())
    with pytest.raises(ValueError, match="part of its target's checkpoint"):
        save_drafter(tmp_path / "out", loaded)
    assert not (tmp_path / "out").exists()
