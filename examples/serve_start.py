"""Seconds from starting a server to its first answer, and the memory it takes.

    python examples/serve_start.py --cache /tmp/start      # cold: the folder is empty
    python examples/serve_start.py --cache /tmp/start      # warm

Options after `--` go to `python -m jaxspec serve`. `--settle` keeps the server running for so
many more seconds, in which it compiles the programs of larger batches.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tyro

from jaxspec.cli import exits


@dataclasses.dataclass(frozen=True)
class Start:
    cache: Path
    """Cache folder of the server, for compiled programs and step times."""
    settle: float = 0.0
    limit: float = 280.0
    """Maximum seconds until the server is ready."""
    serve: tyro.conf.Positional[tuple[str, ...]] = ()


def main(options: Start) -> None:
    began = time.perf_counter()
    with started(options) as (server, url):
        while not answers(url + "/ready"):
            if time.perf_counter() - began > options.limit:
                raise TimeoutError(f"not ready within {options.limit:.0f} s")
            time.sleep(0.05)
        say("ready", began, server)
        body = {"model": "smollm2-135m", "prompt": "The sky is", "max_tokens": 16}
        request = urllib.request.Request(
            url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            json.load(answer)
        say("first answer, 16 tokens", began, server)
        if options.settle:
            time.sleep(options.settle)
            say("settled", began, server)


@contextmanager
def started(options: Start) -> Iterator[tuple[subprocess.Popen, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jaxspec", "serve", "--port", str(port), *options.serve]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAXSPEC_CACHE"] = str(options.cache)
    server = subprocess.Popen(command, env=environment)
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except urllib.error.URLError:
        return False


def say(what: str, began: float, server: subprocess.Popen) -> None:
    lines = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8").splitlines()
    kib = dict(line.split(":", 1) for line in lines)
    now, most = (int(kib[name].split()[0]) / 2**20 for name in ("VmRSS", "VmHWM"))
    seconds = time.perf_counter() - began
    print(f"{what}: {seconds:.1f} s, {now:.2f} GiB resident, {most:.2f} at most", flush=True)


if __name__ == "__main__":
    exits.script(main, Start, __doc__)
