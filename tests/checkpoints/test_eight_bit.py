"""Weights of fp8 checkpoints that stay in 8 bits: the same values, in half the memory."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from jaxspec.checkpoints import huggingface
from jaxspec.checkpoints.convert import convert
from jaxspec.checkpoints.drafter_files import equal_as_stored
from jaxspec.cli import main
from jaxspec.models.layers import project
from jaxspec.models.scaled import ScaledWeight, by_value
from jaxspec.training.networks import copy_layers
from jaxspec.training.trainer import train
from tests import tiny
from tests.checkpoints import test_hybrid as hybrid
from tests.checkpoints.test_quantised import CONFIG, FORMATS, A, load, with_first, write
from tests.checkpoints.writing import MIXTURE, random_tensors, write_folder
from tests.processes import run_script
from tests.training.tiny import CONFIG as TRAINING

FP8 = [name for name in FORMATS if name.startswith(("fp8", "modelopt"))]
ONCE = pytest.mark.filterwarnings("ignore:.*is stored as")


def kept(folder, dtype="float32"):
    config = huggingface.read_config(folder)
    return huggingface.load_params(folder, config, dtype, stored=True)


def all_by_value(params):
    """The same with every weight of 8 bits as float32 values, in the axes it has by value."""
    return jax.tree.map(
        lambda x: np.asarray(by_value(x)), params, is_leaf=lambda x: isinstance(x, ScaledWeight)
    )


@ONCE
@pytest.mark.parametrize("name", FP8)
def test_values_are_those_of_the_dequantised_checkpoint(tmp_path, name):
    write(tmp_path, CONFIG, name)
    found = kept(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, all_by_value(found), load(tmp_path))
    layer = found.layers[0]
    for weight in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
        assert weight.values.dtype == jnp.float8_e4m3fn and weight.scale.dtype == jnp.float32
        assert weight.scale.size <= weight.values.size / 16
    assert layer.attention.qkv.shape == (32, 2, 4, 16)  # [M, K, G + 2, D]
    assert layer.attention.out.shape == (2, 2, 16, 32)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A target with weights of 8 bits, its LM head too, and the same dequantised."""
    folder = tmp_path_factory.mktemp("fp8")
    write(folder, CONFIG | {"vocab_size": 60}, "fp8 blocks", head=True)
    return [jaxspec.load_target(folder, weights=kind) for kind in ("stored", "dequantised")]


@ONCE
def test_logits_are_those_of_the_dequantised_twin(twins):
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    found, expected = (tiny.logits(target, tokens) for target in twins)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@ONCE
def test_rows_of_an_lm_head_stay_in_8_bits(twins):
    head, whole = (target.params.unembed for target in twins)
    assert head.values.dtype == jnp.float8_e4m3fn and head.shape == whole.shape == (60, 32)
    kept = jnp.array([1, 2, 7, 40])
    assert head[kept].values.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(by_value(head), whole)
    np.testing.assert_array_equal(by_value(head[kept]), whole[kept])
    hidden = jax.random.normal(jax.random.key(0), (3, 32))
    logits = project("nm,vm->nv", hidden, head[kept])
    np.testing.assert_allclose(logits, hidden @ whole[kept].T, rtol=1e-5, atol=1e-5)


@ONCE
def test_a_drafter_that_repeats_the_lm_head_fits_its_fp8_form(twins):
    head, whole = (target.params.unembed for target in twins)
    assert equal_as_stored(np.asarray(whole), head)
    assert equal_as_stored(np.asarray(whole) * 1.001, head)  # rounds to the same values
    assert not equal_as_stored(np.asarray(whole) * 1.2, head)


@pytest.mark.slow
@ONCE
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_trees_are_lossless(twins, temperature):
    target, _ = twins
    options = dict(
        max_new_tokens=24, seed=3, sampling=jaxspec.Sampling(temperature=temperature)
    )
    prompts = tiny.prompts(2, 9)
    plain, drafted = (
        [x.token_ids for x in jaxspec.generate(target, prompts, drafter=drafter, **options)]
        for drafter in ("none", tiny.RANDOM)
    )
    assert plain == drafted


@ONCE
@pytest.mark.slow
def test_the_command_keeps_them_too(twins, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxspec.enable_compilation_cache", lambda: tmp_path)
    stored, _ = twins
    (tmp_path / "ids.json").write_text("[[3, 1, 4]]")
    found = []
    for weights in ("stored", "dequantised"):
        assert main(["generate", "--target", stored.name, "--weights", weights,
                     "--prompt-ids", str(tmp_path / "ids.json"), "--max-new-tokens", "8",
                     "--dtype", "float32", "--drafter", "none", "--json"]) == 0  # fmt: skip
        found.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert found[0] == found[1]


def test_training_needs_the_lm_head_by_value(twins, tmp_path):
    with pytest.raises(ValueError, match="LM head of .* is in 8 bits.*weights 'dequantised'"):
        train(TRAINING, twins[0], [], tmp_path / "run")


def test_a_drafter_does_not_start_from_them(twins):
    config = SimpleNamespace(num_layers=1)
    with pytest.raises(ValueError, match="weights are in 8 bits.*weights 'dequantised'"):
        copy_layers(config, None, twins[0].params)


@pytest.mark.parametrize(
    "tensor, change, message",
    [
        ("weight_scale_inv", lambda x: None, r"no tensor '.*q_proj.weight_scale'"),
        ("weight_scale_inv", lambda x: x[:1], r"shape \(1, 2\); expected \(4, 2\)"),
        ("weight_scale_inv", with_first(0), r"weight_scale_inv' holds 0.0; a scale is posi"),
        ("weight_scale_inv", with_first(np.nan), r"weight_scale_inv' holds nan; a scale is po"),
        ("weight", with_first(np.nan), r"'.*q_proj.weight' holds NaN or infinity"),
    ],
)
def test_damage_is_named(tmp_path, tensor, change, message):
    write(tmp_path, CONFIG, "fp8 blocks", f"{A}.{tensor}", change)
    with pytest.raises(ValueError, match=message):
        kept(tmp_path)


@ONCE
def test_experts_of_a_mixture_stay_too(tmp_path):
    raw = MIXTURE | {"hidden_size": 32, "moe_intermediate_size": 24}
    write(tmp_path, raw, "fp8 blocks")
    stored, whole = (
        jaxspec.load_target(tmp_path, weights=kind) for kind in ("stored", "dequantised")
    )
    mlp, expected = stored.params.layers[0].mlp, whole.params.layers[0].mlp
    for found, value in ((mlp.gate_up, expected.gate_up), (mlp.down, expected.down)):
        assert found.values.dtype == jnp.float8_e4m3fn and found.shape == value.shape
        np.testing.assert_array_equal(by_value(found), value)
    logits, expected = (tiny.logits(target, [3, 1, 4, 1, 5]) for target in (stored, whole))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@ONCE
def test_of_gated_delta_nets_the_last_product_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(hybrid, "DV", 8)
    monkeypatch.setattr(hybrid, "WIDTH", 16)
    raw = hybrid.TEXT | {"linear_value_head_dim": 8, "hidden_size": 16}
    write_folder(tmp_path / "source", raw, hybrid.tensors())
    convert(tmp_path / "source", tmp_path / "fp8", dtype="fp8")
    stored, whole = (
        jaxspec.load_target(tmp_path / "fp8", weights=kind)
        for kind in ("stored", "dequantised")
    )
    found, expected = (target.params.layers[0].attention for target in (stored, whole))
    assert found.output.shape == (2, 3, 8, 16)  # [J, R, dv, M]
    np.testing.assert_array_equal(by_value(found.output), expected.output)
    assert found.inputs.dtype == jnp.float32
    logits, expected = (tiny.logits(target, [3, 1, 4, 1, 5]) for target in (stored, whole))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_is_dequantised_all_the_same_is_named(tmp_path):
    write(tmp_path, CONFIG, "fp8 blocks", head=True)  # 11 tokens: a scale for every 8 values
    with pytest.warns(UserWarning, match=r"1 tensors of 8 bits are dequantised.*'lm_head\.we"):
        assert kept(tmp_path).lm_head.dtype == jnp.float32


@pytest.mark.parametrize("name", ["int8 rows", "gptq", None])
def test_what_is_not_fp8_is_refused(tmp_path, name):
    if name is None:
        write_folder(tmp_path, CONFIG, random_tensors(CONFIG))
    else:
        write(tmp_path, CONFIG, name)
    with pytest.raises(ValueError, match="is stored (by value|as int.*); weights 'stored'"):
        jaxspec.load_target(tmp_path, weights="stored")


def test_a_gpu_without_fp8_is_named(tmp_path, monkeypatch):
    write(tmp_path, CONFIG, "fp8 blocks")
    old = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda: [old])
    with pytest.raises(ValueError, match="NVIDIA A100 has compute capability 8.0; weights 'st"):
        kept(tmp_path)


def test_a_kind_of_weights_that_is_not_known(tmp_path):
    with pytest.raises(ValueError, match=r"weights is 'fp8'; expected one of \('dequantised'"):
        jaxspec.load_target(write_folder(tmp_path, CONFIG, {}), weights="fp8")


SCRIPT = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jaxspec.loading import load_target
from jaxspec.models.decoder import forward_chain, unembed
from jaxspec.models.state import init_states
from jaxspec.sharding import mesh_of

def logits(devices):
    target = load_target(sys.argv[1], devices=devices, weights="stored")
    step = jax.jit(lambda params: unembed(params, forward_chain(
        params, target.config, jnp.arange(5)[None],
        init_states(target.config, 1, 8, jnp.float32), jnp.zeros(1, int)).hidden))
    with mesh_of(target.params):
        text = step.lower(target.params).compile().as_text()
        return np.asarray(step(target.params)), text, target.params

whole, _, _ = logits(1)
cut, text, params = logits(8)
experts, layer = params.layers[0].mlp, params.layers[1]
np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
gathered = re.findall(r"\\[([\\d,]+)\\]\\S* all-gather\\(", text)
report = dict(gathered=max(int(np.prod([int(n) for n in x.split(",")])) for x in gathered))
for name, weight in dict(qkv=layer.attention.qkv, out=layer.attention.out,
                         gate_up=layer.mlp.gate_up, down=layer.mlp.down,
                         expert_gate_up=experts.gate_up, expert_down=experts.down,
                         lm_head=params.lm_head).items():
    report[name] = [weight.values.sharding.shard_shape(weight.values.shape),
                    weight.scale.sharding.shard_shape(weight.scale.shape)]
print(json.dumps(report))
"""


def test_weights_and_scales_are_cut_over_devices(tmp_path):
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 384}
    wide |= {"hidden_size": 32, "head_dim": 16, "vocab_size": 48}
    wide |= {"num_experts": 8, "moe_intermediate_size": 24}
    write(tmp_path, MIXTURE | wide, "fp8 blocks", head=True)
    (report,) = run_script(SCRIPT, tmp_path, 1)  # 4 x 2 devices
    assert report == {
        "gathered": 1920,  # channels of five nodes; a weight has 8192 values or more
        "qkv": [[1, 4, 16, 32], [1, 4, 4, 4]],
        "out": [[32, 1, 2, 16], [8, 1, 2, 2]],
        "gate_up": [[2, 48, 32], [2, 12, 4]],
        "down": [[32, 48], [8, 2]],
        "expert_gate_up": [[1, 2, 24, 32], [1, 2, 6, 4]],
        "expert_down": [[1, 32, 24], [1, 8, 1]],
        "lm_head": [[6, 32], [3, 4]],
    }
