"""A thousand mixed requests, with grammars, tools and all else that may be asked for: each gets
what plain decoding gives it alone."""

import random

import pytest

from jaxspec.config import TreeConfig
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.base import LoadedDrafter
from jaxspec.drafters.joined import with_lookup
from jaxspec.drafters.plain import PLAIN
from jaxspec.drafters.small_model import SmallModel
from jaxspec.serving.calls import LEAD, Tool, calls_text
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from jaxspec.serving.formats import json_text, regex_text
from jaxspec.serving.json_calls import JsonCalls
from jaxspec.serving.requests import Request
from jaxspec.serving.xml_calls import XmlCalls
from tests.serving import engines, test_leads
from tests.serving.soaks import check_soak
from tests.serving.structured import CONFIG, grammars, target, tokenizer

COUNT = 1000
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}}
TOOLS = Tool("see", SCHEMA), Tool("go", SCHEMA)
LIMITS = dict(room=160, chunk=16, queue=64, top_logprobs=5)
SYSTEM = "system: answer in JSON, call a tool where you need one, be brief\n"


def drafter() -> LoadedDrafter:
    own = SmallModel(CONFIG, TreeConfig("top_budget", size=12), depth=4)
    return with_lookup(LoadedDrafter(own, target().params))


def asked(dice: random.Random) -> list[Request]:
    """Chat turns behind one system prompt, and prompts of their own."""
    parse = grammars().of
    known = [
        parse(json_text(SCHEMA, "")),
        parse(json_text({"type": "object"}, "")),
        parse(regex_text("(ab|cd){2,9}[0-9]*!")),
        parse(calls_text(JsonCalls, TOOLS, free=False, several=True)),
        parse(calls_text(JsonCalls, TOOLS[:1], free=True, several=False), LEAD),
        parse(calls_text(XmlCalls, TOOLS, free=False, several=True)),
        test_leads.grammar(may_end=True),
        test_leads.grammar(may_end=False),
    ]
    made = []
    for i in range(COUNT):
        text = SYSTEM if dice.random() < 0.6 else ""
        text += "".join(
            f"user: {dice.randint(0, 99)} tools\n" for _ in range(dice.randint(1, 3))
        )
        penalised = dice.random() < 0.3
        sampling = Sampling(
            temperature=dice.choice([0.0, 0.0, 0.7, 1.3]),
            top_p=dice.choice([1.0, 0.9]),
            presence_penalty=0.7 if penalised else 0.0,
            repetition_penalty=dice.choice([1.0, 1.3]) if penalised else 1.0,
            logit_bias=dice.choice([(), ((40, 2.5),)]) if penalised else (),
        )
        logprobs = dice.choice([None, None, 0, 3])
        grammar = dice.choice(known) if dice.random() < 0.5 else None
        made.append(
            Request(
                tuple(tokenizer().encode(text)),
                dice.randint(1, 40),
                sampling,
                seed=i,
                logprobs=logprobs,
                prompt_logprobs=logprobs is not None and dice.random() < 0.3,
                grammar=grammar,
            )
        )
    return made


@pytest.mark.gate
def test_a_thousand_mixed_requests():
    dice = random.Random(1)
    requests = asked(dice)
    config = EngineConfig(slots=4, max_nodes=16, prefix_cache_mb=1.0, **LIMITS)
    engine = Engine(target(), drafter(), config)
    engine = Engine(target(), drafter(), config, curve=engines.staircase(engine))
    engine.warm_up()
    plain = Engine(target(), PLAIN, EngineConfig(slots=1, **LIMITS))

    def alone(request):
        plain.submit(request)
        (updates,) = engines.drain(plain).values()
        return engines.tokens(updates)

    check_soak(engine, requests, dice, alone)
