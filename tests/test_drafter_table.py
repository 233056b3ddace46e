"""The tables of docs/drafters.md: every cell is done here on tiny models.

`python -m tests.test_drafter_table` prints both as they are to stand there.
"""

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.checkpoints.drafter_config import NAMES as FORMATS
from jaxspec.checkpoints.drafters import load_drafter, save_drafter
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.eagle_head import EagleConfig
from jaxspec.drafters.weights import random_weights
from jaxspec.training.networks import trained_drafter
from jaxspec.training.recipe import (
    FAMILIES,
    Preset,
    drafter_config,
    eagle_config,
    loss_config,
    parallel_eagle_config,
)
from jaxspec.training.trainer import train
from tests import tiny
from tests.training import tiny as tiny_run

PAGE = Path(__file__).parents[1] / "docs/drafters.md"
PRESET = Preset(mask_token_id=10, layers=1, taps=2, rank=4)
SMALL = {"dflash2": dict(block_size=4, candidates=4, conv_group=4)}
TREES = {"dflash": "top_budget", "jetspec": "best_first", "treeflash": "transitions"}
TARGETS = {
    "Qwen3": tiny.QWEN3,
    "Llama": tiny.LLAMA,
    "Qwen3 mixture": tiny.MOE,
    "Qwen3.5 hybrid": tiny.HYBRID,
}
NAMES = {
    "dspark": "DSpark",
    "dflash": "DFlash",
    "jetspec": "JetSpec",
    "treeflash": "TreeFlash",
    "dflash2": "DFlash2",
    "eagle3": "EAGLE-3",
    "peagle": "P-EAGLE",
}
PROGRAMS = {
    "dflash": "z-lab, SGLang",
    "treeflash": "TreeFlash",
    "deepspec": "DeepSpec",
    "speculators": "speculators, vLLM",
    "eagle3": "SpecForge, SGLang",
}
YES, NO = "yes", "–"


def recipe(family, target):
    """What `train --family` makes for a target."""
    if family == "eagle3":
        return eagle_config(target, steps=4)
    if family == "peagle":
        return parallel_eagle_config(target, mask_token_id=10, steps=4)
    small = SMALL.get(family, dict(block_size=4))
    return drafter_config(family, target, PRESET, **small)


def variants(family, target):
    """The recipe's drafter, and what published ones of the family have otherwise."""
    config = recipe(family, target)
    yield config
    if family == "eagle3":
        yield dataclasses.replace(config, qk_norm=True)
    elif family == "dspark":  # DeepSpec's
        yield dataclasses.replace(config, sequential="gated")
    elif family == "treeflash":
        yield dataclasses.replace(config, confidence=None)


def made(config, target):
    weights = random_weights(config, jax.random.key(0))
    return trained_drafter(config, weights, target, TreeConfig("chain", 4))


def round_trip(config, target, format):
    """The configuration as a file of the format gives it back; None where there is none."""
    with tempfile.TemporaryDirectory() as parent:
        drafter, folder = made(config, target), Path(parent) / "drafter"
        try:
            save_drafter(folder, drafter, format)
        except ValueError:
            return None
        again = load_drafter(folder, target)
    same = jax.tree.map(np.array_equal, drafter.params, again.params)
    assert all(jax.tree.leaves(same)), "written and read, a weight is another"
    return again.drafter.config


def format_table() -> str:
    """Family x format: exported and loaded, of the recipe and of published variants."""
    target = tiny.target(dataclasses.replace(tiny.QWEN3, num_layers=8))
    lines = [
        "| drafter | format | read by | load, export | train | confidence |",
        "|---|---|---|---|---|---|",
    ]
    for family in NAMES:
        for format in FORMATS:
            configs = list(variants(family, target.config))
            found = [round_trip(config, target, format) for config in configs]
            if not any(found):
                continue
            confident = [getattr(x, "confidence", None) for x in found if x is not None]
            cells = [
                NAMES[family],
                f"`{format}`",
                PROGRAMS[format],
                YES,
                YES if found[0] else NO,
                YES if any(confident) else NO,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@functools.cache
def plain(name):
    return outputs(tiny.target(TARGETS[name]))


def outputs(target, **options):
    sampling = [Sampling(), Sampling(temperature=0.8)]
    prompts = tiny.prompts(3, 9)
    done = generate(target, prompts, max_new_tokens=8, sampling=sampling, **options)
    return [completion.token_ids for completion in done]


def tree_of(family, config):
    if type(config) is EagleConfig or getattr(config, "sequential", None):
        return TREES.get(family, "path_conditioned")
    return TREES.get(family, "top_budget")


def decodes(name, family) -> list[str]:
    """Which of the chain and the tree give the target's own output, greedy and sampled."""
    target, done = tiny.target(TARGETS[name]), []
    drafter = made(recipe(family, target.config), target)
    kind = tree_of(family, drafter.drafter.config)
    for shown, tree in (
        ("chain", TreeConfig("chain", 4)),
        ("tree", TreeConfig(kind, 8, width=3, candidates=3)),
    ):
        loaded = dataclasses.replace(drafter, drafter=drafter.drafter.with_tree(tree))
        assert outputs(target, drafter=loaded) == plain(name), (name, family, shown)
        done.append(shown)
    return done


def target_table() -> str:
    """Family x target: chains and trees decoded, equal to plain decoding."""
    lines = [f"| drafter | {' | '.join(TARGETS)} |", f"|---{'|---' * len(TARGETS)}|"]
    for family in NAMES:
        cells = (", ".join(decodes(name, family)) for name in TARGETS)
        lines.append(f"| {NAMES[family]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_formats():
    assert format_table() in PAGE.read_text("utf-8")


def test_every_name_is_shown():
    assert tuple(NAMES) == FAMILIES and PROGRAMS.keys() == set(FORMATS)


@pytest.mark.gate
def test_targets():
    assert target_table() in PAGE.read_text("utf-8")


@pytest.mark.gate
@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, tmp_path):
    """Column "train": two steps of the recipe, exported, loaded, decoding as the target."""
    target, examples = tiny_run.target(), tiny_run.examples()
    config = dataclasses.replace(
        tiny_run.CONFIG,
        drafter=recipe(family, target.config),
        loss=loss_config(family),
        steps=2,
    )
    folder = train(config, target, examples, tmp_path / "run")
    loaded = load_drafter(folder, target, TreeConfig("chain", 4))
    assert loaded.drafter.config == config.drafter
    again = trained_drafter(config.drafter, loaded.params.whole_head, target)
    assert outputs(target, drafter=again) == outputs(target)


if __name__ == "__main__":
    print(format_table())
    sys.stdout.flush()
    print(target_table())
