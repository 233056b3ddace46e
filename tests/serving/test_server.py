"""The server over real sockets: the `openai` client, bad bodies, clients that misbehave."""

import asyncio
import json
import re
import threading
import time

import openai
import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from jaxspec.decoding.sampling import Sampling
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.connections import Limits, timed_protocol
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import Request
from jaxspec.serving.runner import Runner
from jaxspec.serving.server import application
from tests import tiny
from tests.serving import servers
from tests.serving.engines import alone
from tests.serving.servers import connect, exchange, get, post, read_all, sample

LIMITS = Limits(
    body_bytes=20_000, request_seconds=0.6, stall_seconds=0.6, idle_seconds=2, connections=40
)


@pytest.fixture(scope="module")
def tokenizer():
    return servers.tokenizer()


@pytest.fixture(scope="module")
def running():
    """A server on a free port: (port, runner)."""
    with servers.serve(limits=LIMITS) as found:
        yield found
    assert not found[1].healthy


@pytest.fixture
def port(running):
    """Nothing is left of a test's requests after it."""
    port, runner = running
    yield port
    servers.await_idle(runner)
    assert runner.healthy


@pytest.fixture
def client(port):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


def expected(tokenizer, prompt: str, **options) -> str:
    request = Request(tuple(tokenizer.encode(prompt)), **options)
    return tokenizer.decode(alone(request))


def test_completion(client, tokenizer):
    done = client.completions.create(
        model="tiny", prompt="abcab", max_tokens=12, temperature=0.8, seed=5
    )
    sampling = Sampling(temperature=0.8)
    text = expected(tokenizer, "abcab", max_new_tokens=12, sampling=sampling, seed=5)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 12)
    counts = done.usage.model_extra["speculation"]
    assert counts["rounds"] >= 1 and counts["nodes_verified"] >= counts["rounds"]


def test_completion_of_token_ids(client, tokenizer):
    done = client.completions.create(
        model="tiny", prompt=[1, 2, 3], max_tokens=5, temperature=0
    )
    assert done.choices[0].text == tokenizer.decode(alone(Request((1, 2, 3), 5)))


def test_chat(client, tokenizer):
    messages = [{"role": "system", "content": "ab"}, {"role": "user", "content": "cab"}]
    done = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, temperature=0
    )
    (choice,) = done.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected(tokenizer, "abcab", max_new_tokens=9)
    assert done.usage.total_tokens == 14


@pytest.mark.parametrize("chat", [False, True])
def test_stream(client, tokenizer, chat):
    options = dict(
        model="tiny",
        max_tokens=20,
        temperature=0.8,
        seed=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    if chat:
        messages = [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]
        chunks = list(client.chat.completions.create(messages=messages, **options))
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert chunks[0].choices[0].delta.role == "assistant"
    else:
        chunks = list(client.completions.create(prompt="abc", **options))
        pieces = [c.choices[0].text for c in chunks if c.choices]
    sampling = Sampling(temperature=0.8)
    assert "".join(pieces) == expected(
        tokenizer, "abc", max_new_tokens=20, sampling=sampling, seed=9
    )
    assert len(pieces) > 4
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert chunks[-1].usage.completion_tokens == 20 and not chunks[-1].choices


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts(client, tokenizer, stream):
    sampling = Sampling(temperature=1.5)
    whole = expected(tokenizer, "abc", max_new_tokens=40, sampling=sampling, seed=1)
    stop = whole[5:7]
    done = client.completions.create(
        model="tiny", prompt="abc", max_tokens=40, temperature=1.5, seed=1, stop=[stop, "zz"],
        stream=stream,
    )  # fmt: skip
    chunks = list(done) if stream else [done]
    assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models_health_and_metrics(client, port):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert json.loads(get(port, "/health")[1]) == {
        "status": "ok",
        "running": 0,
        "waiting": 0,
    }
    before = sample(port, "jaxspec_tokens_total")
    client.completions.create(model="tiny", prompt="abc", max_tokens=7)
    assert sample(port, "jaxspec_tokens_total") - before == 7
    assert sample(port, "jaxspec_first_token_seconds_count") >= 1
    assert sample(port, "jaxspec_burst_seconds") > 0
    assert sample(port, "jaxspec_rounds_total") <= sample(port, "jaxspec_nodes_verified_total")
    assert get(port, "/nothing")[0] == 404


CHAT = {"messages": [{"role": "user", "content": "a"}]}
BAD = [
    ({"prompt": "a", "model": "other"}, 404, "model 'other' is not here"),
    ({"prompt": ""}, 400, "prompt is empty"),
    ({"prompt": ["a", 1]}, 400, "prompt must be a text, token ids, or a list of either"),
    ({"prompt": []}, 400, "prompt must be a text, token ids"),
    ({"prompt": [1, 99]}, 400, "token id 99"),
    ({"prompt": {"a": 1}}, 400, "prompt must be a text, token ids"),
    ({"prompt": "a", "n": 0}, 400, "n is 0; expected 1 … 128"),
    ({"prompt": "a", "n": 7}, 400, "asks for 7 answers; this server takes up to 6"),
    ({"prompt": "a", "best_of": 2}, 400, "best_of = 2 is not supported"),
    ({"prompt": "a", "colour": 1}, 400, "unknown field 'colour'"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature must be a number"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
    ({"prompt": "a", "temperature": float("nan")}, 400, "temperature is nan"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0; expected"),
    ({"prompt": "a", "max_completion_tokens": -2}, 400, "max_completion_tokens is -2"),
    ({"prompt": "a", "max_tokens": 1e9}, 400, "must be an integer"),
    ({"prompt": "a", "max_tokens": 10**9}, 400, "max_tokens is 1000000000; expected 1 … 59"),
    ({"prompt": "a" * 100}, 400, "the prompt has 100 and leaves none for an answer"),
    ({"messages": [{"role": "user", "content": "a" * 60}]}, 400, "the prompt has 60 and"),
    ({"prompt": "a", "stop": ["x"] * 65}, 400, "stop must be up to 64"),
    ({"prompt": "a", "stream": 1}, 400, "stream must be true or false"),
    ({"prompt": "a", "seed": 1.5}, 400, "seed must be an integer, not 1.5"),
    ({"prompt": "a", "top_p": 2}, 400, "top_p is 2.0; expected more than 0"),
    ({"prompt": "a", "stop_token_ids": [99]}, 400, "stop_ids has 99"),
    ({"prompt": "a", "stop_token_ids": [True]}, 400, "must be a list of token ids"),
    ({"prompt": "a", "n": True}, 400, "n must be an integer, not True"),
    ({"prompt": "a", "logprobs": True}, 400, "logprobs must be an integer, not True"),
    ({"prompt": "a", "logprobs": 6}, 400, "logprobs is 6; expected 0 … 5"),
    ({"prompt": "a", "logprobs": -1}, 400, "logprobs is -1; expected 0 … 5"),
    ({"prompt": "a", "top_logprobs": 2}, 400, "top_logprobs = 2 is not supported"),
    ({"prompt": "a", "echo": 0}, 400, "echo must be true or false, not 0"),
    ({"prompt": "a", "echo": True, "max_tokens": -2}, 400, "expected 0 … 59"),
    ({"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty is 0.0; expected a"),
    ({"prompt": "a", "frequency_penalty": False}, 400, "frequency_penalty must be a number"),
    ({"prompt": "a", "presence_penalty": -2.5}, 400, "presence_penalty is -2.5; expected -2"),
    ({"prompt": "a", "frequency_penalty": float("nan")}, 400, "frequency_penalty is nan"),
    ({"prompt": "a", "min_tokens": -1}, 400, "min_tokens is -1; expected at least 0"),
    ({"prompt": "a", "min_tokens": 17}, 400, "min_tokens is 17; expected at most the maximum"),
    ({"prompt": "a", "logit_bias": [1]}, 400, "logit_bias must be a JSON object"),
    ({"prompt": "a", "logit_bias": {"a": 1}}, 400, "logit_bias has 'a': 1; expected numbers"),
    ({"prompt": "a", "logit_bias": {"1": "2"}}, 400, "logit_bias has '1': '2'"),
    ({"prompt": "a", "logit_bias": {"11": 1}}, 400, "logit_bias has token id 11; the"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, 400, "expected -100 … 100 for every token"),
    ({"prompt": "a", "logit_bias": {"1": float("nan")}}, 400, "expected -100 … 100"),
    ({"prompt": "a", "stream_options": {"include_usage": "no"}}, 400, "must be true or false"),
    ({"prompt": "a", "stream_options": {"a": 1}}, 400, "unknown field 'stream_options.a'"),
    ({"prompt": "a", "cache_salt": 5}, 400, "cache_salt must be a text, not 5"),
    ({"prompt": "a", "stream_options": []}, 400, "stream_options must be a JSON object"),
    (
        {**CHAT, "chat_template_kwargs": {"enable_thinking": "false"}},
        400,
        "chat_template_kwargs.enable_thinking must be true or false, not 'false'",
    ),
    ({**CHAT, "logprobs": 1}, 400, "logprobs must be true or false, not 1"),
    ({**CHAT, "top_logprobs": 2}, 400, "top_logprobs needs logprobs to be true"),
    ({**CHAT, "logprobs": True, "top_logprobs": 6}, 400, "top_logprobs is 6; expected 0 … 5"),
    ({**CHAT, "echo": True}, 400, "echo = True is not supported"),
    ({**CHAT, "chat_template_kwargs": {"colour": 1}}, 400, "chat_template_kwargs.colour"),
    (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
        400,
        "messages[0].tool_calls[0].function must have a name",
    ),
    (
        {"messages": [{"role": "tool", "content": "a"}]},
        400,
        "this model's chat template does not support tools",
    ),
    ({"messages": ["a"]}, 400, "messages[0] must be a JSON object"),
    ({"messages": []}, 400, "at least one message"),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "must have a role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "must have text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, 400, "text"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "begin with the user"),
    ([1], 400, "must be a JSON object"),
    # What would not fit the arrays of a batch, or an answer's encoding.
    ({"prompt": "a", "temperature": 10**400}, 400, "temperature is too large"),
    ({"prompt": "a\ud800"}, 400, "is not JSON"),
    ({"\ud800": 1}, 400, "is not JSON"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD)
def test_bad_bodies(port, body, status, message):
    chat = isinstance(body, dict) and "messages" in body
    path = "/v1/chat/completions" if chat else "/v1/completions"
    found, text = post(port, path, json.dumps(body).encode())
    assert found == status
    error = json.loads(text)["error"]
    assert message in error["message"]
    assert (
        not isinstance(body, dict)
        or error["param"] is None
        or set(body) & set(re.split(r"[.\[]", error["param"]))
    )


@pytest.mark.parametrize("body", [{"prompt": "a" * 60}, {"prompt": "a", "max_tokens": 60}])
def test_clients_know_by_openais_code_and_words_to_shorten_a_chat(port, body):
    _, text = post(port, "/v1/completions", json.dumps(body).encode())
    error = json.loads(text)["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("this model's maximum context length is 60 tokens; ")


@pytest.mark.parametrize(
    ("data", "media", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 19_000, "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b" " * 20_001, "application/json", 413),
    ],
)
def test_bad_data(port, data, media, status):
    assert post(port, "/v1/completions", data, media)[0] == status


def test_a_full_queue_is_answered_429(running, port, client):
    _, runner = running
    first = client.completions.create(model="tiny", prompt="a", max_tokens=50, stream=True)
    statuses = []

    def ask():
        body = json.dumps({"prompt": "a", "max_tokens": 50}).encode()
        statuses.append(post(port, "/v1/completions", body)[0])

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    list(first)
    assert set(statuses) == {200, 429}
    assert runner.healthy


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 400),
        ("host.docker.internal:8000", 400),
        ("localhost.evil.example", 400),
        ("localhost:evil.example", 400),
        ("[::1].evil.example", 400),
    ],
)
def test_another_host_name_is_refused(port, host, status):
    text = exchange(
        port, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = text.decode().partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}")
    if status == 400:
        error = json.loads(body)["error"]
        assert f"the host name {host!r}; expected one of 127.0.0.1" in error["message"]
        assert "start it with --host and --api-key" in error["message"]


def test_half_open_and_slow_clients_are_cut_off(port, client):
    """Connections without headers, with half of them, and with half a body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    json_head = head + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    starts = [b"", head, json_head, json_head + b'{"prompt"']
    sockets = [connect(port) for _ in range(20)]
    began = time.monotonic()
    for i, one in enumerate(sockets):
        one.sendall(starts[i % 4])
    # Others are served meanwhile.
    client.completions.create(model="tiny", prompt="abc", max_tokens=3)
    assert time.monotonic() - began < 5
    answers = [read_all(one) for one in sockets]
    assert all(answers[i] == b"" for i in range(0, 20, 4))
    assert all(a.startswith(b"HTTP/1.1 408") for a in answers[2::4] + answers[3::4])
    assert time.monotonic() - began < 10


def test_a_client_that_sends_headers_drop_by_drop_is_cut_off(port):
    with connect(port) as one:
        one.sendall(b"GET /health HTTP/1.1\r\n")
        cut = False
        for _ in range(60):
            try:
                one.sendall(b"X: 1\r\n")
            except OSError:
                cut = True
                break
            time.sleep(0.05)
        assert cut


def test_oversized_headers_and_bodies_are_refused(port):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 100_000
    assert exchange(port, head).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body += b"Content-Type: application/json\r\n"
    chunk = b"1000\r\n" + b"a" * 0x1000 + b"\r\n"
    found = exchange(port, body + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 8)
    assert found.startswith(b"HTTP/1.1 413")


def test_a_stream_whose_reader_leaves_is_cancelled(running, port, client):
    before = sample(port, "jaxspec_requests_total", finish="disconnected")
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=50, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 5
    while sample(port, "jaxspec_requests_total", finish="disconnected") == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_reader_that_stands_still_is_cut_off():
    """A socket's buffers would swallow a tiny model's answer: a transport of our own."""

    class Transport:
        aborted = False

        def abort(self):
            self.aborted = True

    async def reader(reads_on: bool) -> bool:
        config = uvicorn.Config(application, ws="none")
        config.load()
        protocol = timed_protocol(Limits(stall_seconds=0.05))(config, ServerState(), {})
        protocol.transport, protocol.flow = Transport(), FlowControl(Transport())
        protocol.flow._transport.pause_reading = lambda: None
        protocol.pause_writing()
        if reads_on:
            protocol.resume_writing()
        await asyncio.sleep(0.2)
        return protocol.transport.aborted

    assert asyncio.run(reader(reads_on=False))
    assert not asyncio.run(reader(reads_on=True))


def test_a_server_needs_a_tokenizer(running):
    engine = Engine(tiny.target(), config=EngineConfig(room=60))
    runner = Runner(engine)
    with pytest.raises(ValueError, match="has no tokenizer"):
        application(runner, names=("tiny",))
    runner.close()
