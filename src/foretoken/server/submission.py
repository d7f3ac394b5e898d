"""What is asked of the engine thread, what comes back, and what can go wrong between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foretoken.core.params import SamplingParams
from foretoken.engine.request import Emission, Request
from foretoken.errors import CapacityError, ForetokenError


class QueueFullError(CapacityError):
    """As many requests wait as may.

    Args:
        num_waiting: How many do.
        retry_after_s: When there is likely room again; whole seconds, at least 1.
    """

    def __init__(self, num_waiting: int, retry_after_s: int) -> None:
        super().__init__(
            f"the queue is full: {num_waiting} requests wait",
            hint=f"try again in {retry_after_s} s",
        )
        self.retry_after_s = retry_after_s


class ShuttingDownError(CapacityError):
    """The server takes no more requests.

    Args:
        retry_after_s: When another server may have taken its place; whole seconds, at least 1.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(
            "the server is shutting down and takes no more requests",
            hint=f"try again in {retry_after_s} s",
        )
        self.retry_after_s = retry_after_s


class DeadlineError(ForetokenError):
    """A request was given up because its time was over.

    Args:
        deadline_s: How long it had.
    """

    def __init__(self, deadline_s: float) -> None:
        super().__init__(
            f"the request did not finish within its {deadline_s:g} s",
            hint="ask for fewer tokens, allow more time or try again when there is less to do",
        )


class EngineFailedError(ForetokenError):
    """The engine failed while a request ran, or does not run any more.

    Args:
        cause: The kind of failure; its details are for the operator's log, not for clients.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"the engine failed: {cause}",
            hint="try again; if it stays so, the server's log says what happened",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One request to the engine.

    Args:
        request_id: Unique among unfinished requests.
        prompt_ids: At least one token id.
        params: What it asks.
        drafters: Labels of the drafters to use; None for all, empty for plain decoding.
        max_nodes: Most draft tokens per step; None for the engine's own bound.
        reference_ids: A text that the output may copy from; for drafters, never for the target.
        deadline_s: Seconds that it may take, from now on; None for the server's own bound, which
            holds in any case.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    drafters: tuple[str, ...] | None = None
    max_nodes: int | None = None
    reference_ids: Sequence[int] = ()
    deadline_s: float | None = None


class Running:
    """A submitted request, as its event loop sees it.

    Iterating yields, until the request has ended, lists of emissions: each all that has arrived
    since the last one was taken, so that who reads slowly reads less often. The last emission has
    a finish reason. The iteration of a request that was cancelled just ends.

    Args:
        request: The engine's; its statistics are complete when it has ended.
        on_end: Called once when nothing more will arrive, with the outcome: "finished",
            "cancelled", "deadline", "engine_failed" or "shutdown".
        deadline_s: Seconds that it may take in all; None for no bound.
        spent_s: Seconds of these that have gone by.

    Attributes:
        loop: The event loop on which it was submitted; everything here belongs to it.
        submitted_s: When, by `time.perf_counter`.

    Raises:
        DeadlineError: When iterating: its time is over, and the request is gone.
        EngineFailedError: When iterating: the engine failed while it ran.
        ShuttingDownError: When iterating: the server did not wait for it any longer.
    """

    def __init__(
        self,
        request: Request,
        on_end: Callable[[Running, str], None],
        *,
        deadline_s: float | None = None,
        spent_s: float = 0.0,
    ) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.submitted_s = time.perf_counter()
        self._on_end = on_end
        self._arrived: list[Emission] = []
        self._news = asyncio.Event()
        self._is_over = self._is_read_at_end = False
        self._error: ForetokenError | None = None
        self._timer: asyncio.TimerHandle | None = None
        if deadline_s is not None:
            error = DeadlineError(deadline_s)
            left_s = max(0.0, deadline_s - spent_s)
            self._timer = self.loop.call_later(left_s, self.fail, error, "deadline")

    @property
    def is_over(self) -> bool:
        """Whether nothing more will arrive."""
        return self._is_over

    def cancel(self) -> None:
        """Give the request up; what it holds is free within one step. Idempotent."""
        self._arrived.clear()
        self._end("cancelled")

    @property
    def is_read_at_end(self) -> bool:
        """Whether nobody looks before nothing more will arrive."""
        return self._is_read_at_end

    def deliver(self, emissions: Sequence[Emission]) -> None:
        """Take what steps gave, one at least."""
        if self._is_over:
            return
        self._arrived += emissions
        if not self._is_read_at_end:
            self._news.set()
        if emissions[-1].finish_reason is not None:
            self._end("finished")

    def fail(self, error: ForetokenError, outcome: str = "engine_failed") -> None:
        """End with an error, which is raised when all that has arrived was read."""
        if not self._is_over:
            self._error = error
            self._end(outcome)

    async def read_all(self) -> list[Emission]:
        """Return all emissions when there are no more: cheaper than taking them as they come.

        Raises:
            DeadlineError: As when iterating, and so do the other errors.
        """
        self._is_read_at_end = True
        while not self._is_over:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        return arrived

    def __aiter__(self) -> Running:
        return self

    async def __anext__(self) -> list[Emission]:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        arrived, self._arrived = self._arrived, []
        return arrived

    def _end(self, outcome: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._news.set()
        if self._timer is not None:
            self._timer.cancel()
        self._on_end(self, outcome)


__all__ = [
    "DeadlineError",
    "EngineFailedError",
    "QueueFullError",
    "Running",
    "ShuttingDownError",
    "Submission",
]
