"""Answers as server-sent events; requests are cancelled when their client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AbstractContextManager
from typing import Any

from starlette.responses import Response


class EventStream(Response):
    """Server-sent events; the requests end when their client disconnects.

    Args:
      events: JSON values.
      tickets: of the requests; cancelled if the stream ends before they do.
    """

    def __init__(self, events: AsyncGenerator[dict], tickets: AbstractContextManager):
        self._events, self._tickets = events, tickets
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope, receive, send) -> None:
        try:
            with self._tickets:
                await unless_gone(self._pump(send), receive)
        finally:
            await self._events.aclose()

    async def _pump(self, send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            await send(_body(f"data: {json.dumps(event)}\n\n"))
        await send(_body("data: [DONE]\n\n", last=True))


def _body(text: str, *, last: bool = False) -> dict:
    return {"type": "http.response.body", "body": text.encode(), "more_body": not last}


async def unless_gone(work: Coroutine, receive) -> Any:
    """Awaits the work; cancels it and returns None if the client disconnects.

    Args:
      receive: ASGI's, after the request's body has been read.
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
