"""Structured answers of the real small target: constrained plain decoding's tokens, with the
shipped drafter and lookup; and what the grammar costs and gains."""

import json
import time

import numpy as np
import pytest

import jaxspec
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Fixed
from jaxspec.drafters.plain import PLAIN
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.formats import json_text
from jaxspec.serving.grammars import Grammars
from jaxspec.serving.requests import Request
from tests.serving import engines

pytestmark = [pytest.mark.gate, pytest.mark.real]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "hobbies", "address"],
    "additionalProperties": False,
}
QUESTIONS = (
    "Invent a person with name, age, hobbies and address, as JSON.",
    "Give me the data of a retired sailor who lives in Lisbon, as JSON.",
)


def engine(target, drafter):
    config = EngineConfig(slots=2, room=512, schedule=Fixed(), throughput=True)
    made = Engine(target, drafter, config)
    made.warm_up()
    return made


def run(engine, requests):
    """Tokens, tokens a round and tokens a second, once compiled."""
    for request in requests[:1]:
        engine.submit(request)
        engines.drain(engine)
    began = time.perf_counter()
    ids = [engine.submit(request) for request in requests]
    found = engines.drain(engine, steps=4000)
    seconds = time.perf_counter() - began
    stats = [found[id][-1].stats for id in ids]
    tokens = [engines.tokens(found[id]) for id in ids]
    return tokens, np.mean([s.tau for s in stats]), sum(map(len, tokens)) / seconds


def test_json_with_the_shipped_drafter(smollm2):
    grammar = Grammars(smollm2.tokenizer, smollm2.config).of(json_text(SCHEMA, ""))
    prompts = [tuple(smollm2.tokenizer.chat(question)) for question in QUESTIONS]
    asked = [
        Request(prompt, 160, Sampling(temperature=temperature), seed, grammar=grammar)
        for seed, prompt in enumerate(prompts)
        for temperature in (0.0, 0.7)
    ]
    drafter = jaxspec.load_drafter("shipped+ngram", smollm2, nodes=8)
    made = engine(smollm2, drafter)
    tokens, tau, speed = run(made, asked)
    expected, _, plain_speed = run(engine(smollm2, PLAIN), asked)
    assert tokens == expected
    for row in tokens:
        text = smollm2.tokenizer.decode(row)
        if row[-1] in smollm2.config.eos_token_ids:
            assert set(json.loads(text)) == set(SCHEMA["required"])
    free = [Request(r.prompt, r.max_new_tokens, r.sampling, r.seed) for r in asked]
    _, free_tau, free_speed = run(made, free)
    print(
        f"\nJSON: {tau:.2f} tokens a round, {speed:.1f} tokens/s, plain {plain_speed:.1f}; "
        f"without a grammar {free_tau:.2f}, {free_speed:.1f}"
    )
    assert tau > 1.5
