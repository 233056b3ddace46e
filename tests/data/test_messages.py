"""What people's conversations look like, and what of them is refused."""

import pytest

from jaxspec.data.messages import holds_conversation, read_messages, row_messages
from jaxspec.data.prompts import row_turns

TEXT = {"type": "text", "text": "Hi"}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes"}
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    "raw",
    [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
        [{"from": "user", "value": "Hi", "weight": 1}, {"from": "chatgpt", "value": [TEXT]}],
        [
            {"role": "user", "content": [{"type": "text", "text": "H"}, TEXT | {"text": "i"}]},
            {"role": "assistant", "content": "Yes", "name": "x"},
        ],
    ],
    ids=["openai", "sharegpt", "mixed names", "parts"],
)
def test_conversations_are_read(raw):
    raw[1] = {k: "Yes" if isinstance(v, list) else v for k, v in raw[1].items()}
    expected = [("user", "Hi"), ("assistant", "Yes")]
    for key in ("conversations", "messages"):
        found = row_messages({key: raw})
        assert [(x["role"], x["content"]) for x in found] == expected


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "assistant", "content": None}, "message 0: the content is null"),
        ({"role": "assistant"}, "message 0: the content is null"),
        ({"role": "assistant", "content": 4}, "message 0: the content is 4; expected text"),
        ({"role": "assistant", "content": {"text": "x"}}, "the content is {'text': 'x'}"),
        (
            {"role": "assistent", "content": "x"},
            "'role' is 'assistent'; expected one of system",
        ),
        ({"role": ["user"], "content": "x"}, r"'role' is \['user'\]"),
        ({"from": "gtp", "value": "x"}, "'from' is 'gtp'; expected one of human, gpt"),
        ({"content": "x"}, "'from' is null"),
        ("hello", "message 0 is 'hello'; expected an object"),
        (
            {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {}}]},
            "part 1 of the content is {'type': 'image_url'.* only text can be read",
        ),
        ({"role": "user", "content": ["x"]}, "part 0 of the content is 'x'"),
        ({"role": "user", "content": [TEXT | {"text": None}]}, "part 0 of the content is"),
        ({"role": "user", "content": "a\ud83d b"}, "lone surrogate, '.ud83d'"),
    ],
)
def test_what_is_no_text_is_refused(message, error):
    with pytest.raises(ValueError, match=error):
        read_messages([message])


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"tool_calls": [CALL]}, r"message 1: 'tool_calls' is \[{'type'.*; expected none"),
        ({"tool_calls": [CALL], "content": None}, "message 1: 'tool_calls' is"),
        ({"function_call": {"name": "look"}}, "message 1: 'function_call' is"),
        (
            {"reasoning_content": "So"},
            "'reasoning_content' is 'So'; .* only the content",
        ),
        ({"reasoning": "So"}, "'reasoning' is 'So'"),
        ({"thinking": "So"}, "'thinking' is 'So'"),
        ({"weight": 0}, "message 1: 'weight' is 0; expected 1"),
    ],
)
def test_parts_that_would_be_lost_are_refused(part, error):
    with pytest.raises(ValueError, match=error):
        row_messages({"messages": [USER, ANSWER | part]})


def test_parts_that_are_empty_are_not_missed():
    empty = {"tool_calls": [], "function_call": None, "reasoning_content": "", "weight": 1}
    assert row_messages({"messages": [USER, ANSWER | empty], "tools": []}) == [USER, ANSWER]


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_a_prompt_alone_asks_and_is_no_conversation(name):
    assert row_turns({name: "Hi"}) == row_turns({name: [USER]}) == ([], ["Hi"])
    with pytest.raises(ValueError, match=rf"expected .*, found the keys \['{name}'\]"):
        row_messages({name: "Hi"})


def test_a_prompt_goes_before_a_question():
    row = {"prompt": "Hi", "question": "?", "answer": "!"}
    assert row_turns(row) == ([], ["Hi"]) and not holds_conversation(row)


@pytest.mark.parametrize("row", [{"messages": [USER, ANSWER]}, {"prompt": "Hi"}])
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_refused(row, name):
    for read in (row_messages, row_turns) if "messages" in row else (row_turns,):
        with pytest.raises(
            ValueError, match=f"'{name}' is .*; expected a conversation without"
        ):
            read(row | {name: [CALL]})


def test_an_answer_that_is_dropped_may_have_thoughts():
    answer = ANSWER | {"reasoning_content": "So", "weight": 0}
    assert row_turns({"messages": [USER, answer, USER]}) == ([], ["Hi", "Hi"])


@pytest.mark.parametrize("role", ["tool", "system", "developer"])
def test_messages_between_turns_are_refused(role):
    other = {"role": role, "content": "sunny"}
    with pytest.raises(ValueError, match=f"message 2: the role is '{role}'; expected"):
        row_turns({"messages": [USER, ANSWER, other, USER]})


def test_rows_without_a_conversation_name_what_they_have():
    with pytest.raises(ValueError, match=r"expected .*'messages'.*, found the keys \['text'\]"):
        row_messages({"text": "x"})
