"""The pieces of one choice: stop texts, echoes, log-probabilities, calls and why it ends."""

import pytest

from jaxspec.serving.answering import ChoiceReader, Stuck
from jaxspec.serving.calls import joined_calls
from jaxspec.serving.fields import Fields
from jaxspec.serving.formats import json_text
from jaxspec.serving.protocol import Asked
from jaxspec.serving.requests import Request, TokenLogProb, Update
from jaxspec.serving.tools import TOOLS, call_form, read_tools
from tests.serving import servers, structured


def reader(tokenizer=None, *, choice=0, chat=False, logprobs=None, **options) -> ChoiceReader:
    request = Request((1,), 9, logprobs=logprobs)
    usual = dict(requests=(request,), prompt_tokens=1, stops=(), stream=False, echo=("",))
    asked = Asked(**usual | options)
    return ChoiceReader(asked, choice, tokenizer or servers.tokenizer(), chat=chat)


def laws(*tokens):
    return tuple(TokenLogProb(token, -1.0, ()) for token in tokens)


def test_a_stop_text_cuts_text_counts_and_log_probabilities():
    """Tokens 1, 2 and 3 are a, b and c; the a may begin the stop text."""
    one = reader(stops=("ab",), logprobs=0)
    first = one.read(Update(0, (3, 1), logprobs=laws(3, 1), cached=16))
    assert (first.text, first.tokens, first.finish, first.cached) == ("c", 2, None, 16)
    assert first.logprobs["tokens"] == ["c", "a"] and not one.stopped
    second = one.read(Update(0, (2, 3, 3), logprobs=laws(2, 3, 3)))
    assert (second.text, second.tokens, second.cached) == ("", 3, 16)
    assert second.logprobs["tokens"] == ["b"] and one.stopped
    last = one.read(Update(0, (3,), "cancelled", logprobs=laws(3)))
    assert (last.text, last.tokens, last.finish, last.logprobs) == ("", 3, "stop", None)


def test_what_may_have_begun_a_stop_text_is_given_at_the_end():
    found = reader(stops=("ab",)).read(Update(0, (3, 1), "length"))
    assert (found.text, found.finish) == ("ca", "length")


@pytest.mark.parametrize("silent", [False, True])
def test_an_echo_comes_first_and_once(silent):
    one = reader(echo=("ab",), silent=silent, logprobs=0)
    first = one.read(Update(0, (3,), prompt_logprobs=laws(1, 2), logprobs=laws(3)))
    assert first.text == ("ab" if silent else "abc")
    assert first.logprobs["tokens"] == (["a", "b"] if silent else ["a", "b", "c"])
    last = one.read(Update(0, (0,), "stop"))
    assert (last.text, last.finish) == ("", "length" if silent else "stop")


@pytest.mark.parametrize("choice", [1, 2])
def test_each_prompt_has_its_own_echo(choice):
    """Two choices of two prompts."""
    requests = tuple(Request((1,), 9, seed=seed) for seed in range(4))
    one = reader(requests=requests, echo=("a", "b"), choice=choice)
    found = one.read(Update(0, (3,)))
    assert (found.choice, found.text) == (choice, {1: "ac", 2: "bc"}[choice])


def clock(tokenizer, choice="auto", instead=None):
    own = {"type": "function", "function": {"name": "clock"}}
    body = {"tools": [own], "tool_choice": choice}
    return read_tools(Fields(body, TOOLS), call_form(tokenizer), instead)


JSON = '{"name": "clock", "arguments": {}}'
XML = "<function=clock>\n</function>"


@pytest.mark.parametrize(("ended", "finish"), [("stop", "tool_calls"), ("length", "length")])
@pytest.mark.parametrize(
    ("template", "call"), [(structured.TEMPLATE, JSON), (structured.XML_TEMPLATE, XML)]
)
def test_calls_are_not_text(ended, finish, template, call):
    tokenizer = structured.tokenizer(template)
    tokens = tuple(tokenizer.encode(f"so\n<tool_call>\n{call}\n</tool_call>"))
    found = reader(tokenizer, tools=clock(tokenizer)).read(Update(0, tokens, ended))
    assert (found.text, found.finish) == ("so", finish)
    assert [call["function"] for call in found.calls] == [{"name": "clock", "arguments": "{}"}]


@pytest.mark.parametrize(
    ("template", "call", "arguments", "finish"),
    [
        (structured.TEMPLATE, '{"name": "clock", "arguments": {}}\n</tool', "{}", "tool_calls"),
        (structured.TEMPLATE, '{"name": "clock", "arguments": {}', "{}", "tool_calls"),
        (structured.TEMPLATE, '{"name": "clock", "arguments": {', "{", "stop"),
        (structured.XML_TEMPLATE, "<function=clock>\n</fun", "{}", "tool_calls"),
        (structured.XML_TEMPLATE, "<function=clock>\n<", "", "stop"),
    ],
)
def test_a_call_that_a_stop_text_cuts_off(template, call, arguments, finish):
    """It is a call to be made if its arguments are complete."""
    tokenizer = structured.tokenizer(template)
    one = reader(tokenizer, tools=clock(tokenizer), stops=("~",))
    first = one.read(Update(0, tuple(tokenizer.encode(f"<tool_call>\n{call}~"))))
    last = one.read(Update(0, (), "cancelled"))
    (found,) = joined_calls([*first.calls, *last.calls])
    assert (found["function"]["arguments"], last.finish) == (arguments, finish)


TEXT = '{"a": "<tool_call>"}'
CALL = f"<tool_call>\n{JSON}\n</tool_call>"


@pytest.mark.parametrize(
    ("answer", "fits", "text", "calls"),
    [
        (TEXT, True, TEXT, 0),
        (CALL, True, "", 1),
        (f"{CALL}\n{CALL}", True, "", 2),
        ("so", False, "so", 0),
        (f"{TEXT}\n{CALL}", False, f"{TEXT}\n{CALL}", 0),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_with_a_format_an_answer_is_all_json_or_all_calls(answer, fits, text, calls, step):
    tokenizer = structured.tokenizer()
    offered = clock(tokenizer, instead=json_text({"type": "object"}, "response_format"))
    assert structured.fits(offered.grammar, answer) == fits
    one, ids = reader(tokenizer, tools=offered), tokenizer.encode(answer)
    pieces = [one.read(Update(0, tuple(ids[i : i + step]))) for i in range(0, len(ids), step)]
    pieces.append(one.read(Update(0, (), "stop")))
    assert "".join(piece.text for piece in pieces) == text
    assert len(joined_calls([call for piece in pieces for call in piece.calls])) == calls
    assert pieces[-1].finish == ("tool_calls" if calls else "stop")


def test_an_answer_that_must_be_a_call_has_no_other_format():
    offered = clock(structured.tokenizer(), "required", json_text({}, "response_format"))
    assert structured.fits(offered.grammar, CALL)
    assert not structured.fits(offered.grammar, TEXT)


def test_an_answer_without_calls_ends_as_others():
    tokenizer = structured.tokenizer()
    tokens = tuple(tokenizer.encode("so"))
    found = reader(tokenizer, tools=clock(tokenizer)).read(Update(0, tokens, "stop"))
    assert (found.text, found.finish, found.calls) == ("so", "stop", [])


def test_what_began_like_a_call_and_is_none_is_text():
    """Written letter by letter, the mark restricts nothing."""
    tokenizer = structured.tokenizer()
    text = "its mark, <tool_call>, is none"
    one = reader(tokenizer, tools=clock(tokenizer))
    updates = Update(0, tuple(tokenizer.encode(text))), Update(0, (), "stop")
    pieces = list(map(one.read, updates))
    assert "".join(piece.text for piece in pieces) == text and pieces[-1].finish == "stop"


def test_an_answer_that_is_stuck():
    with pytest.raises(Stuck, match="cannot go on in its format: no token"):
        reader().read(Update(0, (1,), "stuck", failure="no token"))
