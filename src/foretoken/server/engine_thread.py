"""The engine as event loops see it: requests go in, and nobody waits for a step."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from foretoken.engine.llm import LLM
from foretoken.engine.request import Request
from foretoken.errors import CapacityError, ConfigError, ForetokenError, RequestError
from foretoken.server.engine_loop import EngineLoop
from foretoken.server.observer import Observer
from foretoken.server.settings import ServerSettings
from foretoken.server.submission import (
    DeadlineError,
    EngineFailedError,
    QueueFullError,
    Running,
    ShuttingDownError,
    Submission,
)
from foretoken.server.turnover import Turnover

State = Literal["starting", "ready", "draining", "failed", "stopped"]

COMPILE_S = 10.0  # that a grammar may take to compile, those before it included
# The compiler recurses along a grammar's references, and where the stack ends the process ends.
# Chains that were made to take as much as they can took 1 KiB for each byte of the grammar.
STACK_PER_GRAMMAR_BYTE = 4096
MIN_STACK_BYTES = 16 * 2**20
POLL_S = 0.02  # how often a drain looks whether all is done
JOIN_S = 10.0  # that the last step may take
HURRIED_JOIN_S = 0.5


class EngineThread:
    """Runs an engine in a thread of its own, for the requests of an event loop.

    While it runs nobody else may use the engine. A step that fails ends the requests that have
    begun, and those alone; a drafter that fails is left out from then on.

    Args:
        llm: Whose engine it is.
        settings: Its limits.
        observer: Is told what happens, some of it from the engine's thread.
    """

    def __init__(self, llm: LLM, settings: ServerSettings, observer: Observer) -> None:
        self._engine = llm.engine
        self._settings = settings
        self._observer = observer
        self._unfinished: dict[str, Running] = {}  # in the order in which they came
        self._num_building = 0
        self._turnover = Turnover()
        self._is_draining = self._is_hurried = self._is_stopped = False
        stack_bytes = max(MIN_STACK_BYTES, STACK_PER_GRAMMAR_BYTE * settings.max_grammar_bytes)
        self._builder = _large_thread("foretoken-build", stack_bytes)
        self._loop = EngineLoop(llm.engine, observer)
        self._thread = threading.Thread(target=self._loop.run, name="foretoken-engine", daemon=True)

    @property
    def state(self) -> State:
        """Where it is in its life."""
        if self._is_stopped:
            return "stopped"
        if self._loop.has_failed:
            return "failed"
        if self._is_draining:
            return "draining"
        return "ready" if self._loop.is_serving else "starting"

    @property
    def num_running(self) -> int:
        """Requests that take part in steps."""
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that were accepted and do not take part in steps yet, or not at the moment."""
        return max(0, len(self._unfinished) + self._num_building - self.num_running)

    @property
    def kv_used_share(self) -> float:
        """Share of the KV cache that is in use, 0 to 1."""
        cache = self._engine.cache
        return 1 - cache.num_free_blocks / cache.num_blocks

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    async def submit(self, submissions: Sequence[Submission]) -> list[Running]:
        """Queue requests, all or none.

        Everything about them is checked; grammars are compiled beside the event loop.

        Raises:
            RequestError: A request does not fit the model, or its id is in use.
            UnknownNameError: There is no such drafter.
            QueueFullError: Too many requests wait.
            CapacityError: Too many grammars wait.
            DeadlineError: The time was over before the requests were built.
            ShuttingDownError: No more requests are taken.
            EngineFailedError: The engine does not run any more.
        """
        start_s = time.perf_counter()
        self._check_open()
        self._check_ids(submissions)
        self._check_room(len(submissions))
        bounds = [self._deadline_s(submission) for submission in submissions]
        self._num_building += len(submissions)
        try:
            requests = await self._build(submissions, bounds)
        except (RequestError, ConfigError):
            self._observer.rejected("invalid")
            raise
        finally:
            self._num_building -= len(submissions)
        self._check_open()  # both may have changed meanwhile
        self._check_ids(submissions)
        spent_s = time.perf_counter() - start_s
        runnings = [
            Running(request, self._on_end, deadline_s=bound, spent_s=spent_s)
            for request, bound in zip(requests, bounds, strict=True)
        ]
        for running in runnings:
            self._unfinished[running.request.request_id] = running
            self._observer.submitted(running.request)
        self._loop.admit(runnings)
        return runnings

    def stop_accepting(self) -> None:
        """Take no more requests; may be called from a signal's handler."""
        self._is_draining = True

    def hurry(self) -> None:
        """Have a drain wait for nothing; may be called from a signal's handler."""
        self._is_hurried = True

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, let those that there are finish, and end the thread.

        Args:
            timeout_s: Seconds after which requests that still run are given up.
        """
        self.stop_accepting()
        end_s = time.monotonic() + timeout_s
        while (self._unfinished or self._num_building) and not self._is_hurried:
            if time.monotonic() >= end_s:
                break
            await asyncio.sleep(POLL_S)
        for running in list(self._unfinished.values()):
            running.fail(self._shutting_down(), "shutdown")
        await asyncio.to_thread(self.stop)

    def stop(self) -> bool:
        """End the thread after the step that it is in; return whether it has ended in time."""
        self.stop_accepting()
        self._builder.shutdown(wait=False, cancel_futures=True)
        self._loop.stop()
        if self._thread.ident is not None:  # it was started
            self._thread.join(HURRIED_JOIN_S if self._is_hurried else JOIN_S)
        self._is_stopped = True
        return not self._thread.is_alive()

    # -- taking requests ---------------------------------------------------------------------

    def _check_open(self) -> None:
        state = self.state
        if state == "failed":
            raise EngineFailedError("it does not run any more")
        if state in ("draining", "stopped"):
            self._observer.rejected("shutting_down")
            raise self._shutting_down()

    def _check_ids(self, submissions: Sequence[Submission]) -> None:
        counts = Counter(submission.request_id for submission in submissions)
        for request_id, count in counts.items():
            if count > 1 or request_id in self._unfinished:
                raise RequestError(f"request id {request_id!r} is in use", hint="choose another")

    def _check_room(self, num_new: int) -> None:
        num_places = self._engine.max_requests + self._settings.max_queue
        if num_new > num_places:
            raise RequestError(
                f"one call asks for {num_new} outputs; the server holds {num_places} at a time",
                hint="ask for fewer outputs per call",
            )
        num_unfinished = len(self._unfinished) + self._num_building
        num_over = num_unfinished + num_new - num_places
        if num_over > 0:
            oldest = next(iter(self._unfinished.values()), None)
            busy_s = time.perf_counter() - oldest.submitted_s if oldest else 0.0
            self._observer.rejected("queue_full")
            raise QueueFullError(
                self.num_waiting, self._turnover.retry_after_s(num_over, num_unfinished, busy_s)
            )

    def _shutting_down(self) -> ShuttingDownError:
        return ShuttingDownError(max(1, round(self._settings.drain_s)))

    def _deadline_s(self, submission: Submission) -> float | None:
        bounds = (self._settings.deadline_s, submission.deadline_s)
        return min((bound for bound in bounds if bound is not None), default=None)

    async def _build(
        self, submissions: Sequence[Submission], bounds: Sequence[float | None]
    ) -> list[Request]:
        if not any(submission.params.has_grammar for submission in submissions):
            return self._new_requests(submissions)  # takes less time than to hand it to a thread
        building = self._builder.submit(self._new_requests, submissions)
        shortest_s = min(bound for bound in (*bounds, math.inf) if bound is not None)
        try:
            async with asyncio.timeout(min(shortest_s, COMPILE_S)):
                return await asyncio.wrap_future(building)
        except TimeoutError:
            if shortest_s <= COMPILE_S:
                raise DeadlineError(shortest_s) from None
            raise _too_long_to_compile(has_begun=not building.cancelled()) from None

    def _new_requests(self, submissions: Sequence[Submission]) -> list[Request]:
        return [
            self._engine.new_request(
                submission.prompt_ids,
                submission.params,
                drafters=submission.drafters,
                request_id=submission.request_id,
                reference_ids=submission.reference_ids,
                max_nodes=submission.max_nodes,
            )
            for submission in submissions
        ]

    def _on_end(self, running: Running, outcome: str) -> None:
        del self._unfinished[running.request.request_id]
        self._turnover.count_finish()
        if outcome != "finished":
            self._loop.end(running, outcome)


def _large_thread(name: str, stack_bytes: int) -> ThreadPoolExecutor:
    """Return a pool of one thread with a stack of its own size."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    before = threading.stack_size(stack_bytes)
    try:
        pool.submit(int).result()  # which starts the thread
    finally:
        threading.stack_size(before)
    return pool


def _too_long_to_compile(*, has_begun: bool) -> ForetokenError:
    """Return the error of a grammar that was given up."""
    if has_begun:
        return RequestError(
            f"the grammar took more than {COMPILE_S:g} s to compile",
            hint="use fewer alternatives and smaller repetition counts",
        )
    return CapacityError(
        f"other grammars were being compiled for {COMPILE_S:g} s", hint="try again"
    )


__all__ = ["EngineThread", "State"]
