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
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from jaxspec.decoding.sampling import Sampling
from jaxspec.prompts import token_ids
from jaxspec.serving.events import EventStream
from jaxspec.serving.fields import BadRequest, Fields
from jaxspec.serving.protocol import parse_body
from jaxspec.serving.runner import EngineFailed, Runner
from jaxspec.serving.shapes import error_body, refusal_body
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
        except BadRequest as error:
            return JSONResponse(refusal_body(error), error.status)
        except ValueError as error:
            return JSONResponse(error_body(str(error), "invalid_request_error"), 400)
        if not watcher.reserve():
            busy = error_body("another answer is being watched; try later", "rate_limit_error")
            return JSONResponse(busy, 429)
        gone = threading.Event()
        news = _started(events, watcher, runner, gone)
        return EventStream(_until_none(news), _set_at_the_end(gone))

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
            message = f"the answer could not be given: {error}"
            loop.call_soon_threadsafe(news.put_nowait, error_body(message, "server_error"))
        finally:
            watcher.release()
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(news.put_nowait, None)

    threading.Thread(target=work, name="watch", daemon=True).start()
    return news


async def _until_none(news: asyncio.Queue) -> AsyncGenerator[dict]:
    while (event := await news.get()) is not None:
        yield event


@contextlib.contextmanager
def _set_at_the_end(gone: threading.Event):
    try:
        yield
    finally:
        gone.set()


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
