"""Server-sent events: what arrives from the engine, as chunks that a client reads at its own pace.

A chunk is a plain object and goes out as soon as it is there. Between chunks a comment says that
the connection lives; when the client goes away its requests end at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from foretoken.engine.request import Emission
from foretoken.errors import ForetokenError
from foretoken.server.errors import describe, encode
from foretoken.server.params import Call
from foretoken.server.responses import (
    Writer,
    envelope,
    failure_of,
    joined,
    summary,
    usage,
)
from foretoken.server.submission import Running

KEEP_ALIVE_S = 10.0  # proxies give up silent connections after some 30 s
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_log = logging.getLogger("foretoken.server")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """An answer of server-sent events.

    Args:
        events: Encoded events.
        on_close: Called once when the answer ends, however it does.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(events, headers=HEADERS)
        self._events = events
        self._on_close = on_close
        self._sent_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, until all is sent or the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
            await self._events.aclose()

    async def stream_response(self, send: Send) -> None:
        """Send all events, and comments while there are none."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        beating = asyncio.create_task(self._keep_alive(send))
        try:
            async for event in self._events:
                await self._send_body(send, event)
        finally:
            beating.cancel()
        await self._send_body(send, b"", more_body=False)

    async def _send_body(self, send: Send, body: bytes, *, more_body: bool = True) -> None:
        self._sent_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": more_body})

    async def _keep_alive(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent_s = loop.time()
        while True:
            await asyncio.sleep(self._sent_s + KEEP_ALIVE_S - loop.time())
            if loop.time() - self._sent_s >= KEEP_ALIVE_S:
                await self._send_body(send, KEEP_ALIVE)


async def stream_events(
    call: Call,
    runnings: Sequence[Running],
    writers: Sequence[Writer],
    object_name: str,
    exactness: str,
) -> AsyncGenerator[bytes]:
    """Yield the events of a streamed answer, to its end or to an error, which is one of them."""
    begin = envelope(call, object_name)
    if call.has_usage:
        begin["usage"] = None
    num_left = len(runnings)
    try:
        async for index, emission in arrivals(runnings):
            chunk = writers[index].chunk(emission)
            content = {**begin, "choices": [chunk]}
            num_left -= emission.finish_reason is not None
            if num_left == 0:
                content["foretoken"] = summary(runnings, exactness)
            if chunk is not None:
                yield event(content)
            failure = failure_of(runnings[index].request, emission)
            if failure is not None:
                raise failure
        if call.has_usage:
            yield event({**begin, "choices": [], "usage": usage(call, runnings)})
    except ForetokenError as error:
        yield event(describe(error).body)
    except Exception as error:  # noqa: BLE001 - the answer has begun, and says how it ends
        _log.exception("stream %s failed", call.response_id)
        yield event(describe(error).body)
    yield DONE


async def arrivals(runnings: Sequence[Running]) -> AsyncGenerator[tuple[int, Emission]]:
    """Yield what arrives for several requests, each with its index, until all have ended."""
    if len(runnings) == 1:  # by far the most common case, and the cheapest
        async for emissions in runnings[0]:
            yield 0, joined(emissions)
        return
    # As long as a reader takes nothing, requests gather what arrives; none waits here twice.
    arrived: asyncio.Queue[tuple[int, list[Emission] | Exception | None]] = asyncio.Queue(1)
    pumps = [
        asyncio.create_task(_pump(index, running, arrived))
        for index, running in enumerate(runnings)
    ]
    try:
        num_left = len(pumps)
        while num_left:
            index, news = await arrived.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                num_left -= 1
            else:
                yield index, joined(news)
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(
    index: int,
    running: Running,
    arrived: asyncio.Queue[tuple[int, list[Emission] | Exception | None]],
) -> None:
    """Put what arrives for one request into a queue; None behind it, or what went wrong."""
    try:
        async for emissions in running:
            await arrived.put((index, emissions))
    except ForetokenError as error:
        await arrived.put((index, error))
    else:
        await arrived.put((index, None))


def event(content: object) -> bytes:
    """Return an object as an event."""
    return b"data: " + encode(content) + b"\n\n"


__all__ = ["EventStream", "arrivals", "event", "stream_events"]
