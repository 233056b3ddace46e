"""Drafters trained and exported here, run by z-lab's `dflash` and vLLM's `speculators`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.checkpoints.drafters import load_drafter, save_drafter
from jaxspec.config import TreeConfig
from jaxspec.data.conversations import Example
from jaxspec.drafters.base import Committed
from jaxspec.drafters.eagle_head import ParallelEagleConfig
from jaxspec.drafters.registry import trained
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind, random_weights
from jaxspec.training.recipe import (
    OptimizerConfig,
    Preset,
    TrainConfig,
    drafter_config,
    eagle_config,
    loss_config,
)
from jaxspec.training.trainer import train
from tests.interchange.cases import (
    ANCHOR,
    LENGTH,
    TOKENS,
    features,
    make_target,
    prompts,
    unrolled_logits,
    whole_rounds,
)
from tests.interchange.running import MARKS, run

pytestmark = MARKS
PRESET = Preset(mask_token_id=39, layers=2, taps=2, rank=8)
CHAIN, BLOCK, NEW = TreeConfig("chain", 8), 6, 48
SIZES = {"dflash": {}, "dflash2": dict(candidates=4, conv_group=8)}
STEPS = 3
OPTIONS = {
    "eagle3": {"ttt_steps": STEPS},
    # All depths of all anchors, none sampled.
    "peagle": {"num_depths": 4, "down_sample_ratio": 1.0, "down_sample_ratio_min": 1.0},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("interchange"))


@pytest.fixture(scope="module")
def drafters(target):
    """Trained on the target's own answers until most of a block is accepted at times."""
    rows, folder = prompts(64), Path(target.name).parent
    answers = [x.token_ids for x in generate(target, rows, max_new_tokens=64, batch_size=32)]
    examples = [
        Example(np.array(row + answer, np.int32), np.arange(len(row) + 64) >= len(row))
        for row, answer in zip(rows, answers, strict=True)
    ]
    found = {}
    for family, sizes in SIZES.items():
        config = TrainConfig(
            drafter_config(family, target.config, PRESET, block_size=BLOCK, **sizes),
            loss=loss_config(family),
            optimizer=OptimizerConfig(learning_rate=3e-3),
            steps=150,
            batch_size=16,
            micro_batch=16,
            anchors=16,
            checkpoint_every=150,
            keep=1,
        )
        run = train(config, target, examples, folder / family)
        found[family] = load_drafter(run, target, CHAIN)
    eagle = eagle_config(target.config, steps=4)
    changes = dict(num_layers=2, window=None, tap_norm="joined", mask_token_id=39)
    parallel = ParallelEagleConfig(**vars(eagle) | changes)
    for name, config in (("eagle3", eagle), ("peagle", parallel)):
        weights = random_weights(config, jax.random.key(0))
        found[name] = trained(config, weights, target.params, CHAIN)
    return found


@pytest.fixture(scope="module")
def theirs(target, drafters):
    """What the other programs make of the exported folders."""
    folder = Path(target.name).parent
    jobs = {}
    for family, loaded in drafters.items():
        draft, taps = f"speculators-{family}", f"{len(loaded.drafter.taps)}"
        save_drafter(folder / draft, loaded, "speculators", verifier="../target")
        jobs[draft] = dict(program="speculators", draft=draft, taps=taps)
        if family not in SIZES:  # rows are pairs of a feature and the token after it
            jobs[draft] |= dict(tokens=[*TOKENS[1:], 0], anchors=list(range(LENGTH)))
            jobs[draft]["options"] = OPTIONS[family]
            continue
        jobs[draft] |= dict(tokens=TOKENS, anchors=[ANCHOR], options={"max_anchors": 1})
        for i, prompt in enumerate(prompts(2)):
            jobs[f"{family} {i}"] = dict(
                program="dflash",
                kind=family,
                draft=f"{family}/drafter",
                prompt=prompt,
                max_new_tokens=NEW,
            )
    return run(folder, jobs, **{str(n): features(n) for n in (2, 3)})


@pytest.mark.parametrize("family", SIZES)
def test_zlab_generates_with_our_drafters_as_we_do(target, drafters, theirs, family):
    drafter, taus = drafters[family], []
    for i, ours in enumerate(generate(target, prompts(2), drafter=drafter, max_new_tokens=NEW)):
        found = theirs[0][f"{family} {i}"]
        assert ours.token_ids == found["tokens"]
        rounds = whole_rounds(ours, BLOCK)
        assert len(rounds) > 5 and rounds == found["committed"][: len(rounds)]
        taus.append(ours.stats.tau)
    assert max(taus) > 2  # rounds of several tokens are among them


@pytest.mark.parametrize("family", SIZES)
def test_speculators_gives_our_logits_of_blocks(drafters, theirs, family):
    drafter, params = drafters[family].drafter, drafters[family].params
    head = bind(drafter.config, params.head)
    blocks = run_blocks(
        head,
        params.vocabulary,
        jnp.array([TOKENS]),
        jnp.asarray(features(len(drafter.taps)))[None],
        jnp.array([[ANCHOR]]),
    )
    ours = head.logits(params.vocabulary, blocks.stream)[0, 0]
    found = theirs[1][f"speculators-{family}/lm_head/0"]  # the anchor's own slot first
    np.testing.assert_allclose(found[1:], ours, atol=2e-4)


def test_speculators_gives_our_logits_of_unrolled_steps(drafters, theirs):
    ours = unrolled_logits(drafters["eagle3"], steps=STEPS)
    for step in range(STEPS):
        inside = LENGTH - 1 - step
        found = theirs[1][f"speculators-eagle3/lm_head/{step}"]
        np.testing.assert_allclose(found[:inside], ours[step, :inside], atol=2e-4)


@pytest.mark.parametrize("pair", [6, 60, 100])
def test_speculators_gives_our_logits_of_all_depths(drafters, theirs, pair):
    """Their rows are in an order of their own: each of ours is among those of its depth."""
    drafter, params = drafters["peagle"].drafter, drafters["peagle"].params
    tokens, taps = jnp.array([TOKENS]), jnp.asarray(features(len(drafter.taps)))[None]
    count = jnp.array([pair + 1])
    state = drafter.observe(
        params, drafter.init(params, 1, LENGTH), Committed(tokens, taps, 0 * count, count)
    )
    ours = drafter.logits(params, state, tokens[:, pair + 1], count)[0]
    found, start = theirs[1]["speculators-peagle/lm_head/0"], 0
    for depth in range(4):
        rows = found[start : start + LENGTH - depth]
        distances = np.sort(np.abs(rows - ours[depth]).max(axis=1))
        assert distances[0] < 1e-5 < 1e-3 < distances[1]
        start += len(rows)
