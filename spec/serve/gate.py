"""What stands before every handler: request ids, the log, keys, sizes. Plain ASGI, so that streams stay streams."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from spec.serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from spec.serve.log import RequestLog
    from spec.serve.metrics import Metrics

_QUIET = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})  # asked for every few seconds
_OPEN = _QUIET | {"/", "/openapi.json"}
_BODY_SECONDS = 30.0  # for a client to send its body


@dataclass(frozen=True)
class Keys:
    """Who may do what. The page, health, metrics and the API's description are open: they hold nothing of any user."""

    api: str | None = None  # for everything else; None: open
    admin: str | None = None  # for /admin; None: closed

    def check(self, path: str, authorization: str) -> None:
        """Raises ApiError 401 or 403."""
        if path.startswith("/admin"):
            if self.admin is None:
                raise ApiError(403, "administration is off: start the server with --admin-key or SPEC_ADMIN_KEY")
            self._compare(authorization, self.admin)
        elif self.api is not None and path not in _OPEN and not path.startswith("/page/"):
            self._compare(authorization, self.api)

    @staticmethod
    def _compare(authorization: str, key: str) -> None:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {key}".encode()):
            raise ApiError(
                401, "missing or wrong key: send 'Authorization: Bearer KEY'", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def check_host(hosts: Sequence[str], header: str) -> None:
    """Raises ApiError 400 for a Host header that is not among ``hosts`` (``*.example.com`` is one); none: all are."""
    name = header.lower()
    name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
    if hosts and not any(name == host or (host.startswith("*.") and name.endswith(host[1:])) for host in hosts):
        raise ApiError(400, "no host of that name here: use the address the server is bound to, or --allowed-host")


class Gate:
    """Outermost of the application. Every answer carries ``x-request-id``; every request but probes is logged."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, hosts: Sequence[str], most_bytes: int, log: RequestLog, metrics: Metrics
    ):
        self._app, self._keys, self._hosts, self._most_bytes = app, keys, [host.lower() for host in hosts], most_bytes
        self._log, self._metrics = log, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"], scope["facts"] = f"req-{secrets.token_hex(8)}", {}
        begin, status = time.perf_counter(), 499  # the client went before there was an answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = scope["request_id"]
            await send(message)

        try:
            await self._enter(scope, receive, noting)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            if status >= 400:
                self._metrics.refuse(status)
            if scope["path"] not in _QUIET:
                self._log.request(scope, status, time.perf_counter() - begin)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            check_host(self._hosts, headers.get("host", ""))
            if scope["method"] != "OPTIONS":  # a browser asks before it may send a key
                self._keys.check(scope["path"], headers.get("authorization", ""))
            body = await self._body(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else None
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)
        elif body is None and scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """All of it, None if the client went away. Raises ApiError for one too large, or too slow."""
        declared = headers.get("content-length", "0")
        too_large = ApiError(413, f"the body is larger than {self._most_bytes} bytes: send less, or raise --max-body")
        if not declared.isdigit() or int(declared) > self._most_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._most_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what the client does next (going away)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
