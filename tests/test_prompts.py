"""Prompts as people give them: texts, conversations, token ids, one or many."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.prompts import as_token_ids
from jaxspec.tokenizer import Tokenizer
from tests import tiny

LETTERS = [*"abcdef", "u", "s", ":", "|", "Ġ"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"


@pytest.fixture(scope="module")
def target():
    tokenizer = Tokenizer.from_bpe(LETTERS, [], special=[], eos=0, chat_template=TEMPLATE)
    return dataclasses.replace(tiny.target(), tokenizer=tokenizer)


def read(target, prompts, **options):
    rows = as_token_ids(target, prompts, **{"raw": False, "thinking": None} | options)
    return ["".join(LETTERS[i] for i in row) for row in rows]


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    "prompts, expected",
    [
        ("abc", ["u:abc|"]),
        (["abc", "d"], ["u:abc|", "u:d|"]),
        ([user("abc")], ["u:abc|"]),
        ([[user("abc")], [user("d")]], ["u:abc|", "u:d|"]),
        (
            [{"role": "system", "content": "be"}, user("a"), {"from": "human", "value": "b"}],
            ["s:be|u:a|u:b|"],
        ),
        ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], ["u:ab|"]),
        ([0, 1, 2], ["abc"]),
        (np.array([0, 1, 2]), ["abc"]),
        (np.array([[0, 1], [2, 3]]), ["ab", "cd"]),
        (jnp.array([0, 1, 2]), ["abc"]),
        (jnp.array([[0, 1], [2, 3]]), ["ab", "cd"]),
        ([jnp.array([0, 1]), (2, 3)], ["ab", "cd"]),
        (iter([[0], "b", [user("c")]]), ["a", "u:b|", "u:c|"]),
    ],
)
def test_prompts(target, prompts, expected):
    assert read(target, prompts) == expected


def test_raw_texts_have_no_template(target):
    assert read(target, "abc", raw=True) == ["abc"]


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (user("a"), {}, "prompts is a single message; a conversation is a list of messages"),
        ([user("a")], dict(raw=True), "prompt 0 is a conversation, .* leave raw out"),
        ([user(" ")], {}, "prompt 0 is empty; expected a message with some text"),
        ([{"role": "tutor", "content": "a"}], {}, "prompt 0: message 0: 'role' is 'tutor'"),
        ([user("a") | {"tool_calls": [{}]}], {}, "prompt 0: message 0: 'tool_calls' is"),
        (["a", [user("a"), "b"]], {}, "prompt 1: message 1 is 'b'; expected an object"),
        ([[1], 5], {}, "prompt 1 is '5'; expected a text, a list of token ids, or"),
        (["a", None], {}, "prompt 1 is 'None'; expected a text, a list of token ids, or"),
        (["a", user("b")], {}, "prompt 1 is .*; expected a text, a list of token ids, or"),
        (5, {}, "prompt 0 is '5'; expected a text, a list of token ids, or"),
        ([0.5, 2.0], {}, "prompt 0 is '0.5'; expected a text, a list of token ids, or"),
        ([[0.5]], {}, r"prompt 0 is '\[0.5\]'; expected a text, a list of token ids, or"),
        (
            [["a", "b"]],
            {},
            "prompt 0 is .*; expected a text, a list of token ids, or a list of",
        ),
    ],
)
def test_what_is_none(target, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        read(target, prompts, **options)


def test_messages_need_a_tokenizer():
    with pytest.raises(ValueError, match="a conversation, but target 'tiny' has no tok"):
        as_token_ids(tiny.target(), [user("a")], raw=False, thinking=None)
