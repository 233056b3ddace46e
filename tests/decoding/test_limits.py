"""Where an output ends, and what the statistics say of it."""

import pytest

from jaxspec.api import generate
from jaxspec.decoding.requests import check_capacity, decoder_for
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.plain import PLAIN
from jaxspec.drafters.small_model import SmallModel
from tests import tiny

PROMPTS = tiny.prompts(7) * 4
ITSELF = LoadedDrafter(SmallModel(tiny.QWEN3), tiny.target().params)  # always right: 8 a round


def run(max_new_tokens=40, stop_ids=None, target=None, drafter=ITSELF, budget=None):
    return generate(
        target or tiny.target(),
        PROMPTS,
        drafter=drafter,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(stop_ids=stop_ids),
        budget=budget,
    )[0]


def test_max_new_tokens_inside_a_block():
    reference = run(40).token_ids
    for n in (1, 2, 8, 9, 10, 16, 17, 39):
        out = run(n)
        assert out.token_ids == reference[:n]
        # The last round counts in full: every round of this drafter decides eight tokens.
        assert out.stats.committed == (8,) * -(-(n - 1) // 8)


def test_a_stop_id_inside_a_block_ends_the_output_and_is_kept():
    reference = run(40).token_ids
    for stop in set(reference):
        end = reference.index(stop) + 1
        out = run(40, stop_ids=(stop,))
        assert out.token_ids == reference[:end]
        assert sum(out.stats.committed) == end - 1  # a round counts up to the stop id


def test_the_targets_own_stop_ids_are_the_default():
    reference = run(40).token_ids
    config = tiny.dataclasses.replace(tiny.QWEN3, eos_token_ids=(reference[4],))
    target = tiny.Target("tiny", config, tiny.target().params)
    out = run(40, target=target, drafter=PLAIN)
    assert out.token_ids == reference[: reference.index(reference[4]) + 1]


def test_tokens_rounds_and_nodes_agree():
    out = run(40, drafter=tiny.RANDOM)
    assert len(out.token_ids) == 40
    assert 39 <= sum(out.stats.committed) <= 39 + tiny.RANDOM.drafter.depth
    assert out.stats.tau == sum(out.stats.committed) / out.stats.rounds
    assert out.stats.nodes == out.stats.rounds * 16


def test_the_budget_bounds_the_nodes_verified():
    out = run(20, drafter=tiny.RANDOM, budget=5)
    assert out.stats.nodes == out.stats.rounds * 5


@pytest.mark.slow
def test_the_capacity_may_be_filled_to_the_last_position():
    positions = tiny.QWEN3.max_positions
    out = generate(
        tiny.target(), tiny.prompts(positions - 20)[0], max_new_tokens=20, drafter=tiny.RANDOM
    )[0]
    assert len(out.token_ids) == 20


@pytest.mark.slow
def test_the_smallest_capacity_that_holds_the_tokens_is_enough():
    """102 + 20 tokens, and the P + 1 = 6 positions that the last round may write beyond."""
    options = dict(max_new_tokens=20, drafter=tiny.RANDOM)
    (prompt,) = tiny.prompts(102)
    small, usual = (
        generate(tiny.target(), prompt, capacity=capacity, **options)[0].token_ids
        for capacity in (128, None)
    )
    assert small == usual


def test_a_capacity_is_compared_with_what_is_needed():
    decoder, _ = decoder_for(tiny.target(), tiny.RANDOM)
    assert check_capacity(decoder, [[1], [1] * 102], 20, 128) == 128
    assert check_capacity(decoder, [[1], [1] * 102], 20, None) == 256
    with pytest.raises(ValueError, match="a prompt of 103 tokens, 20 new ones .* need 129"):
        check_capacity(decoder, [[1], [1] * 103], 20, 128)


def test_no_rounds_no_tau():
    assert run(1).stats.tau == 0.0


@pytest.mark.parametrize("n", [1, 3])
def test_a_last_smaller_batch_is_padded(n):
    prompts = tiny.prompts(3, 4, 5, 6, 7, 8, 9)[: n + 4]
    out = generate(tiny.target(), prompts, max_new_tokens=5, batch_size=4)
    assert [len(c.token_ids) for c in out] == [5] * len(prompts)
