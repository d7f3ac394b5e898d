"""The server's birth and end: its socket, its health, and what signals do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from foretoken.errors import ConfigError
from foretoken.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    # Whether an address is free is asked before anything heavy is imported.
    from foretoken.server.engine_thread import EngineThread

HEALTH_PATHS = frozenset({"/health", "/ready"})
BACKLOG = 2048  # connections that the system keeps until they are accepted


def health_router(thread: EngineThread, settings: ServerSettings) -> APIRouter:
    """Return /health, whether to let the process live, and /ready, whether to send it requests."""
    router = APIRouter(tags=["health"])
    retry = {"Retry-After": str(max(1, round(settings.drain_s)))}

    @router.get("/health", responses={503: {"description": "The engine is broken."}})
    async def health() -> JSONResponse:
        """Say whether the server works: 503 when it has to be started anew."""
        state = thread.state
        return JSONResponse({"status": state}, 503 if state == "failed" else 200)

    @router.get("/ready", responses={503: {"description": "It is not the time for requests."}})
    async def ready() -> JSONResponse:
        """Say whether requests are taken: 503 while starting, draining or broken."""
        state = thread.state
        if state == "ready":
            return JSONResponse({"status": state})
        return JSONResponse({"status": state}, 503, retry)

    return router


def make_lifespan(
    thread: EngineThread, settings: ServerSettings
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return what an application does before its first request and after its last one."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        thread.start()
        try:
            yield
        finally:
            await thread.drain(settings.drain_s)

    return lifespan


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address, so that nobody else can take it.

    Raises:
        ConfigError: The address is in use, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        # A server that has just stopped leaves its address in a waiting state; a running one is
        # still found out.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    reason = (error.strerror or str(error)).lower()
    return ConfigError(
        f"cannot listen on {host}:{port}: {reason}",
        hint="choose another --port, or stop the program that has this one"
        if "use" in reason
        else "choose a --host of this machine and a --port that you may use",
    )


def url_of(listener: socket.socket, host: str) -> str:
    """Return the address under which a listening socket is reached from this machine."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with the end that we want: the first signal drains, the second one stops at once.

    Args:
        config: uvicorn's.
        thread: Takes no more requests from the first signal on.
        on_start: Called when it listens.
        on_signal: Called at the first signal.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        thread: EngineThread,
        *,
        on_start: Callable[[], None] = lambda: None,
        on_signal: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._engine_thread = thread
        self._on_start = on_start
        self._on_signal = on_signal
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._event_loop = asyncio.get_running_loop()
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's
        """Drain, or stop at once if that was asked for before."""
        if not self.should_exit:
            self._engine_thread.stop_accepting()
            self.should_exit = True
            self._on_signal()
            return
        self.force_exit = True
        self._engine_thread.hurry()
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._drop_connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; the application does so in any case, if only to say what it leaves."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def _drop_connections(self) -> None:
        """Let go of all clients; who serves them learns that they have gone."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def uvicorn_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    """Return how uvicorn serves an application; logs are not its business."""
    # Heavy, like the application; an address is asked for before either.
    from foretoken.server.connections import bounded_protocol

    return uvicorn.Config(
        app,
        http=bounded_protocol(settings, HEALTH_PATHS),
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )


__all__ = [
    "HEALTH_PATHS",
    "Server",
    "bind",
    "health_router",
    "make_lifespan",
    "url_of",
    "uvicorn_config",
]
