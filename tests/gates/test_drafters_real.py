"""20 real prompts, the real small target, float32, an untrained drafter of every kind."""

import dataclasses

import jax
import pytest

from jaxspec.api import generate
from jaxspec.data.prompts import read_prompts
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.block import BlockDrafter, block_params
from jaxspec.drafters.weights import random_weights
from jaxspec.models.target import Target
from tests.drafters import cases
from tests.drafters.test_lossless import TREES

pytestmark = [pytest.mark.gate, pytest.mark.real]

SETS = ("gsm8k", "math500", "humaneval", "mbpp", "mt-bench")


@pytest.fixture(scope="module")
def target(smollm2) -> Target:
    return Target("smollm2-135m", smollm2.config, smollm2.params, smollm2.tokenizer)


@pytest.fixture(scope="module")
def prompts(shared) -> list[str]:
    folder = shared / "prompts"
    return [prompt for name in SETS for prompt in read_prompts(folder / f"{name}.jsonl")[:4]]


def untrained(kind: str, target: Target) -> LoadedDrafter:
    c = target.config
    config = dataclasses.replace(
        cases.KINDS[kind],
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        target_layers=c.num_layers,
        mask_token_id=c.vocab_size - 1,
    )
    weights = random_weights(config, jax.random.key(0))
    return LoadedDrafter(
        BlockDrafter(config, TREES[kind]), block_params(weights, target.params)
    )


@pytest.fixture(scope="module")
def plain(target, prompts):
    return answers(target, prompts)


def answers(target, prompts, **options):
    return [c.token_ids for c in generate(target, prompts, max_new_tokens=12, **options)]


@pytest.mark.parametrize("kind", TREES)
def test_lossless(target, prompts, plain, kind):
    assert len(prompts) == 20
    assert answers(target, prompts, drafter=untrained(kind, target)) == plain
