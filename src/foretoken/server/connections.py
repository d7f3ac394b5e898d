"""How many connections are open, and how long a client may take to say what it wants.

uvicorn bounds neither: it waits for ever for the rest of a request, and what it does above
`limit_concurrency` leaves silent connections alone. The body's time is `security.BodyLimit`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from foretoken.server.errors import Failure
from foretoken.server.security import lingering, too_slow
from foretoken.server.settings import ServerSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

NUM_SPARE = 32  # connections beyond the bound, on which a health check or a refusal finds room
RETRY_AFTER_S = 1


class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # h11's or httptools'
    """uvicorn's connection, with a bound on their number and one on the time of a request's head.

    The connections beyond the bound answer health checks, and refuse everything else with 503;
    when even these are taken, new ones are closed at once.

    Args:
        settings: The bounds.
        open_paths: What is answered beyond the bound, too.
        uvicorns: What uvicorn passes.
    """

    app: Any  # uvicorn's, for the requests of this connection

    def __init__(
        self, settings: ServerSettings, open_paths: Collection[str], **uvicorns: Any
    ) -> None:
        super().__init__(**uvicorns)
        self._settings = settings
        self._open_paths = open_paths
        self._head_timer: asyncio.TimerHandle | None = None
        self._has_begun = False  # whether anything of a head has come

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Count the connection, and begin to wait for its first request."""
        super().connection_made(transport)
        num_over = len(self.connections) - self._settings.max_connections
        if num_over > NUM_SPARE:
            transport.abort()
            return
        if num_over > 0:
            self.app = Overloaded(self.app, self._settings.max_connections, self._open_paths)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read on; the clock stops when a head is whole."""
        if not self._is_answering:
            self._has_begun = True
            if self._head_timer is None:
                self._await_head()
        super().data_received(data)
        if self._is_answering:
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go."""
        self._stop_clock()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._settings.read_timeout_s, self._give_up)

    def _stop_clock(self) -> None:
        self._has_begun = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        """Close; who has sent nothing is told nothing, since it may take that for an answer."""
        if self.transport.is_closing():
            return
        if self._has_begun:
            self.transport.write(_raw_response(too_slow(self._settings.read_timeout_s)))
        self.transport.close()


class Overloaded:
    """Refuses everything but a few paths, and closes the connection.

    Args:
        app: What answers these.
        max_connections: The bound, for the message.
        open_paths: These.
    """

    def __init__(self, app: ASGIApp, max_connections: int, open_paths: Collection[str]) -> None:
        self._app = app
        self._open_paths = open_paths
        self._refusal = Failure(
            503,
            f"the server has its {max_connections} connections (try again in {RETRY_AFTER_S} s)",
            code="too_many_connections",
            headers={"Retry-After": str(RETRY_AFTER_S), "Connection": "close"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        await self._refusal.response()(scope, receive, lingering(receive, send))


def bounded_protocol(
    settings: ServerSettings, open_paths: Collection[str]
) -> type[asyncio.Protocol]:
    """Return what makes uvicorn's connections."""
    return cast("type[asyncio.Protocol]", partial(BoundedProtocol, settings, open_paths))


def _raw_response(failure: Failure) -> bytes:
    """Return a refusal as it stands on the wire, for a request that has no application yet."""
    response = failure.response()
    lines = [b"HTTP/1.1 408 Request Timeout"]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


__all__ = ["BoundedProtocol", "Overloaded", "bounded_protocol"]
