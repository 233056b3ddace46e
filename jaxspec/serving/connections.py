"""Connections with time limits on slow clients."""

from __future__ import annotations

import asyncio
import dataclasses

from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxspec.arguments import check_field


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on clients.

    Attributes:
      body_bytes: maximum bytes of a request body.
      request_seconds: maximum seconds to send a request's headers, and again for its body.
      stall_seconds: maximum seconds that a stream's client may read nothing before it is
        disconnected.
      idle_seconds: maximum seconds that a connection may stay open between requests.
      connections: maximum open connections; further requests get status 503, except `/health`,
        and connections beyond twice as many are closed.
    """

    body_bytes: int = 1 << 20
    request_seconds: float = 10.0
    stall_seconds: float = 30.0
    idle_seconds: int = 5
    connections: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(self, field.name, getattr(self, field.name) > 0, "more than 0")


def timed_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with time limits on slow clients.

    uvicorn itself waits forever for headers that do not come and for readers that do not read.
    """

    class TimedProtocol(H11Protocol):
        _request: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None

        @property
        def limit_concurrency(self) -> int | None:
            """None for a health check: a busy server is still healthy."""
            return None if self.scope and self.scope["path"] == "/health" else self._most

        @limit_concurrency.setter
        def limit_concurrency(self, most: int | None) -> None:
            self._most = most

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > 2 * limits.connections:
                transport.abort()  # before idle connections use up the process's files
            else:
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
