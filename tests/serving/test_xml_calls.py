"""Qwen3-Coder's form of tool calls: the grammar, and the arguments read from answers."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.serving.calls import LEAD, Tool, calls_text, joined_calls
from jaxspec.serving.fields import BadRequest
from jaxspec.serving.xml_calls import XmlCalls
from tests.serving import structured

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"$ref": "#/$defs/Days"},
        "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        "stops": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 14}},
}
TOOLS = [Tool("weather", SCHEMA), Tool("clock", {"type": "object", "properties": {}})]
WHOLE = """<tool_call>
<function=weather>
<parameter=city>
New "York"

of </parameter> \\
</parameter>
<parameter=days>
3
</parameter>
<parameter=unit>
null
</parameter>
<parameter=stops>
["a", "b"]
</parameter>
</function>
</tool_call>"""
ARGUMENTS = {
    "city": 'New "York"\n\nof </parameter> \\',
    "days": 3,
    "unit": None,
    "stops": ["a", "b"],
}


def call(name: str = "weather", **arguments: str) -> str:
    """A call, from the texts of its values."""
    parts = [f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in arguments.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


def read(tool: Tool, text: str) -> dict:
    """The arguments of an answer with one call."""
    (found,) = joined_calls(XmlCalls([tool]).add(text, last=True)[1])
    return json.loads(found["function"]["arguments"])


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("no call", True),
        (WHOLE, True),
        ("Let me see.\n\n" + call(city="Rome"), True),
        (call(city="Rome") + "\n" + call("clock") + "\n" + call(city=""), True),
        (call("clock", any="1", other="a\nb"), True),
        (call(city="Rome", days="14", unit="F"), True),
        (call(city="Rome", days="15"), False),
        (call(city="Rome", unit="K"), False),
        (call(city="Rome", stops="a"), False),
        (call(city="Rome", other="a"), False),
        (call(days="1"), False),
        (call(days="1", city="Rome"), False),
        (call("other"), False),
        (call(city="Rome") + " so", False),
        (call(city="Rome\n</parameter> so"), False),
        (call(city="Rome").replace("\n</function>", "</function>"), False),
    ],
)
def test_answers_keep_to_the_form(text, fits):
    grammar = calls_text(XmlCalls, TOOLS, free=True, several=True)
    assert structured.fits(grammar, text, LEAD) == fits


ANSWER = f"See <tool:\n\n{WHOLE}\n{call('clock')}\n{call('clock', a='1', b='x')}"


@given(st.sets(st.integers(1, len(ANSWER) - 1)))
@settings(max_examples=60, deadline=None)
def test_calls_are_read_from_any_pieces(cuts):
    reader, said, calls = XmlCalls(TOOLS), "", []
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(ANSWER)]):
        more, found = reader.add(ANSWER[begin:end], last=end == len(ANSWER))
        assert len({part["index"] for part in found}) == len(found)
        said, calls = said + more, calls + found
    assert said == "See <tool:" and reader.count == 3
    found = [each["function"] for each in joined_calls(calls)]
    assert [each["name"] for each in found] == ["weather", "clock", "clock"]
    read = [json.loads(each["arguments"]) for each in found]
    assert read == [ARGUMENTS, {}, {"a": 1, "b": "x"}]


@given(st.text('a3 \n</>"\\é\0'))
@settings(max_examples=60, deadline=None)
def test_a_string_is_read_as_it_is_written(text):
    assert read(TOOLS[0], call(city=text)) == {"city": text}


def test_an_argument_is_streamed_when_it_is_complete():
    reader = XmlCalls(TOOLS)
    _, (head,) = reader.add("<tool_call>\n<function=weather>\n<parameter=city>\nRome\n")
    assert head["function"] == {"name": "weather", "arguments": ""}
    _, (part,) = reader.add("</parameter>\n<parameter=days>\n1")
    assert part == {"index": 0, "function": {"arguments": '{"city": "Rome"'}}
    _, (part,) = reader.add("2\n</parameter>\n")
    assert part["function"] == {"arguments": ', "days": 12'}
    _, (part,) = reader.add("</function>\n</tool_call>")
    assert part["function"] == {"arguments": "}"}


@pytest.mark.parametrize(
    ("cut", "arguments", "is_open"),
    [
        ("\n</function>\n</tool", '{"city": "Rome"}', False),
        ("\n</", '{"city": "Rome"}', False),
        ("\n<", '{"city": "Rome"', True),  # another argument may come
        ("\n<parameter=days>\n1", '{"city": "Rome"', True),
        ("", "", True),
    ],
)
def test_a_call_cut_off_is_complete_if_its_arguments_are(cut, arguments, is_open):
    reader = XmlCalls(TOOLS)
    text = f"<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>{cut}"
    (found,) = joined_calls(reader.add(text)[1] + reader.add("", last=True)[1])
    assert (found["function"]["arguments"], reader.open) == (arguments, is_open)


def test_a_name_that_is_no_tool_is_a_call_with_any_parameters():
    assert read(TOOLS[0], call("other", a="1", b="x")) == {"a": 1, "b": "x"}


ANY_OF = {"anyOf": [{"type": "string", "minLength": 2}, {"type": "null"}]}
REFERRED = {"$ref": "#/$defs/Kind", "description": "…"}
CIRCLE = {"$ref": "#/$defs/Circle"}
NODE = {"$ref": "#/$defs/Node"}
DEFS = {
    "Kind": {"enum": ["a", "1", 1, None], "type": ["string", "null"]},
    "Circle": {"anyOf": [{"$ref": "#/$defs/Circle"}, {"type": "string"}]},
    "Node": {
        "type": "object",
        "properties": {"of": {"$ref": "#/$defs/Node"}},
        "additionalProperties": False,
    },
    "Whole": {"type": "object", "properties": {"key": {"$ref": "#/properties/key"}}},
}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "string"}, {"": "", "3": "3", '"a"': '"a"', "null": "null", "a\n": "a\n"}),
        ({"type": "string", "pattern": "^a$"}, {"b": "b"}),
        ({"const": "a b"}, {"a b": "a b", "a": ...}),
        ({"enum": ["a", "a\nb", 2]}, {"a": "a", "a\nb": "a\nb", "2": 2, "3": ...}),
        ({"enum": ["a\n</parameter>"]}, {'"a\\n</parameter>"': "a\n</parameter>", "a": ...}),
        (ANY_OF, {"null": None, "nul": "nul", "": ""}),
        (REFERRED, {"a": "a", "1": "1", "null": None, "b": ...}),
        (CIRCLE, {"3": "3"}),
        ({"type": ["string", "integer"]}, {"3": 3, "3 m": "3 m", "3.5": "3.5"}),
        ({"type": ["string", "boolean"]}, {"true": True, "True": "True"}),
        ({}, {"[1]": [1], "[1": "[1", "NaN": "NaN", '"a"': '"a"', "null": None}),
        (True, {"a": "a", "3": 3}),
        (
            {"type": ["string", "integer"], "minimum": 3},
            {'"a"': "a", "3": 3, "2": ..., "a": ...},
        ),
        ({"type": "integer"}, {"3": 3, "a": ..., '"3"': ...}),
        ({"type": "boolean"}, {"true": True, "yes": ...}),
        ({"enum": [1, 2]}, {"2": 2, "3": ...}),
        (NODE, {'{"of": {"of": {}}}': {"of": {"of": {}}}, '{"of": 1}': ...}),
    ],
)
def test_values(schema, values):
    """What a text is read as; `...`: it is not allowed."""
    tool = Tool("run", {"type": "object", "properties": {"key": schema}, "$defs": DEFS})
    grammar = calls_text(XmlCalls, [tool], free=False, several=False)
    for text, value in values.items():
        answer = call("run", key=text)
        if value is not ...:
            assert read(tool, answer) == {"key": value}
        assert structured.fits(grammar, answer) == (value is not ...)


def properties(**schemas):
    return {"type": "object", "properties": schemas}


@pytest.mark.parametrize(
    ("schema", "strict", "message"),
    [
        (properties(**{"a>b": {}}), False, "cannot name the parameter 'a>b'; expected a name"),
        (properties(**{"a\nb": {}}), False, "cannot name the parameter"),
        (properties(**{"": {}}), False, "cannot name the parameter ''"),
        (properties(a=3), False, "the schema of 'a' must be an object"),
        (properties(a=False) | {"required": ["a"]}, False, "the schema of 'a' must be"),
        ({"properties": []}, False, "properties must be an object"),
        ({"required": [1]}, False, "required a list of texts"),
        ({"$ref": "#/$defs/None"}, False, r"ignore \$ref; simplify the schema"),
        ({"minProperties": 1}, True, "ignore minProperties; leave out strict, or simplify"),
    ],
)
def test_what_cannot_be_written_is_refused(schema, strict, message):
    tool = Tool("run", schema, strict, "tools[3]")
    with pytest.raises(BadRequest, match=message) as caught:
        calls_text(XmlCalls, [tool], free=True, several=True)
    assert str(caught.value).startswith("tools[3].function.parameters ('run') cannot be used")


def test_a_schema_may_be_behind_a_reference():
    schema = {"$id": "a:b", "$ref": "#/$defs/Run", "$defs": {"Run": properties(a=NODE)} | DEFS}
    grammar = calls_text(XmlCalls, [Tool("run", schema)], free=False, several=False)
    assert structured.fits(grammar, call("run", a='{"of": {}}'))
    assert not structured.fits(grammar, call("run", a="3"))


def test_strings_of_strict_tools_keep_to_all_keywords():
    short = {"type": "string", "maxLength": 2}
    texts = ["ab", '"ab"', '"abc"']
    for strict, expected in ((False, [True, True, True]), (True, [False, True, False])):
        tool = Tool("run", properties(a=short), strict)
        grammar = calls_text(XmlCalls, [tool], free=False, several=False)
        assert [structured.fits(grammar, call("run", a=text)) for text in texts] == expected
    assert read(tool, call("run", a='"ab"')) == {"a": "ab"}


def test_optional_values_that_nothing_matches_are_left_out():
    tool = Tool("run", properties(a=False, b={"type": "string"}))
    grammar = calls_text(XmlCalls, [tool], free=False, several=False)
    assert structured.fits(grammar, call("run", b="x"))
    assert not structured.fits(grammar, call("run", a="x"))
