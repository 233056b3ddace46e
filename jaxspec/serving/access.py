"""Access control: API keys, and the web origins that may use the server (CORS)."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxspec.serving.shapes import error_body

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOST = re.compile(r"(\[.*\]|[^:]*)(:\d*)?")  # a Host header: the name, and a port if any
# Supervisors and a browser that opens the page have no key; the page's own requests need it.
OPEN_PATHS = frozenset({"/health", "/ready", "/"})


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
      key: required as `Authorization: Bearer KEY`; None: no key is required.
      open_metrics: `/metrics` needs no key.
      origins: origins of web pages that may read answers, as `https://chat.example`; "*": any.
      hosts: host names that the server answers to; (): any.
    """

    key: str | None = None
    open_metrics: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self):
        if self.key is not None and not (self.key.isascii() and self.key.strip()):
            raise ValueError("the API key must be ASCII and not empty")

    def middleware(self) -> list[Middleware]:
        """Middleware, outermost first: a browser sends its CORS preflight without the key."""
        found = []
        if self.hosts:  # against DNS rebinding: a page reaching a local server by its own name
            found.append(Middleware(_NeedsHost, hosts=self.hosts))
        if self.origins:
            found.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(self.origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],  # clients have headers of their own, x-stainless-…
                )
            )
        if self.key is not None:
            found.append(Middleware(_NeedsKey, access=self))
        return found


class _NeedsHost:
    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._knows(host := Headers(scope=scope).get("host", "")):
            return await self._app(scope, receive, send)
        message = (
            f"this server does not answer to the host name {host!r}; expected one of "
            f"{', '.join(self._hosts)}. To be called by other names, start it with --host and "
            "--api-key"
        )
        answer = JSONResponse(error_body(message, "invalid_request_error"), 400)
        await answer(scope, receive, send)

    def _knows(self, host: str) -> bool:
        name = HOST.fullmatch(host)
        return name is not None and name[1].lower() in self._hosts


class _NeedsKey:
    def __init__(self, app: ASGIApp, access: Access):
        self._app = app
        self._open = OPEN_PATHS | ({"/metrics"} if access.open_metrics else set())
        self._key = _digest(f"Bearer {access.key}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open or self._knows(scope):
            return await self._app(scope, receive, send)
        message = "the request lacks this server's API key (Authorization: Bearer KEY)"
        body = error_body(message, "invalid_request_error", code="invalid_api_key")
        answer = JSONResponse(body, 401, headers={"www-authenticate": "Bearer"})
        await answer(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # Digests have equal lengths, so the comparison's duration does not reveal the key's.
        return len(given) == 1 and hmac.compare_digest(_digest(given[0]), self._key)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()
