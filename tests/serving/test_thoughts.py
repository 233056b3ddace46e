"""Thoughts apart from answers: where they begin and end, in any pieces; tools and formats."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jaxspec.serving.answering import ChoiceReader
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.connections import Limits
from jaxspec.serving.fields import BadRequest
from jaxspec.serving.messages import read_messages
from jaxspec.serving.protocol import read_chat
from jaxspec.serving.requests import Update
from jaxspec.serving.thoughts import ThoughtReader, start_of
from jaxspec.tokenizer import Tokenizer
from tests.serving import servers, structured
from tests.serving.engines import CONFIG
from tests.serving.test_answering import clock, reader

# What templates do at the end of a prompt: Qwen3.5's, and Qwen3's.
BEGUN = (
    "{% for m in messages %}{% if m.reasoning_content %}{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% endfor %}<think>\n"
)
OLDER = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
CASES = {  # where thoughts begin, other ends, the text: thoughts, the answer
    "begun in the prompt": ("prompt", (), "so\nbe it\n</think>\n\nyes", "so\nbe it", "yes"),
    "begun in the answer": ("answer", (), "<think>\nso\n</think>\n\nyes\n", "so", "yes\n"),
    "none": ("answer", (), "\n yes <think>", "", "\n yes <think>"),
    "nothing said": ("answer", (), "", "", ""),
    "not begun": ("answer", (), "<thin", "", "<thin"),
    "never ended": ("prompt", (), "so be </thi", "so be </thi", ""),
    "empty": ("answer", (), "<think>\n\n</think>\n\nyes", "", "yes"),
    "begun again": ("prompt", (), "so</think>a<think>b</think>", "so", "a<think>b</think>"),
    "ended by a call": ("prompt", ("<call>",), "so\n<call>x</think>", "so", "<call>x</think>"),
}


@pytest.mark.parametrize("name", CASES)
@given(cuts=st.sets(st.integers(0, 40), max_size=8))
def test_any_pieces_give_the_same(name, cuts):
    start, ends, text, *expected = CASES[name]
    one, at = ThoughtReader(start, ends), [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(at, at[1:], strict=False)]
    read = [one.add(piece) for piece in pieces] + [one.add("", last=True)]
    assert ["".join(part) for part in zip(*read, strict=True)] == expected


@pytest.mark.parametrize(
    ("template", "switches", "start"),
    [
        (BEGUN, {}, "prompt"),
        (OLDER, {}, "answer"),
        (OLDER, {"enable_thinking": False}, "answer"),
        (servers.TEMPLATE, {}, None),
    ],
)
def test_where_thoughts_begin(template, switches, start):
    tokenizer = structured.tokenizer(template)
    prompt = tokenizer.chat([{"role": "user", "content": "a"}], **switches)
    assert start_of(tokenizer, prompt) == start


def test_a_mark_that_decoding_omits_begins_nothing():
    vocabulary = [*structured.VOCABULARY, "</think>"]
    own = dict(special=[0, 1, len(vocabulary) - 1], eos=0, chat_template=BEGUN)
    tokenizer = Tokenizer.from_bpe(vocabulary, structured.MERGES, **own)
    assert start_of(tokenizer, tokenizer.chat("a")) is None


def test_a_choice_has_thoughts_text_and_calls():
    tokenizer = structured.tokenizer()
    text = 'so\n</think>\n\nyes\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    one: ChoiceReader = reader(tokenizer, tools=clock(tokenizer), thoughts="prompt", chat=True)
    found = one.read(Update(0, tuple(tokenizer.encode(text)), "stop"))
    assert (found.thoughts, found.text, found.finish) == ("so", "yes", "tool_calls")
    assert found.says_something and len(found.calls) == 1


NAMED = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
OF_A_CALL = f"so\n{CALL}, or"  # thoughts


@pytest.mark.parametrize(
    ("choice", "text", "thoughts"),
    [
        ("auto", f"so\n{CALL}", "so"),
        ("required", f"{OF_A_CALL}\n</think>\n\n{CALL}", OF_A_CALL),
        (NAMED, f"{OF_A_CALL}\n</think>\n\n{CALL}", OF_A_CALL),
    ],
)
def test_only_free_calls_end_thoughts(choice, text, thoughts):
    """A call that must come comes after the thoughts, as its grammar has it."""
    tokenizer = structured.tokenizer()
    own = dict(tools=clock(tokenizer, choice), thoughts="prompt", chat=True)
    update = Update(0, tuple(tokenizer.encode(text)), "stop")
    found = reader(tokenizer, **own).read(update)
    assert (found.thoughts, found.text, found.finish) == (thoughts, "", "tool_calls")
    assert [call["function"] for call in found.calls] == [{"name": "clock", "arguments": "{}"}]


def ask(template, **body):
    target = structured.target()
    target = type(target)("tiny", target.config, target.params, structured.tokenizer(template))
    body = {"messages": [{"role": "user", "content": "a"}]} | body
    return read_chat(body, target, EngineConfig(**CONFIG), structured.grammars())


@pytest.mark.parametrize(
    ("template", "switches", "text"),
    [
        (BEGUN, {}, "so\n</think>\n\nab"),
        (OLDER, {"enable_thinking": True}, "so</think>\n\nab"),
        (OLDER, {}, "ab"),
    ],
)
def test_a_format_holds_after_the_thoughts(template, switches, text):
    """Where the model can be kept from thinking, it thinks only if it is asked to; then the
    prompt begins the thoughts."""
    (request,) = ask(template, guided_regex="ab", chat_template_kwargs=switches).requests
    prompt = structured.tokenizer().decode(request.prompt)
    assert prompt.rstrip().endswith("<think>") == ("</think>" in text)
    matcher = request.grammar.matcher()
    for token in structured.tokenizer().encode(text):
        assert matcher.allowed[token // 32] >> (token % 32) & 1, text
        matcher.advance([token])
    assert matcher.allowed[0] & 1  # it may end


def test_thoughts_of_earlier_answers_go_to_the_template():
    told = [{"role": "assistant", "content": "b", "reasoning_content": "so"}]
    with pytest.raises(BadRequest, match="chat template has no reasoning_content"):
        ask(None, messages=told)
    for name in ("reasoning_content", "reasoning"):
        told = [{"role": "assistant", "content": "b", name: "so"}]
        (message,) = read_messages(told)
        assert message == {"role": "assistant", "content": "b", "reasoning_content": "so"}
        (request,) = ask(BEGUN, messages=told).requests
        assert structured.tokenizer().decode(request.prompt) == "so</think>b<think>"
    with pytest.raises(BadRequest, match="unknown field 'messages.0..reasoning'"):
        read_messages([{"role": "user", "content": "b", "reasoning": "so"}])


def test_thoughts_of_earlier_answers_go_where_older_templates_read_them():
    """QwQ's template takes the thoughts off itself; another shows them."""
    own = "{% set told = m.content.split('</think>')[-1].lstrip('\n') %}{{ told }}"
    told = [{"role": "assistant", "content": "b", "reasoning_content": "so"}]
    told.append({"role": "user", "content": "c"})
    for shown, prompt in ((own, "bc"), ("{{ m.content }}", "<think>\nso\n</think>\n\nbc")):
        template = f"{{% for m in messages %}}{shown}{{% endfor %}}{{# </think> #}}"
        (request,) = ask(template, messages=told).requests
        assert structured.tokenizer().decode(request.prompt) == prompt


def test_a_switch_that_the_template_lacks_is_refused():
    with pytest.raises(BadRequest, match="no switch 'preserve_thinking'"):
        ask(OLDER, chat_template_kwargs={"preserve_thinking": True})


def test_thoughts_come_as_reasoning_content():
    """Of a random model, whose thoughts do not end."""
    target = structured.target()
    thinks = type(target)("tiny", target.config, target.params, structured.tokenizer(BEGUN))
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 8, "temperature": 0}
    with servers.serve(limits=Limits(), target=thinks, **structured.SERVER) as (port, _):
        _, whole = servers.post(port, "/v1/chat/completions", json.dumps(body).encode())
        body["stream"] = True
        _, events = servers.post(port, "/v1/chat/completions", json.dumps(body).encode())
    message = json.loads(whole)["choices"][0]["message"]
    chunks = [json.loads(x[6:]) for x in events.split("\n\n") if x.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert message["reasoning_content"] and not message["content"]
    streamed = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert streamed == message["reasoning_content"]
    assert deltas[0]["role"] == "assistant" and not any(d.get("content") for d in deltas)
