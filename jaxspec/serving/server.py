"""An OpenAI-compatible HTTP server: completions and chat, whole or streamed.

======================  =======================================================
GET  /                  a page that shows the trees of an answer, if enabled
POST /v1/completions    prompts, texts or token ids
POST /v1/chat/completions  text messages
GET  /v1/models         the one model
GET  /v1/models/{id}    the same
GET  /health            200 while the engine runs, however busy; 503 once it has stopped
GET  /ready             200 while the queue takes another request, else 503
GET  /metrics           Prometheus
======================  =======================================================

Beyond OpenAI's fields: `top_k`, `min_p`, `stop_token_ids`, `ignore_eos`, `structured_outputs`,
`chat_template_kwargs`, and in usage `speculation`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxspec.models.target import Target
from jaxspec.serving.access import LOOPBACK, Access
from jaxspec.serving.answering import Answering, Choice, fault_message
from jaxspec.serving.connections import Limits, timed_protocol
from jaxspec.serving.events import EventStream, unless_gone
from jaxspec.serving.fields import BadRequest
from jaxspec.serving.grammars import Grammars
from jaxspec.serving.metrics import ServerMetrics
from jaxspec.serving.page import page_routes
from jaxspec.serving.protocol import Asked, parse_body, read_chat, read_completion
from jaxspec.serving.requests import QueueFull
from jaxspec.serving.runner import EngineFailed, Runner, Ticket
from jaxspec.serving.shapes import Shape, error_body, refusal_body
from jaxspec.serving.watching import Watcher

REFUSALS = {BadRequest: "bad_request", QueueFull: "queue_full", EngineFailed: "failed"}
LAST_WORDS_SECONDS = 5  # to send errors to answers that are cut off


def application(
    runner: Runner,
    *,
    names: Sequence[str],
    limits: Limits = Limits(),  # noqa: B008
    access: Access = Access(),  # noqa: B008
    page: bool = False,
) -> Starlette:
    """The ASGI application; closing it closes the runner.

    Args:
      names: names of the model; requests may use any, responses carry the first.
      page: serve the page at `/`, which shows one answer's trees.

    Raises:
      ValueError: the target has no tokenizer.
    """
    target = runner.engine.target
    check_servable(target)
    grammars = Grammars(target.tokenizer, target.config)
    metrics = ServerMetrics(runner)
    service = _Service(runner, target, tuple(names), limits, metrics, grammars)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.to_thread(runner.close)

    routes = [
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/health", service.health),
        Route("/ready", service.ready),
        Route("/metrics", service.metrics_text),
    ]
    if page:
        engine = runner.engine
        watcher = Watcher(target, engine.drafter, engine.config.room)
        routes += page_routes(service.body, watcher, runner)
    return Starlette(
        routes=routes,
        middleware=access.middleware(),
        lifespan=lifespan,
        exception_handlers={
            404: _not_found,
            405: _not_found,
            BadRequest: _bad_request,
            QueueFull: _queue_full,
            EngineFailed: _engine_failed,
            Exception: _fault,
        },
    )


def check_servable(target: Target) -> None:
    """Raises ValueError if the target has no tokenizer; call it before compiling."""
    if target.tokenizer is None:
        raise ValueError(f"target {target.name!r} has no tokenizer; a server needs one")


def server(
    runner: Runner,
    *,
    names: Sequence[str],
    host: str,
    port: int,
    limits: Limits = Limits(),  # noqa: B008
    access: Access = Access(),  # noqa: B008
    drain_seconds: float = 30.0,
) -> uvicorn.Server:
    """A server, not yet running: `.run()` blocks.

    On loopback it answers only to the host names of loopback. It serves its page on loopback
    and, elsewhere, with an API key.

    Args:
      names: see `application`.
      drain_seconds: seconds that running answers get to finish at shutdown; then they end with
        an error.
    """
    if host in LOOPBACK:
        access = dataclasses.replace(access, hosts=(*LOOPBACK, "[::1]"))
    page = host in LOOPBACK or access.key is not None
    app = application(runner, names=names, limits=limits, access=access, page=page)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=timed_protocol(limits),
        ws="none",
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=math.ceil(drain_seconds) + LAST_WORDS_SECONDS,
        limit_concurrency=limits.connections,
        access_log=False,
        server_header=False,
    )
    return _Draining(config, runner, drain_seconds)


class _Draining(uvicorn.Server):
    """At the deadline, ends running requests with an error, so that their connections close in
    order; uvicorn would just cancel them."""

    def __init__(self, config: uvicorn.Config, runner: Runner, seconds: float):
        super().__init__(config)
        self._runner, self._seconds = runner, seconds

    async def shutdown(self, sockets=None) -> None:
        async def give_up():
            await asyncio.sleep(self._seconds)
            await asyncio.to_thread(self._runner.close)

        late = asyncio.create_task(give_up())
        await super().shutdown(sockets)
        late.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket for `uvicorn.Server.run`, which refuses connections until `listen`.

    Raises:
      ValueError: the address is not available.
    """
    with _address(host, port):
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    return bound


def listen(bound: socket.socket) -> None:
    """Lets a bound socket take connections.

    Raises:
      ValueError: another server, bound while neither listened, came first.
    """
    with _address(*bound.getsockname()[:2]):
        bound.listen()


@contextlib.contextmanager
def _address(host: str, port: int):
    """Raises ValueError if the address is not available."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot serve on {host}, port {port}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _Service:
    runner: Runner
    target: Target
    names: tuple[str, ...]
    limits: Limits
    metrics: ServerMetrics
    grammars: Grammars

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completion, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat, chat=True)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(self.names[0])]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_name(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "jaxspec",
            "max_model_len": self.runner.engine.config.room,
        }

    def _check_name(self, name: Any) -> None:
        if name not in self.names:
            raise BadRequest(
                f"model {name!r} is not here; this server has {self.names[0]!r}", "model", 404
            )

    async def health(self, request: Request) -> Response:
        engine, healthy = self.runner.engine, self.runner.healthy
        body = {
            "status": "ok" if healthy else "stopped",
            "running": engine.running,
            "waiting": engine.waiting,
        }
        return JSONResponse(body, 200 if healthy else 503)

    async def ready(self, request: Request) -> Response:
        engine, healthy = self.runner.engine, self.runner.healthy
        full = engine.waiting >= engine.config.queue
        status = "ready" if healthy and not full else "full" if healthy else "stopped"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, read: Callable, chat: bool) -> Response:
        try:
            asked, submitted, tickets = await self._submitted(request, read)
        except Exception as error:
            self.metrics.refused(REFUSALS.get(type(error), "error"))
            raise
        self.metrics.prompt_tokens.inc(asked.prompt_tokens)
        choices = [
            Choice(ticket, self.metrics.follow(counts_prompt=i % asked.choices == 0))
            for i, ticket in enumerate(submitted)
        ]
        for choice in choices:  # those not ended when the client disconnects
            tickets.callback(choice.watch.end, "disconnected")
        kind = "chatcmpl" if chat else "cmpl"
        shape = Shape(chat, f"{kind}-{uuid.uuid4().hex}", int(time.time()), self.names[0])
        answering = Answering(asked, choices, self.target.tokenizer, shape)
        if asked.stream:
            return EventStream(answering.events(), tickets)
        with tickets:
            body = await unless_gone(answering.whole(), request.receive)
        return Response(status_code=499) if body is None else JSONResponse(body)

    async def _submitted(
        self, request: Request, read: Callable
    ) -> tuple[Asked, list[Ticket], contextlib.ExitStack]:
        """What a body asks for, its submitted requests, and the context that ends these."""
        data = await self.body(request)
        try:
            # In a thread: tokenizing a long text would block the event loop.
            asked = await asyncio.to_thread(self._understand, data, read)
            with contextlib.ExitStack() as tickets:  # submit all requests or none
                submitted = [
                    tickets.enter_context(self.runner.submit(x)) for x in asked.requests
                ]
                return asked, submitted, tickets.pop_all()
        except ValueError as error:
            raise BadRequest(str(error)) from error

    async def body(self, request: Request) -> bytes:
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
        if asked is not None:
            self._check_name(asked)
        config = self.runner.engine.config
        understood = read(body, self.target, config, self.grammars)
        if len(understood.requests) > config.queue:
            raise BadRequest(
                f"the body asks for {len(understood.requests)} answers; this server takes up "
                f"to {config.queue} at a time",
                "n",
            )
        return understood


async def _bad_request(request: Request, error: BadRequest) -> Response:
    unread = error.status in (408, 413)  # the rest of its body
    headers = {"connection": "close"} if unread else None
    return JSONResponse(refusal_body(error), error.status, headers=headers)


async def _queue_full(request: Request, error: QueueFull) -> Response:
    body = error_body(str(error), "rate_limit_error", code="queue_full")
    return JSONResponse(body, 429, headers={"retry-after": "1"})


async def _engine_failed(request: Request, error: EngineFailed) -> Response:
    return JSONResponse(error_body(str(error), "server_error"), 503)


async def _fault(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(fault_message(error), "server_error"), 500)


async def _not_found(request: Request, error) -> Response:
    message = f"{request.method} {request.url.path} is not served here"
    return JSONResponse(error_body(message, "invalid_request_error"), error.status_code)
