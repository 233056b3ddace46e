"""Drafters by family and target, and the options that change them."""

import dataclasses
from pathlib import Path

import pytest

from jaxspec.checkpoints.drafter_config import to_json
from jaxspec.cli.train import Train
from jaxspec.config import spaced_taps
from jaxspec.models import presets
from jaxspec.training.losses import LossConfig
from jaxspec.training.recipe import (
    BLOCKS,
    PRESETS,
    OptimizerConfig,
    TrainConfig,
    drafter_config,
    find_preset,
    loss_config,
)
from jaxspec.training.regenerate import RegenerateConfig
from tests.training import tiny


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("qwen3")])
def test_every_qwen3_has_drafters(name, family):
    target = presets.PRESETS[name]
    config = drafter_config(family, target, PRESETS[name])
    assert (config.num_layers, len(config.taps)) == (5, 5)
    assert config.taps == spaced_taps(target.num_layers, 5)
    assert config.hidden_size == target.hidden_size
    to_json(config, "treeflash" if family == "treeflash" else "dflash", "float32")
    loss_config(family)


@pytest.mark.parametrize(
    "layers, count, taps",
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (8, 5, (1, 2, 3, 4, 5)),
        (7, 5, (0, 1, 3, 4, 5)),
        (6, 5, (0, 1, 2, 3, 4)),
        (5, 5, (0, 1, 2, 3, 4)),
        (4, 5, (0, 1, 2, 3)),
        (1, 5, (0,)),
        (2, 1, (1,)),
    ],
)
def test_taps_of_a_shallow_target_are_different_layers(layers, count, taps):
    assert spaced_taps(layers, count) == taps


def test_the_published_drafters_shapes():
    target, preset = presets.PRESETS["qwen3-8b"], PRESETS["qwen3-8b"]
    dspark, dflash, jetspec, treeflash, dflash2 = (
        drafter_config(family, target, preset) for family in BLOCKS
    )
    assert (dspark.depth, dspark.sequential, dspark.rank) == (7, "markov", 256)
    assert (dflash.depth, set(dflash.causal), dflash.sequential) == (15, {False}, None)
    assert (jetspec.depth, set(jetspec.causal)) == (15, {True})
    assert (dflash2.depth, dflash2.sequential, dflash2.candidates) == (7, "bilinear", 16)
    assert (treeflash.depth, treeflash.sequential, treeflash.rank) == (15, "mlp", 0)
    with pytest.raises(ValueError, match="family is 'eagle'; expected one of"):
        drafter_config("eagle", target, preset)
    with pytest.raises(ValueError, match="family is 'eagle'; expected one of"):
        loss_config("eagle")


def test_presets_are_found_by_hub_name_and_path():
    assert find_preset("Qwen/Qwen3-30B-A3B") is PRESETS["qwen3-30b-a3b"]
    assert find_preset("/models/Qwen3-0.6B") is PRESETS["qwen3-0.6b"]
    assert find_preset("gpt2") is None


def drafter(**options):
    command = Train(data=Path("data"), output=Path("run"), target="Qwen/Qwen3-4B", **options)
    return command._drafter(presets.PRESETS["qwen3-4b"])


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(family="treeflash"), dict(sequential="mlp", causal=(False,) * 5, rank=0)),
        (
            dict(family="jetspec", sequential="rnn", rank=64, block_size=8),
            dict(sequential="rnn", causal=(True,) * 5, rank=64, depth=7),
        ),
        (
            dict(family="dspark", sequential="gated", causal=True),
            dict(sequential="gated", causal=(True,) * 5, confidence="hidden_and_previous"),
        ),
        (
            dict(family="dspark", sequential="none", confidence_head="hidden"),
            dict(sequential=None, rank=0, confidence="hidden"),
        ),
        (
            dict(family="dflash2"),
            dict(sequential="bilinear", rank=256, candidates=16, conv_taps=2, depth=7),
        ),
        (
            dict(family="dflash2", sequential="none"),
            dict(sequential=None, rank=0, candidates=0, conv_taps=2),
        ),
        (dict(family="dflash", layers=2, mask_token_id=5), dict(num_layers=2, mask_token_id=5)),
    ],
)
def test_options_change_the_family(options, expected):
    config = drafter(**options)
    assert {name: getattr(config, name) for name in expected} == expected


def test_heads_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="only low-rank heads embed"):
        drafter(family="dspark", sequential="none")
    with pytest.raises(ValueError, match="leave out causal"):
        drafter(initial="some/drafter", causal=True)
    with pytest.raises(ValueError, match="target 'gpt2' has no preset .*--mask-token-id"):
        Train(data=Path("x"), output=Path("y"), target="gpt2")._drafter(tiny.TARGET_CONFIG)


def test_a_rule_for_the_selector_needs_one():
    loss = dataclasses.replace(loss_config("dflash2"), missing="skip")
    for family, options in (("dflash", {}), ("dflash2", dict(sequential="none"))):
        with pytest.raises(ValueError, match="missing is 'skip', which needs dflash2's"):
            TrainConfig(drafter(family=family, **options), loss)
    TrainConfig(drafter(family="dflash2"), loss)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (OptimizerConfig, dict(learning_rate=-1e-3), "learning_rate is -0.001; .* at least 0"),
        (OptimizerConfig, dict(learning_rate=float("nan")), "learning_rate is nan"),
        (OptimizerConfig, dict(warmup=4), "warmup is 4; expected a share of the steps, 0 … 1"),
        (OptimizerConfig, dict(beta2=1.0), "beta2 is 1.0; expected at least 0, less than 1"),
        (OptimizerConfig, dict(clip=0), "clip is 0; expected more than 0"),
        (LossConfig, dict(confidence=-1), "confidence is -1; expected at least 0"),
        (LossConfig, dict(smoothing=2), "smoothing is 2; expected a share, 0 … 1"),
    ],
)
def test_settings_that_cannot_train_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_have_their_own_random_numbers(seed):
    with pytest.raises(ValueError, match=f"TrainConfig.seed is {seed}; expected 0 … 42"):
        TrainConfig(drafter(family="dflash"), seed=seed)
    with pytest.raises(ValueError, match=f"RegenerateConfig.seed is {seed}; expected 0 …"):
        RegenerateConfig(seed=seed)


def test_devices_must_divide():
    with pytest.raises(ValueError, match="--devices is 3 and --target-devices 2"):
        Train(data=Path("x"), output=Path("y"), devices=3, target_devices=2)._mesh()
