"""Every mistake gets one clear sentence, before anything runs."""

import dataclasses

import pytest

from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.generation import generate, stream
from jaxspec.loading import load_drafter
from jaxspec.models.decoder import check_taps
from tests import tiny


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "no prompts were given; expected a text, a list of ids"),
        ([[]], {}, "prompt 0 is empty; expected at least one token id"),
        ([[1], [3, 11]], {}, r"prompt 1 has token id 11; the target's vocabulary is 0 … 10"),
        ([[-1]], {}, "prompt 0 has token id -1"),
        ("hello", {}, "prompt 0 is text, but target 'tiny' has no tokenizer; give token ids"),
        (
            [[1] * 500],
            dict(max_new_tokens=20),
            "500 tokens and 20 new ones need 520 positions; the target has 512. Shorten",
        ),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0; expected at least 1"),
        ([[1]], dict(capacity=128), "capacity is 128; .* need 384. Raise it or leave it out"),
        ([[1]], dict(budget=17), "budget is 17; the drafter's trees have 1 … 16 nodes"),
        ([[1]], dict(budget=0), "budget is 0; the drafter's trees have 1 … 16 nodes"),
        ([[1]], dict(batch_size=0), "batch_size is 0; expected at least 1"),
        ([[1], [2]], dict(seed=[1]), "1 seeds for 2 prompts; give one, or one each"),
        ([[1], [2]], dict(sampling=[Sampling()]), "1 samplings for 2 prompts; give one"),
        (
            [[1]],
            dict(sampling=Sampling(stop_ids=tuple(range(9)))),
            "9 stop ids were given; at most 8 fit",
        ),
    ],
)
def test_requests(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny.target(), prompts, drafter=tiny.RANDOM, **options)


def test_streaming_needs_a_tokenizer():
    with pytest.raises(ValueError, match="target 'tiny' has no tokenizer; use generate"):
        next(stream(tiny.target(), [1, 2]))


def test_taps_out_of_range():
    check_taps((-1, 0, 2), tiny.QWEN3)
    with pytest.raises(ValueError, match=r"taps \[-2, 3\] are out of range: .* layers 0 … 2"):
        check_taps((-2, 1, 3), tiny.QWEN3)


def test_a_small_drafter_must_share_the_vocabulary(monkeypatch):
    other = dataclasses.replace(tiny.QWEN3, vocab_size=13)
    monkeypatch.setattr("jaxspec.loading.load_target", lambda *_, **__: tiny.target(other))
    with pytest.raises(ValueError, match="vocabulary of 13 tokens, target 'tiny' one of 11"):
        load_drafter("small:other", tiny.target())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TreeConfig("bush"), "TreeConfig.kind is 'bush'; expected one of"),
        (lambda: TreeConfig(size=0), "TreeConfig.size is 0; expected at least 1"),
        (lambda: PromptLookup(depth=0), "PromptLookup.depth is 0; expected at least 1"),
        (lambda: PromptLookup(min_match=5), "max_match is 4; expected at least min_match = 5"),
        (lambda: dataclasses.replace(tiny.QWEN3, num_kv_heads=3), "num_heads is 4, not a mult"),
        (lambda: dataclasses.replace(tiny.QWEN3, head_dim=15), "head_dim is 15; .* even"),
        (lambda: dataclasses.replace(tiny.QWEN3, num_layers=0), "num_layers is 0; expected"),
        (lambda: dataclasses.replace(tiny.MOE, sparse_layers=(3,)), r"names \[3\]; layers are"),
        (
            lambda: dataclasses.replace(tiny.MOE, experts_per_token=5),
            "expected 1 … num_experts",
        ),
    ],
)
def test_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()
