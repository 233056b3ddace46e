"""A server under load: hundreds of clients of all manners, floods, failure and the end."""

import asyncio
import json
import random
import threading
import time

import openai
import pytest

from examples import load_server
from examples.load import closed_loop, summarise, to_server
from jaxspec.decoding.sampling import Sampling
from jaxspec.serving.connections import Limits
from jaxspec.serving.requests import Request
from tests.serving import servers
from tests.serving.engines import alone
from tests.serving.servers import connect, get, post, read_all, sample

LIMITS = Limits(request_seconds=3, stall_seconds=5, connections=40)
BAD = [
    (b"{", 400),
    (b'{"prompt": "a", "top_k": 1.5}', 400),
    (b'{"prompt": "a", "max_tokens": -2}', 400),
    (b'{"prompt": [1, 99]}', 400),
    (b'{"prompt": "a", "model": "other"}', 404),
]


@pytest.fixture(scope="module")
def server():
    with servers.serve(limits=LIMITS, queue=64) as found:
        yield found


def open_client(port) -> openai.AsyncOpenAI:
    url = f"http://127.0.0.1:{port}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)


async def raw(port: int, body: bytes):
    """Sends one request over a connection of its own: (reader, writer)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def status_of(reader) -> int:
    return int((await reader.readline()).split()[1])


@pytest.mark.slow
def test_hundreds_of_clients(server):
    """Answers of those who stay are what they get alone; nothing of the others is left."""
    port, runner = server
    dice, start = random.Random(1), runner.engine.device_bytes()
    before = sample(port, "jaxspec_requests_total", finish="disconnected")
    text = servers.tokenizer()
    found, kinds = [], dict.fromkeys(("whole", "stream", "leaves", "slow", "bad"), 0)

    def expected(prompt, options):
        sampling = Sampling(temperature=options["temperature"])
        request = Request(prompt, options["max_tokens"], sampling, options["seed"])
        return text.decode(alone(request))

    async def one(client, kind, prompt, options):
        given = dict(model="tiny", prompt=list(prompt), **options)
        if kind == "whole":
            done = await client.completions.create(**given)
            found.append((prompt, options, done.choices[0].text))
        elif kind == "stream":
            parts = await client.completions.create(**given, stream=True)
            pieces = [c.choices[0].text async for c in parts]
            found.append((prompt, options, "".join(pieces)))
        elif kind == "slow":  # reads a few bytes at a time
            reader, writer = await raw(port, json.dumps(given | {"stream": True}).encode())
            assert await status_of(reader) == 200
            received = b""
            while part := await reader.read(200):
                received += part
                await asyncio.sleep(0.005)
            writer.close()
            events = [x[6:] for x in received.decode().split("\n") if x.startswith("data: {")]
            pieces = [json.loads(x)["choices"][0]["text"] for x in events]
            found.append((prompt, options, "".join(pieces)))
        elif kind == "leaves":
            given |= {"stream": dice.random() < 0.5, "max_tokens": 40}
            _, writer = await raw(port, json.dumps(given).encode())
            await asyncio.sleep(dice.choice([0.0, 0.01, 0.05]))
            writer.transport.abort()
        else:
            data, status = dice.choice(BAD)
            reader, writer = await raw(port, data)
            assert await status_of(reader) == status
            writer.close()

    async def everyone():
        gate = asyncio.Semaphore(24)

        async def next_one(client, i):
            prompt = tuple(dice.randint(1, 10) for _ in range(1 + i % 20))
            options = dict(
                max_tokens=dice.randint(1, 16),
                temperature=dice.choice([0.0, 0.0, 0.9]),
                seed=i % 50,
            )
            kind = dice.choice(["whole", "stream", "stream", "leaves", "slow", "bad"])
            kinds[kind] += 1
            async with gate:
                await one(client, kind, prompt, options)

        async with open_client(port) as client:
            await asyncio.gather(*(next_one(client, i) for i in range(500)))

    asyncio.run(everyone())
    servers.await_idle(runner)
    assert min(kinds.values()) > 40 and len(found) == sum(
        kinds[kind] for kind in ("whole", "stream", "slow")
    )
    for prompt, options, answer in found:
        assert answer == expected(prompt, options)
    assert sample(port, "jaxspec_requests_total", finish="disconnected") > before
    engine = runner.engine
    assert runner.healthy and (engine.waiting, engine.running) == (0, 0)
    assert engine.device_bytes() == start


def test_the_load_generator_drives_a_server(server):
    port, _ = server

    async def load():
        async with open_client(port) as client:
            asked = [dict(prompt=[1, 2, 3], max_tokens=n, temperature=0) for n in (1, 6, 9)]
            return await closed_loop(to_server(client, "tiny"), asked, users=2)

    seen = asyncio.run(load())
    assert sorted(one.tokens for one in seen) == [
        len(alone(Request((1, 2, 3), n))) for n in (1, 6, 9)
    ]
    assert summarise(seen).failed == 0


def test_the_load_generator_as_a_program(server):
    """Closed and open loops against the server, as a table of two rows."""
    port, _ = server
    options = load_server.Load(
        "tiny",
        url=f"http://127.0.0.1:{port}/v1",
        users=(2,),
        rates=(50.0,),
        requests=6,
        max_new_tokens=5,
    )
    heading, _, closed, arriving = load_server.main(options).splitlines()
    assert closed.startswith("| 2 users |") and arriving.startswith("| 50 requests/s |")
    for row in (closed, arriving):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == heading.count("|") - 1
        assert float(cells[1]) > 0 and cells[-1] == "0"


def test_a_flood_of_silent_connections(server):
    """Past twice the limit they are cut off at once, the others a little later."""
    port, runner = server
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    began = time.monotonic()
    sockets = [connect(port) for _ in range(2 * LIMITS.connections + 20)]
    while sum(closed(one) for one in sockets) < 20:
        assert time.monotonic() - began < 0.8 * LIMITS.request_seconds
        time.sleep(0.02)
    for one in sockets:
        read_all(one)
    deadline = time.monotonic() + 10
    while post(port, "/v1/completions", body)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    servers.await_idle(runner)


def closed(one) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        one.settimeout(10)


def test_an_engine_that_fails_is_told_to_all(monkeypatch):
    """Those who wait, those who stream, those who come later, and /health."""
    with servers.serve(limits=LIMITS) as (port, runner):
        step, answers = runner.engine.step, {}
        body = {"prompt": "a", "max_tokens": 50}

        def fail():
            if runner.engine.running == 2:
                raise RuntimeError("out of memory")
            return step()

        def ask(name, **more):
            data = json.dumps(body | more).encode()
            answers[name] = post(port, "/v1/completions", data)

        monkeypatch.setattr(runner.engine, "step", fail)
        threads = [
            threading.Thread(target=ask, args=("whole",)),
            threading.Thread(target=ask, args=("stream",), kwargs={"stream": True}),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        ask("later")
        assert answers["whole"][0] == 503 and "out of memory" in answers["whole"][1]
        status, events = answers["stream"]
        assert status == 200 and '"server_error"' in events and events.endswith("[DONE]\n\n")
        assert answers["later"][0] == 503
        assert get(port, "/health")[0] == 503
        assert sample(port, "jaxspec_healthy") == 0


@pytest.mark.slow
def test_a_server_that_ends_leaves_nobody_hanging():
    """Requests still running after the grace period end with an error; the engine stops."""
    with servers.serve(limits=LIMITS) as (port, runner):
        step = runner.engine.step
        runner.engine.step = lambda: time.sleep(0.5) or step()
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        )
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=50, stream=True)
        next(iter(stream))
        began = time.monotonic()
    assert time.monotonic() - began < 14 and not runner.healthy
    with pytest.raises(openai.APIError, match="the engine has stopped: it was closed"):
        for _ in stream:
            pass
    client.close()
