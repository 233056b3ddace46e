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
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxspec.generation import Target
from jaxspec.serving.metrics import Metrics, Watch
from jaxspec.serving.protocol import (
    Asked,
    BadRequest,
    Shape,
    error_body,
    read_chat,
    read_completion,
    usage,
)
from jaxspec.serving.requests import QueueFull
from jaxspec.serving.runner import EngineFailed, Runner, Ticket
from jaxspec.serving.text import Answer

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
      body_bytes: of a request.
      request_seconds: to send a request's headers, and again for its body.
      stall_seconds: a stream's reader may stand still this long before it is cut off.
      idle_seconds: a connection may stay open between requests.
      connections: open at a time; more are answered 503.
    """

    body_bytes: int = 1 << 20
    request_seconds: float = 10.0
    stall_seconds: float = 30.0
    idle_seconds: int = 5
    connections: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"Limits.{field.name} is {value}; expected more than 0")


def application(
    runner: Runner, *, name: str, limits: Limits = Limits(), hosts: tuple[str, ...] = ()
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
    runner: Runner, *, name: str, host: str, port: int, limits: Limits = Limits()
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
            body = await self._body(request)
            self._check_model(body)
            # Tokenizing takes long for long texts; the other requests go on meanwhile.
            room = self.runner.engine.config.room
            asked = await asyncio.to_thread(read, body, self.target, room)
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
            return _EventStream(self._events(asked, ticket, watch, shape), watch)
        return await self._whole(request, asked, ticket, watch, shape)

    async def _body(self, request: Request):
        """The JSON body, within the limits of size and time."""
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
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON ({error})") from error

    def _check_model(self, body) -> None:
        asked = body.get("model") if isinstance(body, dict) else None
        if asked is not None and asked != self.name:
            raise BadRequest(
                f"there is no model {asked!r}; this server has {self.name!r}", "model", 404
            )

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
            collecting = asyncio.create_task(collect())
            gone = asyncio.create_task(_disconnected(request.receive))
            try:
                done, _ = await asyncio.wait(
                    (collecting, gone), return_when=asyncio.FIRST_COMPLETED
                )
                if collecting not in done:
                    return Response(status_code=499)  # nobody reads it
                body = collecting.result()
                finish = body["choices"][0]["finish_reason"]
                return JSONResponse(body)
            finally:
                for task in (collecting, gone):
                    task.cancel()
        except EngineFailed as error:
            finish = "failed"
            return JSONResponse(error_body(str(error), "server_error"), 503)
        finally:
            watch.end(finish)

    async def _events(
        self, asked: Asked, ticket: Ticket, watch: Watch, shape: Shape
    ) -> AsyncIterator[tuple[dict, str | None]]:
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
        with ticket:
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


class _EventStream(Response):
    """Server-sent events; a reader that has gone ends the request."""

    def __init__(self, events: AsyncIterator, watch: Watch):
        self._events, self._watch = events, watch
        self._finish = "disconnected"
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope, receive, send) -> None:
        pumping = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((pumping, gone), return_when=asyncio.FIRST_COMPLETED)
            if pumping.done():
                pumping.result()
        finally:
            for task in (pumping, gone):
                task.cancel()
            await asyncio.gather(pumping, gone, return_exceptions=True)
            await self._events.aclose()
            self._watch.end(self._finish)

    async def _pump(self, send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event, finish in self._events:
            self._finish = finish or self._finish
            await send(_body(f"data: {json.dumps(event)}\n\n"))
        await send(_body("data: [DONE]\n\n", last=True))


def _body(text: str, *, last: bool = False) -> dict:
    return {"type": "http.response.body", "body": text.encode(), "more_body": not last}


async def _disconnected(receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _not_found(request: Request, error) -> Response:
    message = f"{request.method} {request.url.path} is not served here"
    return JSONResponse(error_body(message, "invalid_request_error"), error.status_code)


def timed_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with limits on clients that stand still.

    uvicorn itself waits forever for headers that do not come and for readers that do not read.
    """

    class TimedProtocol(H11Protocol):
        _request: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._await_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._answering():
                self._request = _disarm(self._request)
            elif self._request is None:
                self._await_request()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall = self.loop.call_later(limits.stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stall = _disarm(self._stall)

        def connection_lost(self, error) -> None:
            self._request, self._stall = _disarm(self._request), _disarm(self._stall)
            super().connection_lost(error)

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_request(self) -> None:
            self._request = self.loop.call_later(limits.request_seconds, self._give_up)

        def _give_up(self) -> None:
            self._request = None
            if not self._answering():
                self.transport.abort()

    return TimedProtocol


def _disarm(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
