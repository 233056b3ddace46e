"""A tiny target whose tokens can write JSON, and grammars of them."""

from __future__ import annotations

import dataclasses
import functools

from jaxspec.models.target import Target
from jaxspec.serving.grammars import Grammars, Lead
from jaxspec.tokenizer import Tokenizer
from tests import tiny

PAIRS = ['{"', '":', '",', '"}', "to", "ol"]
LETTERS = [chr(c) for c in range(33, 127)]
VOCABULARY = ["<end>", "<start>", *LETTERS, "Ġ", "Ċ", *PAIRS, "tool", "Ã", "©"]
MERGES = [f"{pair[0]} {pair[1]}" for pair in PAIRS] + ["to ol"]
# Qwen3's, as far as tools go.
TEMPLATE = (
    "{% if enable_thinking is defined and not enable_thinking %}(no thoughts){% endif %}"
    "{% if tools %}{{ tools | tojson }} in <tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)
# Qwen3-Coder's, as far as tools go.
XML_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} in <tool_call>\n<function=name>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or () %}"
    "\n<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for key, value in c.function.arguments | items %}"
    "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}\n{% endfor %}"
)
CONFIG = dataclasses.replace(
    tiny.QWEN3, vocab_size=len(VOCABULARY), eos_token_ids=(0,), max_positions=1024
)
SERVER = dict(room=900, chunk=32, slots=1)  # of an engine: its programs are compiled once


@functools.cache
def tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer.from_bpe(VOCABULARY, MERGES, special=[0, 1], eos=0, chat_template=template)


@functools.cache
def target() -> Target:
    model = tiny.target(CONFIG, seed=1)
    return Target("tiny", model.config, model.params, tokenizer())


@functools.cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), CONFIG)


def fits(grammar: str, text: str, lead: Lead | None = None) -> bool:
    """Whether an answer may be this text."""
    matcher = grammars().of(grammar, lead).matcher()
    for token in [*tokenizer().encode(text), 0]:
        if not matcher.allowed[token // 32] >> (token % 32) & 1:
            return False
        matcher.advance([token])
    return True
