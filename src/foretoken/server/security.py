"""Who may call, from where, and how much they may send.

Plain ASGI: each class wraps an application and passes on what it lets through, streams included.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware

from foretoken.server.errors import Failure
from foretoken.server.settings import ServerSettings, is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 2.0  # that the rest of a refused body may take

# Nothing from elsewhere and nothing inline: text that a model wrote stays text.
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing and cost next to nothing


class SecurityHeaders:
    """Adds headers that tell browsers what not to do.

    Args:
        app: What answers; headers that it sets itself stand.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [
            (name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", ()))
                names = {name.lower() for name, _ in own}
                message["headers"] = own + [it for it in self._headers if it[0] not in names]
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class SameSite:
    """Refuses what the pages of other sites make a browser send.

    A page can have a browser call any address, this machine's own too. It cannot choose the Origin
    header; and it cannot choose the Host header either, which gives it away when its own name
    was made to point here (DNS rebinding).

    Args:
        app: What answers the rest.
        is_local: Whether only this machine reaches the server, which then has no other names.
        origins: Those that may call from elsewhere; "*" for all.
    """

    def __init__(self, app: ASGIApp, *, is_local: bool, origins: Collection[str] = ()) -> None:
        self._app = app
        self._is_local = is_local
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        problem = self._problem(scope) if scope["type"] == "http" else None
        refusal = Failure(403, problem, code="forbidden").response() if problem else None
        await (refusal or self._app)(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        host, origin = _header(scope, b"host"), _header(scope, b"origin").lower()
        if self._is_local and not is_loopback(_without_port(host)):
            return f"this server answers to localhost only; the Host header says {host[:80]!r}"
        is_foreign = bool(origin) and origin.partition("://")[2] != host.lower()
        if not is_foreign or scope["method"] in SAFE_METHODS:
            return None  # what they read cross-site, browsers keep from them
        if "*" in self._origins or origin in self._origins:
            return None
        return f"pages of {origin[:80]!r} may not call this server; --cors-origin allows them to"


class ApiKeys:
    """Asks for one of the server's keys, as `Authorization: Bearer KEY`.

    The comparison takes the same time whatever is given, and whichever key it is.

    Args:
        app: What answers those who have one.
        keys: At least one.
        open_paths: What needs none.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        is_open = scope["type"] != "http" or scope["path"] in self._open_paths
        if is_open or self._is_known(_header(scope, b"authorization")):
            await self._app(scope, receive, send)
            return
        refusal = Failure(
            401,
            "this server wants an API key: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)

    def _is_known(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip().encode("latin-1"))
        # All of them, each time: how long it takes says nothing about which one came near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == "bearer"


class BodyLimit:
    """Refuses bodies that are too large or too slow, by what arrives and not what is announced.

    Args:
        app: What answers; it gets the whole body at once.
        max_bytes: The largest body.
        timeout_s: Seconds in which it must have arrived.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _header(scope, b"content-length")
        is_too_large = announced.isdigit() and int(announced) > self._max_bytes
        refusal = None
        try:
            async with asyncio.timeout(self._timeout_s):
                body = None if is_too_large else await self._read(receive)
        except TimeoutError:
            refusal = too_slow(self._timeout_s)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
                return
            refusal = self._too_large()
        await refusal.response()(scope, receive, lingering(receive, send))

    def _too_large(self) -> Failure:
        return Failure(
            413,
            f"the body has more than the {self._max_bytes} bytes that are allowed",
            code="request_too_large",
            headers={"Connection": "close"},  # what of it is still to come then is not read
        )

    async def _read(self, receive: Receive) -> list[Message] | None:
        """Return the messages of a body, the last one complete; None if it is too large."""
        messages: list[Message] = []
        num_bytes = 0
        while True:
            message = await receive()
            messages.append(message)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages


def too_slow(timeout_s: float) -> Failure:
    """Return what a client is told whose request does not arrive."""
    return Failure(
        408,
        f"the request did not arrive within {timeout_s:g} s (send it faster, or in smaller calls)",
        code="request_timeout",
        headers={"Connection": "close"},
    )


def lingering(receive: Receive, send: Send) -> Send:
    """Return a `send` that reads on for a while between an answer and its end.

    A connection that is closed while something is unread is reset, and most clients send all of
    their body before they read: they would never see the answer.
    """

    async def send_and_read(message: Message) -> None:
        if message["type"] != "http.response.body":
            await send(message)
            return
        await send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})

    return send_and_read


def _replay(messages: Sequence[Message], receive: Receive) -> Receive:
    """Return a `receive` that begins with messages that have been read."""
    left = list(messages)[::-1]

    async def receive_again() -> Message:
        return left.pop() if left else await receive()

    return receive_again


def add_security(app: FastAPI, settings: ServerSettings, open_paths: Collection[str]) -> None:
    """Put everything before an application that the settings ask for.

    Args:
        app: What answers.
        settings: Keys, origins and sizes.
        open_paths: What needs no key.
    """
    # What is added last comes first.
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.read_timeout_s
    )
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=settings.api_keys, open_paths=open_paths)
    app.add_middleware(SameSite, is_local=settings.is_loopback, origins=settings.cors_origins)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=("Retry-After", "X-Request-Id"),
        )


def _digest(key: bytes) -> bytes:
    """Return something of one length for keys of any."""
    return hashlib.sha256(key).digest()


def _header(scope: Scope, name: bytes) -> str:
    """Return a header's value; empty if it is missing."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _without_port(host: str) -> str:
    if host.startswith("["):  # an IPv6 address
        return host.partition("]")[0].lstrip("[")
    return host.partition(":")[0]


__all__ = [
    "ApiKeys",
    "BodyLimit",
    "SameSite",
    "SecurityHeaders",
    "add_security",
    "lingering",
    "too_slow",
]
