"""Streaming gives the text of `generate`, in pieces."""

import pytest

from jaxspec.api import generate, stream
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.ngram import PromptLookup
from jaxspec.models.target import Target
from jaxspec.tokenizer import Tokenizer
from tests import tiny

# Ten tokens of text, two of them halves of one character, and the end.
VOCABULARY = ["<end>", "a", "b", "c", "Ġa", "Ġb", "Ã", "©", "Ċ", "d", "e"]


@pytest.fixture(scope="module")
def target() -> Target:
    tokenizer = Tokenizer.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=None)
    model = tiny.target()
    return Target("tiny", model.config, model.params, tokenizer)


@pytest.mark.parametrize("temperature", [0.8, 1.5])
@pytest.mark.parametrize("rounds", [1, 5])
def test_pieces_join_to_the_text(target, temperature, rounds):
    options = dict(
        drafter=LoadedDrafter(PromptLookup(size=4, depth=3)),
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


def test_empty_text_is_refused(target):
    with pytest.raises(ValueError, match="prompt 0 is empty; expected some text"):
        generate(target, " ", raw=True)
