"""A server over a tiny engine, and clients without manners."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from jaxspec.decoding.schedule import Fixed
from jaxspec.models.target import Target
from jaxspec.serving.access import Access
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.connections import Limits
from jaxspec.serving.engine import Engine
from jaxspec.serving.runner import Runner
from jaxspec.serving.server import server
from jaxspec.tokenizer import Tokenizer
from tests import tiny
from tests.serving import engines

OPEN = Access()
VOCABULARY = ["<end>", "a", "b", "c", "Ġa", "Ġb", "Ã", "©", "Ċ", "d", "e"]
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begin with the user') }}"
    "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def tokenizer(kind: type[Tokenizer] = Tokenizer) -> Tokenizer:
    return kind.from_bpe(VOCABULARY, [], special=[0], eos=0, chat_template=TEMPLATE)


@contextlib.contextmanager
def serve(
    *,
    limits: Limits,
    access=OPEN,
    drain_seconds=5.0,
    tokenizer=tokenizer,
    target: Target | None = None,
    **options,
):
    """A server on a free port: (port, runner); it has ended after the block."""
    if target is None:
        model = tiny.target()
        target = Target("tiny", model.config, model.params, tokenizer())
    few = dict(slots=2, queue=6, schedule=Fixed(), budget=2, prefix_cache_mb=1.0)
    engine = Engine(target, engines.LOOKUP, EngineConfig(**(engines.CONFIG | few | options)))
    engine.warm_up()
    runner = Runner(engine)
    http = server(
        runner,
        names=("tiny", "org/tiny"),
        host="127.0.0.1",
        port=0,
        limits=limits,
        access=access,
        drain_seconds=drain_seconds,
    )
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    yield http.servers[0].sockets[0].getsockname()[1], runner
    http.should_exit = True
    thread.join(15)
    assert not thread.is_alive()


def await_idle(runner: Runner, seconds: float = 10) -> None:
    """Until nobody waits for a request and none runs."""
    deadline = time.monotonic() + seconds
    while runner.tickets or runner.engine.busy:
        assert time.monotonic() < deadline, "requests were left behind"
        time.sleep(0.01)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_all(one) -> bytes:
    parts = []
    try:
        while part := one.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass  # cut off
    one.close()
    return b"".join(parts)


def exchange(port, data: bytes) -> bytes:
    one = connect(port)
    try:
        one.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was answered before all was sent
    return read_all(one)


def post(port, path, data, media="application/json", headers=()):
    headers = {"Content-Type": media} | dict(headers)
    url = f"http://127.0.0.1:{port}{path}"
    return fetch(urllib.request.Request(url, data, headers, method="POST"))


def get(port, path, headers=()):
    url = f"http://127.0.0.1:{port}{path}"
    return fetch(urllib.request.Request(url, headers=dict(headers)))


def fetch(request):
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def sample(port, name, **labels) -> float:
    families = text_string_to_metric_families(get(port, "/metrics")[1])
    found = [s for f in families for s in f.samples if s.name == name and s.labels == labels]
    return found[0].value if found else 0.0
