"""Structured answers of the real small target: constrained plain decoding's tokens, with the
shipped drafter and lookup; and what the grammar costs and gains."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

import jaxspec
from jaxspec.data.prompts import read_prompts
from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Adaptive, Fixed
from jaxspec.drafters.plain import PLAIN
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.formats import json_text
from jaxspec.serving.grammars import Grammars
from jaxspec.serving.requests import Request
from tests.serving import engines

pytestmark = [pytest.mark.gate, pytest.mark.real]
EXAMPLE = Path(__file__).parents[2] / "examples/structured"
SCHEMA = json.loads((EXAMPLE / "person.schema.json").read_text())
QUESTIONS = read_prompts(EXAMPLE / "questions.jsonl")[:2]


def engine(target, drafter, schedule):
    config = EngineConfig(slots=2, room=512, schedule=schedule, throughput=True)
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
    free = [Request(r.prompt, r.max_new_tokens, r.sampling, r.seed) for r in asked]
    drafter = jaxspec.load_drafter("shipped+ngram", smollm2, nodes=8)
    plain = engine(smollm2, PLAIN, Fixed())
    expected, _, speed = run(plain, asked)
    print(f"\nplain: {speed:.1f} tokens/s with a schema, {run(plain, free)[2]:.1f} without")
    for schedule in (Fixed(), Adaptive()):
        made = engine(smollm2, drafter, schedule)
        tokens, tau, speed = run(made, asked)
        assert tokens == expected
        _, free_tau, free_speed = run(made, free)
        print(
            f"{type(schedule).__name__}: {speed:.1f} tokens/s at {tau:.2f} tokens a round with "
            f"a schema, {free_speed:.1f} at {free_tau:.2f} without"
        )
        assert tau > 1.5
    for row in expected:
        text = smollm2.tokenizer.decode(row)
        if row[-1] in smollm2.config.eos_token_ids:
            assert set(json.loads(text)) == set(SCHEMA["required"])
