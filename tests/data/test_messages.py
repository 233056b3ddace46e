"""What people's conversations look like, and what of them is refused."""

import pytest

from jaxspec.data.messages import read_messages, row_messages

TEXT = {"type": "text", "text": "Hi"}


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


def test_rows_without_a_conversation_name_what_they_have():
    with pytest.raises(ValueError, match=r"expected .*'messages'.*, found the keys \['text'\]"):
        row_messages({"text": "x"})
