"""From a call to its answer, whole or streamed; what nobody waits for any more is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from foretoken.engine.llm import LLM
from foretoken.server.engine_thread import EngineThread
from foretoken.server.errors import json_response
from foretoken.server.params import Call
from foretoken.server.responses import (
    Kind,
    Writer,
    envelope,
    failure_of,
    joined,
    summary,
    usage,
)
from foretoken.server.streaming import EventStream, stream_events
from foretoken.server.submission import Running
from foretoken.server.token_texts import TokenTexts

CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it


class Answerer:
    """Answers calls with an engine.

    Args:
        thread: The engine's.
        llm: Whose engine it is.
    """

    def __init__(self, thread: EngineThread, llm: LLM) -> None:
        self._thread = thread
        self._llm = llm
        self._texts = TokenTexts(llm)

    async def answer(self, request: Request, call: Call, kind: Kind) -> Response:
        """Return the answer to a call; a streamed one begins when its requests are accepted."""
        runnings = await self._thread.submit(call.submissions)
        writers = [
            kind.make_writer(call, index, running.request, self._texts)
            for index, running in enumerate(runnings)
        ]
        exactness = self._llm.engine.exactness.value
        if call.is_stream:
            events = stream_events(call, runnings, writers, kind.chunk_object, exactness)
            return EventStream(events, lambda: _cancel(runnings))
        try:
            choices = await _unless_gone(request, _whole(runnings, writers))
        finally:
            _cancel(runnings)
        if choices is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return json_response(
            {
                **envelope(call, kind.whole_object),
                "choices": choices,
                "usage": usage(call, runnings),
                "foretoken": summary(runnings, exactness),
            }
        )


async def _whole(runnings: Sequence[Running], writers: Sequence[Writer]) -> list[dict[str, Any]]:
    """Return all choices when they are finished."""
    choices = []
    for running, writer in zip(runnings, writers, strict=True):
        emission = joined(await running.read_all())
        failure = failure_of(running.request, emission)
        if failure is not None:
            raise failure
        choices.append(writer.whole(emission))
    return choices


async def _unless_gone(request: Request, work: Any) -> Any:
    """Return what some work gives; None if the client goes away before."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cancel(runnings: Sequence[Running]) -> None:
    for running in runnings:
        running.cancel()


__all__ = ["Answerer"]
