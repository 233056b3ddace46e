"""An HTTP server with the OpenAI shapes: completions and chat, whole or as a stream.

======================  =======================================================
POST /v1/completions    one prompt, a text or token ids
POST /v1/chat/completions  text messages
GET  /v1/models         the one model
GET  /health            200 while requests are served, 503 after
GET  /metrics           Prometheus
======================  =======================================================

Beyond OpenAI's fields: `top_k`, `min_p`, `chat_template_kwargs.enable_thinking`, and in usage
`speculation`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxspec.generation import Target
from jaxspec.serving.connections import Limits, timed_protocol
from jaxspec.serving.events import EventStream, unless_gone
from jaxspec.serving.metrics import Metrics, Watch
from jaxspec.serving.protocol import (
    Asked,
    BadRequest,
    Shape,
    error_body,
    parse_body,
    read_chat,
    read_completion,
    usage,
)
from jaxspec.serving.requests import QueueFull
from jaxspec.serving.runner import EngineFailed, Runner, Ticket
from jaxspec.serving.text import Answer

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def application(
    runner: Runner,
    *,
    name: str,
    limits: Limits = Limits(),  # noqa: B008
    hosts: tuple[str, ...] = (),
) -> Starlette:
    """The ASGI application; closing it closes the runner.

    Args:
      name: of the model.
      hosts: names the server may be addressed by; () takes any.

    Raises:
      ValueError: the target has no tokenizer.
    """
    target = runner.engine.target
    if target.tokenizer is None:
        raise ValueError(f"target {target.name!r} has no tokenizer; a server needs one")
    service = _Service(runner, target, name, limits, Metrics(runner))

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.to_thread(runner.close)

    routes = [
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/health", service.health),
        Route("/metrics", service.metrics_text),
    ]
    # A web page must not reach a server on its reader's own machine under another name.
    guard = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))] if hosts else []
    errors = {404: _not_found, 405: _not_found}
    return Starlette(
        routes=routes, middleware=guard, lifespan=lifespan, exception_handlers=errors
    )


def server(
    runner: Runner,
    *,
    name: str,
    host: str,
    port: int,
    limits: Limits = Limits(),  # noqa: B008
) -> uvicorn.Server:
    """A server, not yet running: `.run()` blocks."""
    hosts = (*LOOPBACK, "[::1]") if host in LOOPBACK else ()
    app = application(runner, name=name, limits=limits, hosts=hosts)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=timed_protocol(limits),
        ws="none",
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=5,
        limit_concurrency=limits.connections,
        access_log=False,
        server_header=False,
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """A socket for `uvicorn.Server.run`; connections are refused until that listens.

    Raises:
      ValueError: the address is not to be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(f"cannot serve on {host}, port {port}: {error.strerror}") from error
    return bound


@dataclasses.dataclass(frozen=True)
class _Service:
    runner: Runner
    target: Target
    name: str
    limits: Limits
    metrics: Metrics

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completion, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat, chat=True)

    async def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "jaxspec"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        engine, healthy = self.runner.engine, self.runner.healthy
        body = {
            "status": "ok" if healthy else "stopped",
            "running": engine.running,
            "waiting": engine.waiting,
        }
        return JSONResponse(body, 200 if healthy else 503)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, read: Callable, chat: bool) -> Response:
        try:
            data = await self._body(request)
            # Tokenizing takes long for long texts; the other requests go on meanwhile.
            asked = await asyncio.to_thread(self._understand, data, read)
            ticket = self.runner.submit(asked.request)
        except BadRequest as error:
            self.metrics.refused("bad_request")
            body = error_body(str(error), "invalid_request_error", error.param)
            close = {"connection": "close"} if error.status in (408, 413) else None
            return JSONResponse(body, error.status, headers=close)
        except ValueError as error:
            self.metrics.refused("bad_request")
            return JSONResponse(error_body(str(error), "invalid_request_error"), 400)
        except QueueFull as error:
            self.metrics.refused("queue_full")
            body = error_body(str(error), "rate_limit_error", code="queue_full")
            return JSONResponse(body, 429, headers={"retry-after": "1"})
        except EngineFailed as error:
            return JSONResponse(error_body(str(error), "server_error"), 503)
        watch = self.metrics.follow(len(asked.request.prompt))
        kind = "chatcmpl" if chat else "cmpl"
        shape = Shape(chat, f"{kind}-{uuid.uuid4().hex}", int(time.time()), self.name)
        if asked.stream:
            return EventStream(self._events(asked, ticket, watch, shape), ticket, watch)
        return await self._whole(request, asked, ticket, watch, shape)

    async def _body(self, request: Request) -> bytes:
        """The body, within the limits of size and time."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise BadRequest(
                f"content-type is {media!r}; expected application/json", status=415
            )
        too_long = BadRequest(
            f"the body is longer than {self.limits.body_bytes} bytes", status=413
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.body_bytes:
            raise too_long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.request_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.body_bytes:
                        raise too_long
                    parts.append(part)
        except TimeoutError as error:
            seconds = self.limits.request_seconds
            raise BadRequest(f"the body took longer than {seconds} s", status=408) from error
        except ClientDisconnect as error:
            raise BadRequest("the body ended early") from error
        return b"".join(parts)

    def _understand(self, data: bytes, read: Callable) -> Asked:
        body = parse_body(data)
        asked = body.get("model") if isinstance(body, dict) else None
        if asked is not None and asked != self.name:
            raise BadRequest(
                f"there is no model {asked!r}; this server has {self.name!r}", "model", 404
            )
        return read(body, self.target, self.runner.engine.config.room)

    async def _whole(
        self, request: Request, asked: Asked, ticket: Ticket, watch: Watch, shape: Shape
    ) -> Response:
        finish = "disconnected"

        async def collect() -> dict:
            parts, end = [], None
            async for piece in self._pieces(asked, ticket, watch):
                parts.append(piece.text)
                end = piece
            return shape.whole("".join(parts), end.finish, end.usage)

        try:
            with ticket:
                body = await unless_gone(collect(), request.receive)
            if body is None:
                return Response(status_code=499)  # nobody reads it
            finish = body["choices"][0]["finish_reason"]
            return JSONResponse(body)
        except EngineFailed as error:
            finish = "failed"
            return JSONResponse(error_body(str(error), "server_error"), 503)
        finally:
            watch.end(finish)

    async def _events(
        self, asked: Asked, ticket: Ticket, watch: Watch, shape: Shape
    ) -> AsyncGenerator[tuple[dict, str | None]]:
        """Objects of a stream, each with the reason if it ends the answer."""
        first = True
        try:
            async with contextlib.aclosing(self._pieces(asked, ticket, watch)) as pieces:
                async for piece in pieces:
                    if first or piece.text or piece.finish:
                        yield shape.chunk(piece.text, piece.finish, first=first), piece.finish
                        first = False
                    if piece.finish and asked.include_usage:
                        yield shape.last(piece.usage), piece.finish
        except EngineFailed as error:
            yield error_body(str(error), "server_error"), "failed"

    async def _pieces(self, asked: Asked, ticket: Ticket, watch: Watch):
        """Text as it grows; the last piece has the reason and the usage."""
        answer = Answer(self.target.tokenizer, asked.stops)
        count, finish = 0, None
        async for update in ticket:
            watch.see(update)
            if answer.stopped:  # cut; only the counts of the cancelled rest are awaited
                text = ""
            else:
                count += len(update.tokens)
                text = answer.add(update.tokens)
                if update.finish and not answer.stopped:
                    text += answer.finish()
            if answer.stopped and not finish:
                finish = "stop"
                ticket.cancel()
            if update.finish is None:
                yield _Piece(text)
                continue
            finish = finish or update.finish
            counts = usage(len(asked.request.prompt), count, update.stats)
            yield _Piece(text, finish, counts)


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    finish: str | None = None
    usage: dict | None = None


async def _not_found(request: Request, error) -> Response:
    message = f"{request.method} {request.url.path} is not served here"
    return JSONResponse(error_body(message, "invalid_request_error"), error.status_code)
