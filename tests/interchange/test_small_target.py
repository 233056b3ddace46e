"""The real small target with drafters of this project: trained here, and the shipped one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.checkpoints.convert import save_safetensors
from jaxspec.checkpoints.drafters import load_drafter, save_drafter
from jaxspec.checkpoints.huggingface import config_to_json
from jaxspec.config import TreeConfig
from jaxspec.data.conversations import Example
from jaxspec.drafters.teacher_forced import run_blocks
from jaxspec.drafters.weights import bind
from jaxspec.training.recipe import (
    OptimizerConfig,
    Preset,
    TrainConfig,
    drafter_config,
    loss_config,
)
from jaxspec.training.trainer import train
from tests.drafters.goldens import tapped
from tests.interchange.cases import whole_rounds
from tests.interchange.running import MARKS, run

pytestmark = [*MARKS, pytest.mark.real]
PRESET = Preset(mask_token_id=16, layers=1, taps=3, rank=32)
CHAIN, BLOCK, NEW, LENGTH, ANCHOR = TreeConfig("chain", 8), 6, 40, 128, 60
SIZES = {"dflash": {}, "dflash2": dict(candidates=8, conv_group=16)}
TEXTS = (
    "List the days of the week, one per line.",
    "Count from one to twenty in words.",
    "Write a Python function that adds two numbers.",
    "What is the capital of France? Answer in one sentence.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2):
    folder = tmp_path_factory.mktemp("small")
    (folder / "target").mkdir()
    save_safetensors(folder / "target", smollm2.config, smollm2.params)
    raw = config_to_json(smollm2.config) | {"dtype": "float32"}
    (folder / "target/config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def prompts(smollm2):
    return [smollm2.tokenizer.chat(text) for text in TEXTS]


@pytest.fixture(scope="module")
def answers(smollm2, prompts):
    return [x.token_ids for x in generate(smollm2, prompts, max_new_tokens=NEW)]


@pytest.fixture(scope="module")
def drafters(folder, smollm2, prompts, answers):
    """Trained on these very answers, until several tokens of a block are accepted."""
    examples = [
        Example(np.array(row + answer, np.int32), np.arange(len(row + answer)) >= len(row))
        for row, answer in zip(prompts, answers, strict=True)
    ]
    found = {}
    for family, sizes in SIZES.items():
        config = TrainConfig(
            drafter_config(family, smollm2.config, PRESET, block_size=BLOCK, **sizes),
            loss=loss_config(family),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            steps=40,
            batch_size=4,
            micro_batch=4,
            anchors=8,
            checkpoint_every=40,
            keep=1,
        )
        run_folder = train(config, smollm2, examples, folder / family)
        found[family] = load_drafter(run_folder, smollm2, CHAIN)
    return found


@pytest.fixture(scope="module")
def shipped(folder, smollm2):
    loaded = load_drafter("shipped", smollm2, CHAIN)
    save_drafter(folder / "shipped", loaded, "speculators", verifier="../target")
    return loaded


@pytest.fixture(scope="module")
def text(smollm2, prompts, answers):
    """Tokens [T], and what the shipped drafter's taps give of them."""
    rows = [x for pair in zip(prompts, answers, strict=True) for x in pair]
    return np.concatenate(rows)[:LENGTH]


@pytest.fixture(scope="module")
def features(smollm2, shipped, text):
    taps = shipped.drafter.taps
    return tapped(smollm2.params, smollm2.config, jnp.asarray(text)[None], taps)


@pytest.fixture(scope="module")
def theirs(folder, drafters, shipped, prompts, text, features):
    jobs = {}
    for family in drafters:
        for i, prompt in enumerate(prompts):
            draft = dict(program="dflash", kind=family, draft=f"{family}/drafter")
            jobs[f"{family} {i}"] = draft | dict(prompt=prompt, max_new_tokens=NEW)
    jobs["shipped"] = dict(
        program="speculators",
        draft="shipped",
        taps="shipped",
        tokens=text.tolist(),
        anchors=[ANCHOR],
        options={"max_anchors": 1},
    )
    return run(folder, jobs, shipped=np.asarray(features[0]))


@pytest.mark.parametrize("family", SIZES)
def test_zlab_generates_with_our_drafters_as_we_do(
    smollm2, prompts, answers, drafters, theirs, family
):
    """The same tokens, and as many in every round of a whole block."""
    ours = generate(smollm2, prompts, drafter=drafters[family], max_new_tokens=NEW)
    rounds = []
    for i, completion in enumerate(ours):
        found = theirs[0][f"{family} {i}"]
        length = len(completion.token_ids)  # z-lab goes on after the end of a text
        assert completion.token_ids == answers[i] == found["tokens"][:length]
        own = whole_rounds(completion, BLOCK)
        assert own == found["committed"][: len(own)]
        rounds += own
    assert len(rounds) > 20 and np.mean(rounds) > 1.5


def test_speculators_gives_the_shipped_drafters_logits(shipped, text, features, theirs):
    """Base logits, what the Markov head adds, and confidence."""
    drafter, params = shipped.drafter, shipped.params
    head, tokens = bind(drafter.config, params.head), jnp.asarray(text)[None]
    block = run_blocks(head, params.vocabulary, tokens, features, jnp.array([[ANCHOR]]))
    base = head.logits(params.vocabulary, block.stream)
    ours = {
        "lm_head": base,
        "markov_head.markov_w2": block.logits(head, params.vocabulary) - base,
        "confidence_head.proj": head.confidence_logits(block.stream, block.previous)[..., None],
    }
    for name, values in ours.items():
        found = theirs[1][f"shipped/{name}/0"]
        np.testing.assert_allclose(found[-drafter.depth :], values[0, 0], atol=2e-3)
