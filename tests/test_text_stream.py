"""Streamed text, joined, is the text of all ids, for any ids of any kind of tokenizer."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models
from transformers import PreTrainedTokenizerFast

from jaxspec.text_stream import TextStream
from jaxspec.tokenizer import Tokenizer

WORDS = ["▁", "▁a", "▁Hi", "b", "▁▁", "é", "�", " ", ".", "##c", "d</w>", "|", "<0x>", ""]
BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF)]
GPT2_BYTES = ["a", "Ġ", "Ġb", "Ċ", "Ã", "©", "â", "Ĥ", "¬", "ð", "Ł", "ÿ", "ï", "¿", "½"]
ENDS = [("<s>", True), ("</s>", True), ("<think>", False)]


def bpe(tokens, decoder, unknown=None):
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return with_ends(models.BPE(vocabulary, [], byte_fallback=True), decoder)


def with_ends(model, decoder):
    made = tokenizers.Tokenizer(model)
    if decoder is not None:
        made.decoder = decoder
    for text, special in ENDS:
        made.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=made))


def llama(*extra):
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    return bpe(WORDS + BYTES, decoders.Sequence([*steps, *extra]))


UNIGRAM = models.Unigram([(token, -1.0) for token in WORDS + BYTES], 0, byte_fallback=True)
WORDPIECE = models.WordPiece({t: i for i, t in enumerate(WORDS + BYTES)}, unk_token=".")
TOKENIZERS = {
    "byte fallback": llama(decoders.Strip(" ", 1, 0)),
    "byte fallback, two blanks": llama(decoders.Strip(" ", 2, 0)),
    "byte fallback, blanks at the end": llama(decoders.Strip(" ", 0, 1)),
    "byte fallback, nothing stripped": llama(),
    "byte fallback, patterns": llama(decoders.Replace(Regex("a +b"), "c")),
    "byte level": bpe(GPT2_BYTES, decoders.ByteLevel()),
    "unigram": with_ends(UNIGRAM, decoders.Metaspace()),
    "unigram, bytes": with_ends(
        UNIGRAM, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "word pieces": with_ends(WORDPIECE, decoders.WordPiece()),
    "ends of words": bpe(WORDS + BYTES, decoders.BPEDecoder()),
    "repeats": bpe(WORDS + BYTES, decoders.CTC("|", "▁")),
    "no decoder": bpe(WORDS + BYTES, None),
}


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.step(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_are_the_whole(name, data):
    """Ids beyond the vocabulary, which a padded target may choose, are left out. What the
    library itself cannot decode (`Strip` at the end of no text) fails at the stream's end."""
    tokenizer = TOKENIZERS[name]
    size = tokenizer.fast.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=24))
    try:
        expected = tokenizer.decode(ids)
    except ValueError as error:
        with pytest.raises(ValueError, match="the tokenizer cannot decode"):
            streamed(tokenizer, ids)
        assert "blanks at the end" in name, error
    else:
        assert "".join(streamed(tokenizer, ids)) == expected


def ids_of(tokenizer, *tokens):
    return [tokenizer.fast.token_to_id(token) for token in tokens]


@pytest.mark.parametrize(
    ("name", "tokens", "pieces"),
    [
        ("byte fallback", ["▁Hi", "▁a", "b"], ["Hi", " a", "b", ""]),
        ("byte fallback", ["<0x0A>", "<0xE2>", "b"], ["", "", "��b", ""]),
        ("byte fallback", ["<0xE2>", "<0x82>", "<0xAC>", "b"], ["", "", "", "€b", ""]),
        ("byte fallback", ["b", "<0xC3>", "</s>", "<0xA9>"], ["b", "", "", "", "é"]),
        ("byte fallback", ["b", "<0xC3>", "<think>"], ["b", "", "�<think>", ""]),
        ("byte level", ["a", "â", "Ĥ", "¬", "Ġb"], ["a", "", "", "€", " b", ""]),
        ("byte level", ["â", "a"], ["", "�a", ""]),
        ("byte level", ["ÿ", "ÿ", "a"], ["", "�", "�a", ""]),
        ("unigram", ["▁Hi", "▁a", "b"], ["Hi", " a", "b", ""]),
        ("word pieces", ["b", "##c", "é", "."], ["b", "c", " é", ".", ""]),
        ("no decoder", ["b", "é"], ["b", " é", ""]),
        ("repeats", ["b", "b", "é"], ["", "", "", "bé"]),
    ],
)
def test_pieces_come_as_soon_as_they_are_certain(name, tokens, pieces):
    tokenizer = TOKENIZERS[name]
    assert streamed(tokenizer, ids_of(tokenizer, *tokens)) == pieces


@pytest.mark.parametrize(
    ("name", "token", "raw"),
    [
        ("byte level", "Ġb", b" b"),
        ("byte level", "â", b"\xe2"),
        ("byte level", "Ċ", b"\n"),
        ("byte level", "</s>", b"</s>"),
        ("byte fallback", "▁Hi", b" Hi"),
        ("byte fallback", "<0xE2>", b"\xe2"),
        ("byte fallback", "<0x>", b"<0x>"),
        ("byte fallback, patterns", "<0xFF>", b"\xff"),
        ("unigram", "▁a", b" a"),
        ("word pieces", "##c", b"c"),
        ("word pieces", "é", " é".encode()),
    ],
)
def test_the_bytes_of_a_token_inside_a_text(name, token, raw):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.token_bytes(*ids_of(tokenizer, token)) == raw
    assert tokenizer.token_bytes(tokenizer.fast.get_vocab_size() + 1) == b""


def test_a_long_text_is_not_decoded_again_and_again():
    tokenizer = TOKENIZERS["byte fallback"]
    stream, lengths = TextStream(tokenizer), []
    whole = tokenizer.decode

    class Counted:
        shown = tokenizer.shown

        def decode(self, ids):
            lengths.append(len(ids))
            return whole(ids)

    stream._tokenizer = Counted()
    for token in ids_of(tokenizer, "▁Hi", "b", "<0x41>") * 100:
        stream.step(token)
    assert max(lengths) <= 6
