"""A client that asks at given times, whatever the answers take, and notes when they come."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 300.0  # without a byte; a request that takes longer is an error
TOO_MANY_REQUESTS = 429
EVENT = b"data: "
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Ask:
    """A request.

    Args:
        at_s: When it is due, from the beginning of a replay.
        prompt_ids: Its prompt.
        num_new_tokens: Always all of them are made.
        seed: Of its noise.
    """

    at_s: float
    prompt_ids: Sequence[int]
    num_new_tokens: int
    seed: int


@dataclass(slots=True)
class Reply:
    """What became of a request; times are from when it was due, so that waiting to be sent counts.

    Args:
        ask: The request.
        late_s: When it was sent.
        first_s: When its first text was there; None if none was.
        last_s: When all was there.
        ended_s: The same from the beginning, where requests follow each other.
        num_tokens: Of the output.
        digest: Of the text: equal for equal texts.
        stats: What the server says of it: steps, draft tokens, accepted ones.
        exactness: What the server says of its own.
        is_rejected: Whether the server had no room for it.
        error: What else went wrong; empty if nothing did.
    """

    ask: Ask
    late_s: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    ended_s: float = 0.0
    num_tokens: int = 0
    digest: str = ""
    stats: dict[str, Any] | None = None
    exactness: str = ""
    is_rejected: bool = False
    error: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether all of the output is there."""
        return not self.is_rejected and not self.error

    @property
    def inter_token_s(self) -> float | None:
        """Mean seconds from one token to the next; None where there is but one."""
        if self.first_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


class LoadClient:
    """Streams completions of one server.

    Args:
        base_url: Of the server.
        model: As the server calls it.
        temperature: Of all requests.
    """

    def __init__(self, base_url: str, model: str, temperature: float) -> None:
        self._base_url = base_url
        self._fields = {
            "model": model,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def replay(self, asks: Sequence[Ask]) -> list[Reply]:
        """Send every request when it is due; return what became of them when all have ended.

        Args:
            asks: In the order of their times.
        """
        return asyncio.run(self._replay(asks))

    def keep_busy(self, asks: Iterator[Ask], num_at_once: int, duration_s: float) -> list[Reply]:
        """Keep so many requests going for a time; return those that ended within it.

        Args:
            asks: As many as it takes; their times mean nothing.
            num_at_once: Each that ends is followed by the next one.
            duration_s: What has not ended then is given up.
        """
        return asyncio.run(self._keep_busy(asks, num_at_once, duration_s))

    async def _replay(self, asks: Sequence[Ask]) -> list[Reply]:
        bodies = [self._body(ask) for ask in asks]  # while there is time
        sent = []
        async with _connected(self._base_url) as http:
            start_s = time.perf_counter()
            for ask, body in zip(asks, bodies, strict=True):
                await asyncio.sleep(max(0.0, start_s + ask.at_s - time.perf_counter()))
                sent.append(asyncio.create_task(_send(http, ask, body, start_s + ask.at_s)))
            return await asyncio.gather(*sent)

    async def _keep_busy(
        self, asks: Iterator[Ask], num_at_once: int, duration_s: float
    ) -> list[Reply]:
        replies: list[Reply] = []

        async def work(http: httpx.AsyncClient) -> None:
            for ask in asks:
                reply = await _send(http, ask, self._body(ask), time.perf_counter())
                reply.ended_s = time.perf_counter() - start_s
                replies.append(reply)

        async with _connected(self._base_url) as http:
            start_s = time.perf_counter()
            workers = [asyncio.create_task(work(http)) for _ in range(num_at_once)]
            done, going = await asyncio.wait(workers, timeout=duration_s)
            for worker in going:
                worker.cancel()
            await asyncio.gather(*going, return_exceptions=True)  # what was cancelled says so
            await asyncio.gather(*done)
        return replies

    def _body(self, ask: Ask) -> bytes:
        fields = {"prompt": ask.prompt_ids, "max_tokens": ask.num_new_tokens, "seed": ask.seed}
        return json.dumps({**self._fields, **fields}).encode()


@asynccontextmanager
async def _connected(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that never makes a request wait for a connection."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(
        base_url=base_url, headers=headers, limits=limits, timeout=TIMEOUT_S, trust_env=False
    ) as http:
        yield http


async def _send(http: httpx.AsyncClient, ask: Ask, body: bytes, due_s: float) -> Reply:
    """Return what becomes of one request, whatever that is."""
    import httpx

    reply = Reply(ask, late_s=time.perf_counter() - due_s)
    content = bytearray()
    try:
        async with http.stream("POST", "/v1/completions", content=body) as answer:
            async for piece in answer.aiter_raw():
                if reply.first_s is None and piece.startswith(EVENT):
                    reply.first_s = time.perf_counter() - due_s
                content += piece
        reply.last_s = time.perf_counter() - due_s
        _read(reply, answer.status_code, bytes(content))
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    return reply


def _read(reply: Reply, status: int, content: bytes) -> None:
    """Read an answer that is whole."""
    if status == TOO_MANY_REQUESTS:
        reply.is_rejected = True
        return
    if status != 200:
        reply.error = f"status {status}: {content[:200].decode(errors='replace')}"
        return
    text = hashlib.sha256()
    lines = [line[len(EVENT) :] for line in content.split(b"\n\n") if line.startswith(EVENT)]
    for line in lines:
        if line == DONE:
            continue
        event = json.loads(line)
        if "error" in event:
            reply.error = str(event["error"].get("message", event["error"]))
            return
        for choice in event["choices"]:
            text.update(choice["text"].encode())
        if event.get("foretoken"):
            [reply.stats] = event["foretoken"]["stats"]
            reply.exactness = event["foretoken"]["exactness"]
        if event.get("usage"):
            reply.num_tokens = event["usage"]["completion_tokens"]
    reply.digest = text.hexdigest()
    if lines[-1:] != [DONE] or reply.num_tokens != reply.ask.num_new_tokens:
        reply.error = (
            f"the answer is not whole: {reply.num_tokens} of {reply.ask.num_new_tokens} tokens"
        )


__all__ = ["Ask", "LoadClient", "Reply"]
