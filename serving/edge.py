"""The outermost layer of the gateway: who may talk to it, how much they may send, what browsers may do with answers."""

import asyncio
import json
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import Limits, ServeConfig
from serving.pictures import too_large
from serving.protocol import Problem

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
        "connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
SERVE_HEADERS = (b"x-session-id", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id", b"x-request-")
"""Ray Serve obeys these from anyone, so nothing behind the edge gets to see a client's."""


class Edge:
    """ASGI middleware: host and origin checks, body limits, security and CORS headers, Serve's own headers removed.

    Args:
        app: the doors behind it.
        config: hosts, origins, limits.
        rejected: told the kind of each refusal.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, rejected: Callable[[str], None] = lambda slug: None) -> None:
        self.app, self.config, self._rejected = app, config, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it here."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        scope["headers"] = [(k, v) for k, v in scope["headers"] if not k.lower().startswith(SERVE_HEADERS)]
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        problem = self._refusal(scope, headers)
        origin = headers.get("origin")
        cors = origin if origin in self.config.origins else None
        if problem is not None:
            self._rejected(problem.slug)
            await refuse(scope, receive, _with_headers(send, cors), problem)
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        elif cors and scope["method"] == "OPTIONS":
            await _preflight(_with_headers(send, cors))
        else:
            limited = _limited(receive, self.config.limits)
            await self.app(scope, limited, _with_headers(send, cors))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Problem | None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        allowed = (*LOOPBACK_HOSTS, self.config.host, *self.config.hosts)
        if name.lower() not in allowed and "*" not in self.config.hosts:
            # Otherwise a page could point its own name at 127.0.0.1 and be taken for ours (DNS rebinding).
            return Problem(421, "unknown-host", f"this server does not answer to {name[:80]!r}: start it with --hosts")
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host and origin not in self.config.origins:
            return Problem(403, "foreign-origin", f"scripts of {origin[:80]!r} may not call: start it with --origins")
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return Problem(400, "bad-header", "content-length is not a number")
        if int(length) > self.config.limits.picture_bytes:
            return too_large(self.config.limits.picture_bytes)
        return None


class BodyRefused(HTTPException):
    """A refusal in the middle of a body: while FastAPI reads one, only exceptions of this kind get through it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.status, problem.detail)
        self.problem = problem


async def refuse(scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
    """Answers with the problem: as a document, or by accepting a socket and closing it with the reason."""
    if scope["type"] == "websocket":
        await receive()
        # A close before the accept reaches a browser as a bare 1006, without code or reason.
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": problem.close_code, "reason": close_reason(problem)})
        return
    body = json.dumps(problem.body()).encode()
    headers = {"content-type": "application/problem+json", "content-length": str(len(body)), **problem.headers()}
    pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def close_reason(problem: Problem) -> str:
    """The problem in the 123 bytes of a close frame (RFC 6455, section 5.5)."""
    return problem.detail.encode()[:120].decode(errors="ignore")


def _limited(receive: Receive, limits: Limits) -> Receive:
    """Counts the body as it comes, for clients that don't say or lie about its length, or never come to its end."""
    seen, more, deadline = 0, True, time.monotonic() + limits.body_s

    async def counted() -> Message:
        nonlocal seen, more
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) if more else None):
                message = await receive()
        except TimeoutError:
            slow = f"the request did not arrive in {limits.body_s:g} s"
            raise BodyRefused(Problem(408, "body-too-slow", slow, limit_s=limits.body_s)) from None
        seen, more = seen + len(message.get("body", b"")), message.get("more_body", False)
        if seen > limits.picture_bytes:
            raise BodyRefused(too_large(limits.picture_bytes))
        return message

    return counted


def _with_headers(send: Send, cors_origin: str | None) -> Send:
    extra = dict(SECURITY_HEADERS)
    if cors_origin:
        extra |= {"access-control-allow-origin": cors_origin, "vary": "origin"}
        extra["cross-origin-resource-policy"] = "cross-origin"
    pairs = [(k.encode(), v.encode()) for k, v in extra.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {k.lower() for k, _ in message.get("headers", ())}
            message["headers"] = [*message.get("headers", ()), *(p for p in pairs if p[0] not in given)]
        await send(message)

    return sending


async def _preflight(send: Send) -> None:
    headers = {
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-allow-headers": "authorization, content-type",
        "access-control-max-age": "600",
    }
    pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": 204, "headers": pairs})
    await send({"type": "http.response.body", "body": b""})
