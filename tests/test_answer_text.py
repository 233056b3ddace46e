"""Stop texts: nothing of them, or after them, is given out, wherever the pieces end."""

import pytest

from jaxspec.answer_text import AnswerText


class Letters:
    """A tokenizer whose tokens are characters."""

    decoder_steps = ()

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ((), "one two </s three </s> four"),
        (("</s>",), "one two </s three "),
        (("four", "</s>"), "one two </s three "),
        (("absent",), "one two </s three </s> four"),
        (("fours",), "one two </s three </s> four"),
        (("one",), ""),
    ],
)
def test_text_ends_before_the_first_stop(stops, expected, size):
    text = "one two </s three </s> four"
    answer, given = AnswerText(Letters(), stops), ""
    for at in range(0, len(text), size):
        given += answer.add([ord(c) for c in text[at : at + size]])
        assert expected.startswith(given)
    assert given + answer.finish() == answer.text == expected
    assert answer.stopped == (expected != text)


@pytest.mark.parametrize(
    ("min_tokens", "expected", "taken"),
    [(0, "a", 2), (1, "a", 2), (2, "aba", 4), (9, "ababa", 5)],
)
def test_stop_texts_are_looked_for_after_the_least_tokens(min_tokens, expected, taken):
    answer = AnswerText(Letters(), ("b",), min_tokens=min_tokens)
    text = answer.add([ord(character) for character in "ababa"])
    assert (text, answer.taken) == (expected, taken)
    again = AnswerText(Letters(), ("b",), min_tokens=min_tokens)
    again.see([ord(character) for character in "ab"])
    again.see([ord(character) for character in "ababa"])
    assert (again.text, again.taken) == (expected, taken)


class Bytes(Letters):
    """A tokenizer whose tokens are bytes of UTF-8."""

    decoder_steps = (dict(type="ByteLevel"),)

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("min_tokens, expected", [(1, "a"), (2, "a\ufffd")])
def test_nor_are_they_in_half_a_character_of_the_least_tokens(min_tokens, expected):
    answer = AnswerText(Bytes(), ("\ufffd",), min_tokens=min_tokens)
    answer.add([ord("a"), "é".encode()[0]])
    answer.finish()
    assert (answer.text, answer.stopped) == (expected, min_tokens == 1)
