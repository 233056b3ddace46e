"""Streaming gives the text of `generate`, in pieces."""

import jax
import pytest

from jaxspec.api import generate, stream
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.drafters.plain import PLAIN
from jaxspec.models.target import Target
from jaxspec.tokenizer import Tokenizer
from tests import tiny
from tests.slow import slow_but

LOOKUP = LoadedDrafter(PromptLookup(size=4, depth=3))
# Ten tokens of text, two of them halves of one character, and the end.
VOCABULARY = ["<end>", "a", "b", "c", "Ġa", "Ġb", "Ã", "©", "Ċ", "d", "e"]


@pytest.fixture(scope="module")
def target() -> Target:
    """Bound to a device, as weights that are read from files: else rounds after a stop text
    would be compiled once more."""
    tokenizer = Tokenizer.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=None)
    params = jax.device_put(tiny.target().params, jax.devices()[0])
    return Target("tiny", tiny.QWEN3, params, tokenizer)


@pytest.mark.parametrize("temperature", [0.8, 1.5])
@pytest.mark.parametrize("rounds", slow_but([5], [1, 5]))
def test_pieces_join_to_the_text(target, temperature, rounds):
    options = dict(
        drafter=LOOKUP,
        max_new_tokens=33,
        sampling=Sampling(temperature=temperature),
        raw=True,
    )
    (whole,) = generate(target, "abcab", **options)
    pieces, stats = [], None
    running = stream(target, "abcab", rounds=rounds, **options)
    while stats is None:
        try:
            pieces.append(next(running))
        except StopIteration as end:
            stats = end.value
    assert "".join(pieces) == whole.text
    assert all(pieces) and len(pieces) > 3
    assert stats == whole.stats


@pytest.mark.parametrize("drafter", slow_but([LOOKUP], [PLAIN, LOOKUP]))
@pytest.mark.parametrize("length", slow_but([2], [1, 2, 5]))
def test_a_stop_text_ends_text_and_tokens_where_plain_decoding_has_it(target, drafter, length):
    options = dict(max_new_tokens=40, sampling=Sampling(temperature=1.0, stop_ids=()), raw=True)
    prompts, seeds = ["abcab", "cc"], [3, 4]
    first, second = generate(target, prompts, seed=seeds, **options)
    pieces = (first.text[at : at + length] for at in range(4, 40))
    stop = next(piece for piece in pieces if "\ufffd" not in piece)
    cut, other = generate(
        target, prompts, seed=seeds, drafter=drafter, stop=[stop, "nowhere"], **options
    )
    assert cut.text == first.text[: first.text.index(stop)] and cut.finish == "stop"
    count = len(cut.token_ids)
    assert cut.token_ids == first.token_ids[:count]
    assert stop in target.tokenizer.decode(cut.token_ids)
    assert stop not in target.tokenizer.decode(cut.token_ids[:-1])
    assert sum(cut.stats.committed) == count - 1
    if stop not in second.text:
        assert (other.token_ids, other.finish) == (second.token_ids, "length")
    (none,) = generate(target, prompts[:1], seed=seeds[:1], stop=None, **options)
    assert none.text == first.text
    streamed = stream(target, "abcab", drafter=drafter, stop=stop, seed=3, **options)
    (alone,) = generate(target, "abcab", seed=3, stop=stop, **options)
    assert "".join(streamed) == alone.text


@pytest.mark.parametrize(
    "stop, message",
    [("", "stop holds ''"), (["a", 3], "stop holds 3; expected non-empty texts")],
)
def test_what_is_no_stop_text(target, stop, message):
    with pytest.raises(ValueError, match=message):
        generate(target, "a", stop=stop, raw=True)


def test_stop_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop texts need a tokenizer, and target 'tiny' has"):
        generate(tiny.target(), [1], stop="a")


def test_a_drafter_by_name_and_a_row_of_a_table(target):
    options = dict(max_new_tokens=8, raw=True)
    (plain,), (named,) = (
        generate(target, "abcab", drafter=name, **options) for name in ("none", "ngram")
    )
    assert named.token_ids == plain.token_ids and named.stats.rounds <= plain.stats.rounds
    row = named.to_dict()
    assert (row["new_tokens"], row["finish"], row["tau"]) == (
        len(named.token_ids),
        named.finish,
        named.stats.tau,
    )
    assert repr(named).startswith(f"Completion({named.text!r}, {row['new_tokens']} tokens, tau")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rounds=0), "rounds is 0; expected at least 1"),
        (dict(rounds=-1), "rounds is -1; expected at least 1"),
        (dict(budget=2), "budget is 2; the drafter's trees have 1 … 1 nodes"),
        (dict(sampling=[Sampling()] * 2), "sampling has 2 entries for 1 prompts"),
        (dict(sampling=None), "sampling has None; expected a jaxspec.Sampling"),
    ],
)
def test_a_stream_is_refused_when_it_is_called(target, options, message):
    with pytest.raises(ValueError, match=message):
        stream(target, "a", raw=True, **options)


def test_empty_text_is_refused(target):
    with pytest.raises(ValueError, match="prompt 0 is empty; expected some text"):
        generate(target, " ", raw=True)
