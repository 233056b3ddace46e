"""The engine serves hybrids: states are placed, moved and left alone as caches are."""

import pytest

from jaxspec.api import generate
from jaxspec.decoding.schedule import Fixed
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.engine import Engine
from tests import tiny
from tests.serving.engines import LOOKUP, drain, requests, tokens


@pytest.mark.slow
def test_every_request_gets_what_it_would_get_alone():
    target, asked = tiny.target(tiny.HYBRID), requests(5)
    config = EngineConfig(slots=2, room=60, chunk=16, schedule=Fixed())
    engine = Engine(target, LOOKUP, config)
    ids = [engine.submit(request) for request in asked]  # more than slots: rows are reused
    updates = drain(engine)
    alone = generate(
        target,
        [list(request.prompt) for request in asked],
        max_new_tokens=max(request.max_new_tokens for request in asked),
        sampling=[request.sampling for request in asked],
        seed=[request.seed for request in asked],
        capacity=256,
    )
    for id, request, completion in zip(ids, asked, alone, strict=True):
        assert tokens(updates[id]) == tuple(completion.token_ids[: request.max_new_tokens])
