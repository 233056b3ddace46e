"""The page at `/`, which draws one answer's trees, and the events it reads."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import re
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jaxspec.decoding.sampling import Sampling
from jaxspec.prompts import token_ids
from jaxspec.serving.answering import fault_message
from jaxspec.serving.events import EventStream
from jaxspec.serving.fields import BadRequest, Fields
from jaxspec.serving.protocol import parse_body
from jaxspec.serving.requests import QueueFull
from jaxspec.serving.runner import EngineFailed, Runner
from jaxspec.serving.shapes import error_body
from jaxspec.serving.watching import Watcher

MOST_TOKENS = 512


def page_routes(
    body: Callable[[Request], Coroutine[None, None, bytes]], watcher: Watcher, runner: Runner
) -> list[Route]:
    """GET / and POST /watch.

    Args:
      body: reads a request's body within the server's limits; raises `BadRequest`.
      runner: answers end with an error once it is not healthy.
    """
    html = importlib.resources.files("jaxspec.serving").joinpath("page.html").read_text("utf-8")
    headers = {
        "content-security-policy": policy(html),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def watch(request: Request) -> Response:
        try:
            asked = read_watch(parse_body(await body(request)))
            prompt = await asyncio.to_thread(
                token_ids,
                watcher.target,
                asked.pop("prompt"),
                raw=False,
                thinking=None,
                name="the prompt",
            )
            events = watcher.events(prompt, **asked)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        if not watcher.reserve():
            raise QueueFull("another answer is being watched; try later")
        gone, closing = threading.Event(), contextlib.ExitStack()
        closing.callback(gone.set)
        news = _started(events, watcher, runner, gone)
        return EventStream(_until_none(news), closing)

    return [Route("/", page), Route("/watch", watch, methods=["POST"])]


def read_watch(body) -> dict:
    """The arguments of `Watcher.events`, with the prompt as text.

    Raises:
      BadRequest: a field is unknown or its value invalid.
    """
    fields = Fields(body, {"prompt", "max_tokens", "temperature", "seed"})
    count = fields.get("max_tokens", None)
    if count is not None and not 1 <= fields.integer("max_tokens", 1) <= MOST_TOKENS:
        raise BadRequest(f"max_tokens is {count}; expected 1 … {MOST_TOKENS}", "max_tokens")
    return {
        "prompt": fields.text("prompt"),
        "max_new_tokens": count,
        "sampling": Sampling(temperature=fields.number("temperature", 0.0)),
        "seed": fields.integer("seed", 0),
    }


def _started(
    events: Iterator[dict], watcher: Watcher, runner: Runner, gone: threading.Event
) -> asyncio.Queue:
    """A queue that a thread fills with the events, then None. The thread stops once `gone` is
    set, and releases the watcher when it ends."""
    loop, news = asyncio.get_running_loop(), asyncio.Queue()

    def work() -> None:
        try:
            for event in events:
                if gone.is_set():
                    break
                if not runner.healthy:
                    raise EngineFailed("the engine has stopped")
                loop.call_soon_threadsafe(news.put_nowait, event)
        except Exception as error:
            fault = error_body(fault_message(error), "server_error")
            loop.call_soon_threadsafe(news.put_nowait, fault)
        finally:
            watcher.release()
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(news.put_nowait, None)

    threading.Thread(target=work, name="watch", daemon=True).start()
    return news


async def _until_none(news: asyncio.Queue) -> AsyncGenerator[dict]:
    while (event := await news.get()) is not None:
        yield event


def policy(html: str) -> str:
    """A content security policy that allows only the page's own style and script."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts)
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
