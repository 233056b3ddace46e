"""Every mistake gets one clear sentence, before anything runs."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxspec.api import generate, stream, warm_up
from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.loading import load_drafter, load_target
from jaxspec.models.decoder import check_taps
from jaxspec.pace import measure_pace
from jaxspec.scoring import hidden_states, logits, score
from jaxspec.tokenizer import Tokenizer
from tests import tiny


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "prompts is empty; expected a text, a list of token ids"),
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
        ([[1]], dict(capacity=128), "capacity is 128; .* need 263. Raise it or leave it out"),
        ([[1]], dict(capacity=256.0), "capacity is 256.0; expected an integer"),
        ([[1]], dict(capacity=400), "capacity is 400; expected a multiple of 128"),
        ([[1]], dict(budget=17), "budget is 17; the drafter's trees have 1 … 16 nodes"),
        ([[1]], dict(max_new_tokens=2.5), "max_new_tokens is 2.5; expected an integer"),
        ([[1]], dict(budget=1.5), "budget is 1.5; expected an integer"),
        ([[1]], dict(budget=0), "budget is 0; the drafter's trees have 1 … 16 nodes"),
        ([[1]], dict(batch_size=0), "batch_size is 0; expected at least 1"),
        ([[1]], dict(batch_size=1.5), "batch_size is 1.5; expected an integer"),
        ([[1], [2]], dict(seed=[1]), "1 seeds for 2 prompts; give one, or one per prompt"),
        ([[1], [2]], dict(sampling=[Sampling()]), "1 entries for 2 prompts; give one"),
        (
            [[1]],
            dict(sampling={"top_k": 1}),
            "sampling has {'top_k': 1}; expected a jaxspec",
        ),
        ([[1]], dict(sampling=[Sampling(), 2]), "sampling has 2; expected a jaxspec.Sampling"),
        ([[1]], dict(drafter=None), "drafter is None; expected a name or the result of load_d"),
        ([[1]], dict(stop=3), "stop holds 3; expected non-empty texts"),
        (
            [[1]],
            dict(sampling=Sampling(stop_ids=tuple(range(9)))),
            "stop_ids has 9 ids; expected at most 8, the target's own included",
        ),
        (
            [[1]],
            dict(sampling=Sampling(stop_ids=(2**40,))),
            "stop_ids has 1099511627776; the target's vocabulary is 0 … 10",
        ),
        (
            [[1], [2]],
            dict(batch_size=1, sampling=[Sampling(), Sampling(logit_bias={11: 1.0})]),
            "logit_bias has token id 11; the target's vocabulary is 0 … 10",
        ),
    ],
)
def test_requests(prompts, options, message, monkeypatch):
    monkeypatch.setattr("jaxspec.api.prefill", None)  # nothing runs
    with pytest.raises(ValueError, match=message):
        generate(tiny.target(), prompts, **dict(drafter=tiny.RANDOM) | options)


CALLS = (generate, stream, warm_up, measure_pace, logits, hidden_states, score)


@pytest.mark.parametrize("call", CALLS)
def test_a_name_is_no_target(call):
    options = dict(drafter="ngram") if call is measure_pace else {}
    with pytest.raises(ValueError, match="target is 'tiny'; expected .* jaxspec.load_target"):
        call("tiny", [1, 2], **options)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad])
@pytest.mark.parametrize("call", [generate, score])
def test_loops_in_python_cannot_be_traced(call, transform):
    with pytest.raises(ValueError, match="the call is traced by jax.jit, grad or vmap"):
        transform(lambda target: call(target, [1, 2]))(tiny.target())
    if transform is jax.jit:  # what it closes over is traced too
        with pytest.raises(ValueError, match="the call is traced"):
            transform(lambda x: call(tiny.target(), [1, 2]))(0.0)


def test_warming_up_refuses_what_generating_does():
    for options, message in (
        (dict(batch_size=0), "batch_size is 0; expected at least 1"),
        (dict(seed=[7]), "1 seeds for 2 prompts; give one, or one per prompt"),
        (dict(budget=17), "budget is 17; the drafter's trees have 1 … 16 nodes"),
    ):
        with pytest.raises(ValueError, match=message):
            warm_up(tiny.target(), [[1], [2]], drafter=tiny.RANDOM, **options)


@pytest.mark.parametrize("call", [generate, warm_up, measure_pace])
def test_a_drafter_without_its_params(call):
    with pytest.raises(ValueError, match="drafter is RandomTrees.* LoadedDrafter.drafter, par"):
        call(tiny.target(), [[1]], drafter=tiny.RANDOM.drafter)


@pytest.mark.parametrize(
    "seed", [[7, 8, 9], np.array([7, 8, 9]), jax.random.split(jax.random.key(7), 3)]
)
def test_warming_up_takes_one_option_each(seed):
    prompts = tiny.prompts(3, 4, 5)
    options = dict(sampling=[Sampling()] * 3, seed=seed, batch_size=2, max_new_tokens=4)
    capacity = warm_up(tiny.target(), prompts, **options)
    assert len(generate(tiny.target(), prompts, capacity=capacity, **options)) == 3


def test_streaming_needs_a_tokenizer():
    with pytest.raises(ValueError, match="target 'tiny' has no tokenizer; use generate"):
        stream(tiny.target(), [1, 2])


def test_taps_out_of_range():
    check_taps((-1, 0, 2), tiny.QWEN3)
    with pytest.raises(ValueError, match=r"taps \[-2, 3\] are out of range: .* layers 0 … 2"):
        check_taps((-2, 1, 3), tiny.QWEN3)


def test_a_small_drafter_must_share_the_vocabulary(monkeypatch):
    other = dataclasses.replace(tiny.QWEN3, vocab_size=13)
    monkeypatch.setattr("jaxspec.loading.load_target", lambda *_, **__: tiny.target(other))
    with pytest.raises(ValueError, match="vocabulary of 13 tokens, target 'tiny' one of 11"):
        load_drafter("small:other", tiny.target())


def test_a_small_drafter_must_share_the_tokenizer(monkeypatch):
    alphabet = [*"abdefHlorwx", "Ġ"]

    def with_tokens(tokens):
        tokenizer = Tokenizer.from_bpe(tokens, [], special=[], eos=0, chat_template=None)
        return dataclasses.replace(tiny.target(), tokenizer=tokenizer)

    other = with_tokens(alphabet[::-1])
    monkeypatch.setattr("jaxspec.loading.load_target", lambda *_, **__: other)
    with pytest.raises(ValueError, match="turns text into other tokens than target 'tiny'"):
        load_drafter("small:other", with_tokens(alphabet))
    load_drafter("small:same", other)


@pytest.mark.parametrize(
    "spec, options, message",
    [
        (None, {}, "spec is None; expected a text: the name or folder of a drafter, or 'none'"),
        ("ngram", dict(tree="chain"), "tree is 'chain'; expected a jaxspec.TreeConfig"),
        ("ngram", dict(tree=TreeConfig("best_first")), "'best_first', which grows from scores"),
        ("none", dict(tree=TreeConfig("best_first")), "give nodes instead"),
        ("ngram", dict(nodes=8.0), "nodes is 8.0; expected an integer"),
        ("ngram", dict(nodes=0), "nodes is 0; expected at least 1"),
        ("ngram", dict(threshold=0.5), "'ngram' has no such head, or its tree is not a chain"),
        ("ngram", dict(survival=1.5), "survival is 1.5; expected a probability, 0 … 1"),
    ],
)
def test_drafters(spec, options, message):
    with pytest.raises(ValueError, match=message):
        load_drafter(spec, tiny.target(), **options)


def test_a_drafter_is_for_a_loaded_target():
    with pytest.raises(ValueError, match="target is 'tiny'; expected a loaded target: load it"):
        load_drafter("ngram", "tiny")


def test_a_model_has_a_name():
    with pytest.raises(ValueError, match="a model is named by None; expected the text of a na"):
        load_target(None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TreeConfig("bush"), "TreeConfig.kind is 'bush'; expected one of"),
        (lambda: TreeConfig(size=0), "TreeConfig.size is 0; expected at least 1"),
        (lambda: TreeConfig(size=8.0), "TreeConfig.size is 8.0; expected an integer"),
        (lambda: PromptLookup(depth=0), "PromptLookup.depth is 0; expected at least 1"),
        (
            lambda: PromptLookup(min_match=11),
            "agreement is .* at least min_match = 11",
        ),
        (
            lambda: dataclasses.replace(tiny.QWEN3, num_kv_heads=3),
            "num_heads is 4; expected a mult",
        ),
        (lambda: dataclasses.replace(tiny.QWEN3, head_dim=15), "head_dim is 15; .* even"),
        (lambda: dataclasses.replace(tiny.QWEN3, num_layers=0), "num_layers is 0; expected"),
        (
            lambda: dataclasses.replace(tiny.MOE, sparse_layers=(3,)),
            r"names \[3\]; expected layers",
        ),
        (
            lambda: dataclasses.replace(tiny.MOE, experts_per_token=5),
            "expected 1 … num_experts",
        ),
    ],
)
def test_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()
