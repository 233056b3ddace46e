"""Answers to watch: what the events say is what was decoded."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.api import generate
from jaxspec.decoding.sampling import Sampling
from jaxspec.drafters.joined import with_lookup
from jaxspec.models.target import Target
from jaxspec.serving.access import Access
from jaxspec.serving.connections import Limits
from jaxspec.serving.fields import BadRequest
from jaxspec.serving.page import policy, read_watch
from jaxspec.serving.watching import Watcher, paths
from jaxspec.trees.tree import DraftTree
from tests import tiny
from tests.serving import engines, servers

PROMPT = [1, 2, 3, 1, 2]


@pytest.fixture(scope="module")
def target():
    model = tiny.target()
    return Target("tiny", model.config, model.params, servers.tokenizer())


@pytest.fixture(scope="module")
def watcher(target):
    return Watcher(target, with_lookup(engines.DRAFTERS["small tree"]), room=200)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rounds_are_those_of_the_answer(target, watcher, temperature):
    sampling = Sampling(temperature=temperature, stop_ids=())
    options = dict(max_new_tokens=40, sampling=sampling)
    start, *rounds, end = watcher.events(PROMPT, seed=3, **options)
    (plain,) = generate(target, [PROMPT], seed=[3], **options)
    decided = [start["token"], *(token for one in rounds for token in one["decided"])]
    assert "".join(token["text"] for token in decided) + end["rest"] == plain.text
    assert end["tokens"] == len(decided) == 40 and end["rounds"] == len(rounds) < 39
    assert all(one["ms"] > 0 for one in rounds)
    timed = [one["plain_ms"] is not None for one in rounds]
    assert timed == [i % 2 == 0 for i in range(len(rounds))]
    for one in rounds:
        nodes = {node["index"]: node for node in one["nodes"]}
        assert nodes[0]["parent"] is None and nodes[0]["accepted"]
        assert all(node["parent"] in nodes for i, node in nodes.items() if i)
        path = [i for i, node in nodes.items() if node["accepted"]]
        assert [nodes[i]["parent"] for i in path[1:]] == path[:-1]
        sources = [nodes[i]["source"] for i in path[1:]] + ["target"]
        assert [token["source"] for token in one["decided"]] == sources[: len(one["decided"])]
    assert {node["source"] for one in rounds for node in one["nodes"]} >= {"drafter", "lookup"}


def test_paths_are_the_tokens_from_the_root():
    tree = DraftTree(
        tokens=jnp.array([[5, 7, 8, 0, 7]]),
        parents=jnp.array([[-1, 0, 1, -1, 2]]),
        depths=jnp.array([[0, 1, 2, 0, 3]]),
        scores=jnp.zeros((1, 5)),
        valid=jnp.array([[True, True, True, False, True]]),
    )
    found = paths(DraftTree(*(np.asarray(x) for x in vars(tree).values())))
    assert found == {0: (5,), 1: (5, 7), 2: (5, 7, 8), 4: (5, 7, 8, 7)}


def test_an_answer_without_room_is_refused(watcher):
    with pytest.raises(ValueError, match="a prompt of 5 tokens and 196 new ones exceed"):
        watcher.events(PROMPT, max_new_tokens=196, sampling=Sampling())


@pytest.mark.parametrize(
    "body, message",
    [
        ([], "the body must be a JSON object"),
        ({"prompt": 3}, "prompt must be a text, not 3"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens must be an integer, not True"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; expected 1 … 512"),
        ({"prompt": "a", "max_tokens": 513}, "max_tokens is 513; expected 1 … 512"),
        ({"prompt": "a", "temperature": 10**400}, "temperature is too large"),
        ({"prompt": "a", "stream": True}, "unknown field 'stream'"),
    ],
)
def test_bodies_that_are_refused(body, message):
    with pytest.raises(BadRequest, match=message):
        read_watch(body)


def test_fields_that_are_null_are_left_out():
    found = read_watch({"prompt": "a", "max_tokens": None, "temperature": None, "seed": None})
    assert found == read_watch({"prompt": "a"})


def body(**fields):
    return json.dumps({"prompt": "abcab", "max_tokens": 20} | fields).encode()


@pytest.fixture(scope="module")
def server(target):
    again = Watcher(target, engines.LOOKUP, room=200)  # compiles what the server's own runs
    list(again.events(PROMPT, max_new_tokens=2, sampling=Sampling()))
    with servers.serve(limits=Limits()) as (port, runner):
        yield port


def test_events_over_http(server):
    status, text = servers.post(server, "/watch", body())
    *lines, end, empty = text.split("\n\n")
    assert (status, end, empty) == (200, "data: [DONE]", "")
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [event["kind"] for event in events[:2]] == ["start", "round"]
    assert events[-1]["kind"] == "end" and events[-1]["tokens"] <= 20
    status, text = servers.post(server, "/watch", body(temperature=-1))
    assert status == 400 and "temperature" in text
    status, text = servers.post(server, "/watch", b"{}")
    assert status == 400 and "the prompt is empty; expected some text" in text


def test_one_watches_at_a_time_until_it_has_gone(server):
    head = f"POST /watch HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body())}\r\n"
    one = servers.connect(server)
    one.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body())
    assert one.recv(15) == b"HTTP/1.1 200 OK"
    one.close()
    statuses = []
    while not statuses or statuses[-1] == 429:
        statuses.append(servers.post(server, "/watch", body())[0])
        assert len(statuses) < 1000
    assert statuses[-1] == 200


def test_a_watched_answer_ends_with_the_drain(monkeypatch):
    begun = threading.Event()

    def endless(*_, **__):
        while True:
            begun.set()
            yield {"kind": "round"}
            time.sleep(0.02)

    monkeypatch.setattr(Watcher, "events", endless)
    with ThreadPoolExecutor(1) as threads:
        with servers.serve(limits=Limits(), drain_seconds=0.2) as (port, _):
            asked = threads.submit(servers.post, port, "/watch", body())
            assert begun.wait(10)
        status, text = asked.result()
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    assert "the engine has stopped" in text


def test_the_page_is_whole_and_runs_nothing_else(server):
    status, html = servers.get(server, "/")
    assert status == 200 and len(html) < 20_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)  # no other file
    assert " style=" not in html and not re.findall(r"\son\w+=", html)  # nor what CSP forbids
    assert "innerHTML" not in html
    found = policy(html)
    assert found.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in found and "'self'" in found
    assert policy(html.replace("color", "colour")) != found


def test_who_is_shown_the_page():
    with servers.serve(limits=Limits(), access=Access("secret")) as (port, _):
        assert servers.get(port, "/")[0] == 200  # it asks for the key
        assert servers.post(port, "/watch", body())[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert servers.post(port, "/watch", body(), headers=key)[0] == 200
