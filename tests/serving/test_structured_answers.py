"""Structured answers and tools, with the `openai` client as people use it."""

import json
import re
import time
from typing import Literal

import openai
import pydantic
import pytest

from jaxspec.serving.calls import LEAD, Tool, calls_text, joined_calls
from jaxspec.serving.connections import Limits
from jaxspec.serving.fields import Fields
from jaxspec.serving.json_calls import JsonCalls
from jaxspec.serving.tools import TOOLS as FIELDS
from jaxspec.serving.tools import read_tools
from tests.serving import servers, structured

TURN = [{"role": "user", "content": "hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
PARAMETERS["properties"]["days"] |= {"minimum": 1, "maximum": 14}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Time now."}}
TOOLS = [WEATHER, CLOCK]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=4)
    age: int = pydantic.Field(ge=0, le=130)
    role: Literal["cook", "pilot"]


@pytest.fixture(scope="module")
def port():
    own = dict(target=structured.target(), **structured.SERVER)
    with servers.serve(limits=Limits(), **own) as (port, runner):
        yield port
        servers.await_idle(runner)


@pytest.fixture(scope="module")
def client(port):
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def chat(client, **options):
    options = dict(model="tiny", messages=TURN, temperature=0.0, max_tokens=150) | options
    return client.chat.completions.create(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema(client, temperature):
    """By the client's own reading of a pydantic class."""
    done = client.chat.completions.parse(
        model="tiny", messages=TURN, response_format=Person, temperature=temperature, seed=3
    )
    found = done.choices[0]
    assert found.finish_reason == "stop"
    assert isinstance(found.message.parsed, Person)
    assert found.message.content == json.dumps(json.loads(found.message.content))


def test_a_schema_as_a_stream(client):
    body = {"type": "json_schema", "json_schema": {"name": "p", "schema": PARAMETERS}}
    parts = [c.choices[0] for c in chat(client, response_format=body, stream=True)]
    text = "".join(part.delta.content or "" for part in parts)
    assert parts[-1].finish_reason == "stop" and json.loads(text)["city"] in ("Rome", "Oslo")


def test_a_schema_beside_tools(client):
    """As the OpenAI Agents SDK sends them. A bias decides between the two."""
    body = {"type": "json_schema", "json_schema": {"name": "p", "schema": PARAMETERS}}
    calls = structured.tokenizer().encode("<")
    asked = dict(tools=TOOLS, response_format=body, logit_bias={str(calls[0]): -100})
    found = chat(client, **asked).choices[0]
    assert found.finish_reason == "stop" and not found.message.tool_calls
    assert json.loads(found.message.content)["city"] in ("Rome", "Oslo")
    asked["logit_bias"] = {str(calls[0]): 100}
    found = chat(client, **asked, parallel_tool_calls=False).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None


def test_any_object(client):
    done = chat(client, response_format={"type": "json_object"}, max_tokens=9)
    text = done.choices[0].message.content
    assert text.startswith("{")
    if done.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (dict(response_format={"type": "regex", "pattern": "(ab|c){3}!"}), "(ab|c){3}!"),
        (dict(structured_outputs={"regex": "[0-9]{4}/a"}), "[0-9]{4}/a"),
        (dict(guided_regex="[xy]{2,3}"), "[xy]{2,3}"),
        (dict(structured_outputs={"choice": ['say "a"', "b\\n"]}), r'say "a"|b\\n'),
        (dict(guided_choice=["left", "right"]), "left|right"),
        (dict(guided_choice=["a|b (c)\n"]), re.escape("a|b (c)\n")),
        (dict(guided_json=json.dumps({"const": [1, "a"]})), r'\[1, "a"\]'),
        (dict(structured_outputs={"json": {"type": "boolean"}}), "true|false"),
    ],
)
def test_regular_expressions_and_choices(client, body, expected):
    done = client.completions.create(
        model="tiny", prompt="hello", max_tokens=30, seed=1, extra_body=body
    )
    assert re.fullmatch(expected, done.choices[0].text)
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_be(client, choice):
    done = chat(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    found = done.choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    (call,) = found.message.tool_calls
    assert call.id.startswith("call_") and call.type == "function"
    if choice != "required":
        assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "clock" else arguments["city"]


@pytest.mark.parametrize(
    ("template", "begin"),
    [
        (structured.TEMPLATE, '{"name": "weather"'),
        (structured.XML_TEMPLATE, "<function=weather>"),
    ],
)
def test_a_call_as_a_stream_equals_the_whole(client, monkeypatch, template, begin):
    """In the form that the chat template teaches."""
    monkeypatch.setattr(structured.tokenizer(), "chat_template", template)
    asked = dict(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    done = chat(client, logprobs=True, **asked).choices[0]
    text = "".join(token.token for token in done.logprobs.content)
    assert text.startswith(f"<tool_call>\n{begin}")
    whole = done.message.tool_calls[0].function
    chunks = [c.choices[0] for c in chat(client, stream=True, **asked)]
    deltas = [call for c in chunks for call in c.delta.tool_calls or []]
    assert deltas[0].id and deltas[0].function.name == whole.name == "weather"
    assert json.loads(whole.arguments)["city"] in ("Rome", "Oslo")
    assert all(d.index == 0 and d.function.name is None for d in deltas[1:])
    assert "".join(d.function.arguments or "" for d in deltas) == whole.arguments
    assert len(deltas) > 2 and chunks[-1].finish_reason == "tool_calls"
    assert not any(c.delta.content for c in chunks)


@pytest.mark.parametrize("template", [structured.TEMPLATE, structured.XML_TEMPLATE])
def test_the_model_is_told_of_tools_and_calls(client, monkeypatch, template):
    """The chat goes on with a call and its result; its prompt has all of them."""
    monkeypatch.setattr(structured.tokenizer(), "chat_template", template)
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    told = [
        *TURN,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    done = chat(client, messages=told, tools=TOOLS, max_tokens=2)
    expected = structured.tokenizer().chat(
        [
            TURN[0],
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": call | {"arguments": {"city": "Rome"}}}
            ]},
            {"role": "tool", "content": "sunny"},
        ],
        tools=TOOLS,
    )  # fmt: skip
    assert done.usage.prompt_tokens == len(expected)
    without = chat(client, messages=told, tools=TOOLS, tool_choice="none", max_tokens=2)
    assert without.usage.prompt_tokens < len(expected) - 100


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("no call", True),
        ("a <tool is no call", True),
        ("Let me see.\n" + CALL, True),
        (CALL + "\n" + CALL.replace("Oslo", "Rome"), True),
        (CALL + " so", False),
        (CALL.replace("Oslo", "Bonn"), False),
        (CALL.replace("weather", "other"), False),
        ("a <tool_call> b", False),
    ],
)
def test_calls_in_free_answers_keep_to_their_schemas(text, fits):
    tools = [Tool("weather", PARAMETERS), Tool("clock", {"type": "object"})]
    grammar = calls_text(JsonCalls, tools, free=True, several=True)
    assert structured.fits(grammar, text, LEAD) == fits


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_calls_are_read_from_any_pieces(step):
    text = "Let me see.\n" + CALL + "\n" + CALL.replace("Oslo", "Rome")
    reader, said, calls = JsonCalls(()), "", []
    for at in range(0, len(text), step):
        more, found = reader.add(text[at : at + step], last=at + step >= len(text))
        assert len({call["index"] for call in found}) == len(found)
        said, calls = said + more, calls + found
    assert said == "Let me see." and reader.count == 2
    found = [call["function"] for call in joined_calls(calls)]
    assert found == [
        {"name": "weather", "arguments": '{"city": "Oslo"}'},
        {"name": "weather", "arguments": '{"city": "Rome"}'},
    ]
    assert len({call["id"] for call in joined_calls(calls)}) == 2


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    ("cut", "arguments", "is_open"),
    [
        ('{"a": {"b": "}"}}}\n</tool_call', '{"a": {"b": "}"}}', False),
        ('{"a": {"b": "}"}}}', '{"a": {"b": "}"}}', False),
        ('{"a": {"b": "}"}}', '{"a": {"b": "}"}}', False),
        ('{"a": {"b": "}"}', '{"a": {"b": "}"}', True),
        ('{"a": {"b": "}', '{"a": {"b": "}', True),
        ("", "", True),
    ],
)
def test_a_call_cut_off_is_complete_if_its_arguments_are(cut, arguments, is_open, step):
    text = f'<tool_call>\n{{"name": "run", "arguments": {cut}'
    reader, calls = JsonCalls(()), []
    for at in range(0, len(text), step):
        calls += reader.add(text[at : at + step])[1]
    said, more = reader.add("", last=True)
    (found,) = joined_calls(calls + more)
    assert (said, found["function"]["arguments"], reader.open) == ("", arguments, is_open)


@pytest.mark.parametrize("begun", ["\n", "\n<tool_", '\n<tool_call>\n{"name'])
def test_a_second_call_that_has_only_begun_is_neither_call_nor_text(begun):
    reader = JsonCalls(())
    said, (call,) = reader.add(CALL + begun, last=True)
    assert (said, call["index"], reader.open) == ("", 0, False)


@pytest.mark.parametrize("text", ["a < b", "ends with <tool_", "x\n"])
def test_what_is_no_call_is_said(text):
    assert JsonCalls(()).add(text, last=True) == (text, [])


def tool(schema, **options):
    own = {"name": "run", "parameters": {"type": "object", "properties": {"a": schema}}}
    return {"type": "function", "function": own | options}


RECORD = {"propertyNames": {"type": "string"}, "additionalProperties": {"type": "string"}}
EITHER = {"oneOf": [{"properties": {name: {"type": "string"}}} for name in "xy"]}
SOME = {"type": "array", "uniqueItems": True, "contains": {"type": "string"}}


@pytest.mark.parametrize("schema", [RECORD, EITHER, SOME, {"not": {}}, {"format": "binary"}])
def test_one_tools_schema_does_not_make_the_others_unusable(schema):
    offered = read_tools(Fields({"tools": [CLOCK, tool(schema)]}, FIELDS), JsonCalls)
    structured.grammars().of(offered.grammar)


REGEX = {"type": "regex"}
REFUSED = [
    (dict(response_format={"type": "xml"}), "response_format.type is 'xml'"),
    (dict(response_format={"type": "json_object", "schema": {}}), "response_format.schema"),
    (dict(response_format=REGEX), "must be a regular expression, not None"),
    (dict(response_format=REGEX | {"pattern": "(?=a)b"}), "look-around"),
    (dict(response_format=REGEX | {"pattern": "("}), "unclosed group"),
    (dict(guided_json={"uniqueItems": True, "type": "array"}), "uniqueItems"),
    (dict(guided_json="{"), "guided_json is not JSON"),
    (dict(guided_json={"type": "a"}), "guided_json cannot be used"),
    (dict(guided_json={"$ref": "http://127.0.0.1:1/a"}), "guided_json cannot be used"),
    (dict(structured_outputs={"regex": "a", "json": {}}), "must have one of"),
    (dict(structured_outputs={"grammar": "a"}), "structured_outputs.grammar"),
    (dict(guided_regex="a", guided_choice=["a"]), "exclude each other"),
    (dict(guided_choice=[]), "list of 1 … 1000 texts"),
    (dict(guided_regex="a", ignore_eos=True), "ignore_eos excludes guided_regex"),
    (dict(guided_regex="a", min_tokens=1), "min_tokens excludes guided_regex"),
    (dict(guided_regex="a", ignore_eos="yes"), "ignore_eos must be true or false"),
    (dict(guided_json=5), "guided_json must be a JSON schema"),
    (dict(response_format="json"), "response_format must be a JSON object"),
    (dict(tools="weather"), "tools must be a list"),
    (dict(tools=TOOLS, tool_choice={"type": "function"}), "tool_choice names None"),
    (dict(tools=TOOLS, guided_regex="a"), "tools exclude guided_regex unless it is JSON"),
    (
        dict(tools=TOOLS, guided_json={"type": "a"}),
        "guided_json cannot be used: failed to compile",
    ),
    (dict(tools=[WEATHER, WEATHER]), "tools has 'weather' twice"),
    (dict(tools=[{"type": "custom"}]), "tools[0].type must be 'function'"),
    (
        dict(tools=[CLOCK, tool(RECORD, strict=True)]),
        "tools[1].function.parameters ('run') cannot be used: failed to compile JSON schema: "
        'Unimplemented keys: ["propertyNames"]; leave out strict, or simplify the schema',
    ),
    (dict(tools=[tool({"pattern": "(?!x)"}), CLOCK]), "tools[0].function.parameters ('run')"),
    (dict(tools=[tool({}, strict=1)]), "strict must be true or false"),
    (dict(tools=TOOLS, tool_choice="any"), "tool_choice is 'any'"),
    (dict(tool_choice="required"), "tools is empty"),
    (
        dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "a"}}),
        "tool_choice names 'a'",
    ),
    (
        dict(
            messages=[
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "a", "arguments": "["}}],
                }
            ]
        ),
        "arguments is not JSON",
    ),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_what_is_refused(port, body, message):
    found = refused(port, body)
    assert message in found and "%json" not in found and " | " not in found


def test_a_template_that_teaches_other_calls_takes_only_calls_that_must_be(port, monkeypatch):
    """As Llama 3's, whose calls are JSON without marks: they would not be found."""
    plain = structured.TEMPLATE.replace("<tool_call>", "JSON")
    monkeypatch.setattr(structured.tokenizer(), "chat_template", plain)
    assert "teaches tool calls without <tool_call>" in refused(port, dict(tools=TOOLS))
    body = dict(messages=TURN, tools=TOOLS, tool_choice="required", max_tokens=2)
    assert servers.post(port, "/v1/chat/completions", json.dumps(body).encode())[0] == 200


def refused(port, body) -> str:
    body = json.dumps(dict(messages=TURN) | body).encode()
    status, text = servers.post(port, "/v1/chat/completions", body)
    assert status == 400, text
    return json.loads(text)["error"]["message"]


def test_an_answer_that_cannot_go_on_is_refused(client):
    """No token of this vocabulary begins the second letter. A retry would not help, so the
    status is not one that clients retry."""
    with pytest.raises(openai.BadRequestError, match="cannot go on"):
        chat(client, extra_body=dict(guided_regex="a€"))
    with pytest.raises(openai.APIError, match="cannot go on") as caught:
        list(chat(client, extra_body=dict(guided_regex="a€"), stream=True))
    assert caught.value.type == "invalid_request_error"


def nested(depth):
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


ALLOF = {
    "allOf": [
        {"anyOf": [{"properties": {f"k{i}{j}": {}}, "required": [f"k{i}{j}"]} for j in "abcd"]}
        for i in range(12)
    ]
}
HOSTILE = {
    "deep": dict(guided_json=nested(2000)),
    "wide": dict(guided_json={"enum": [f"value {i}" for i in range(20000)]}),
    "products": dict(guided_json=ALLOF),
    "circle": dict(guided_json={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "repeats": dict(guided_regex="((a{1000}){1000}){1000}"),
    "parentheses": dict(guided_regex="(" * 5000 + "a" + ")" * 5000),
    "alternatives": dict(guided_regex="|".join(f"w{i}" for i in range(40000))),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_formats_are_refused_in_time(port, body):
    began = time.monotonic()
    refused(port, body)
    assert time.monotonic() - began < 60  # not minutes
