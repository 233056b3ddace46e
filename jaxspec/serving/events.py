"""Answers as server-sent events, and readers that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.responses import Response

from jaxspec.serving.metrics import Watch
from jaxspec.serving.runner import Ticket


class EventStream(Response):
    """Server-sent events; a reader that has gone ends the request.

    Args:
      events: pairs of a JSON value and the reason, if it ends the answer.
      ticket: the request; it is cancelled when the stream ends before it.
    """

    def __init__(
        self, events: AsyncGenerator[tuple[dict, str | None]], ticket: Ticket, watch: Watch
    ):
        self._events, self._ticket, self._watch = events, ticket, watch
        self._finish = "disconnected"
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope, receive, send) -> None:
        try:
            with self._ticket:
                await unless_gone(self._pump(send), receive)
        finally:
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


async def unless_gone(work: Coroutine, receive) -> Any:
    """Awaits the work; None, and the work cancelled, once the client has gone.

    Args:
      receive: of ASGI; the request's body has been read.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
