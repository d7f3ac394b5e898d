"""What the engine's thread does: it carries out commands, runs steps and hands out what they give.

Nobody else touches the engine meanwhile, so nothing in it needs a lock.
"""

from __future__ import annotations

import logging
import queue
import time
from asyncio import AbstractEventLoop
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeAlias

from foretoken.engine.engine import Engine
from foretoken.engine.request import Emission
from foretoken.server.guard import guarded
from foretoken.server.observer import Observer
from foretoken.server.submission import EngineFailedError, Running

MAX_FAILURES = 3  # steps that fail one after the other, before the engine counts as broken

_log = logging.getLogger("foretoken.server")

_Batches: TypeAlias = defaultdict[AbstractEventLoop, list[tuple[Running, list[Emission]]]]


class EngineLoop:
    """Runs an engine until it is stopped; `run` is for a thread, the other methods for everybody.

    A step that fails ends the requests that have begun; those that still wait go on if the engine
    is sound. If it is not, every request fails, now and later, until the loop is stopped.

    Args:
        engine: The engine.
        observer: Is told of steps and of ends.

    Attributes:
        is_serving: Whether requests are taken care of.
        has_failed: Whether the engine is broken.
    """

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self.is_serving = False
        self.has_failed = False
        self._engine = engine
        self._observer = observer
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._admitted: dict[str, Running] = {}
        self._kept: dict[str, list[Emission]] = {}  # of requests that are read at their end
        self._num_failures = 0  # one after the other
        self._is_stopping = False

    def admit(self, runnings: Sequence[Running]) -> None:
        """Have requests queued in the engine."""
        self._commands.put(partial(self._admit, runnings))

    def end(self, running: Running, outcome: str) -> None:
        """Have a request ended; one that has ended by itself is left alone."""
        self._commands.put(partial(self._end, running, outcome))

    def stop(self) -> None:
        """Have the loop end after the step it is in."""
        self._commands.put(self._stop)

    def run(self) -> None:
        """Serve until stopped; what has not finished then is ended."""
        with guarded(self._engine), _watched(self._engine, self._observer):
            self.is_serving = True
            while not self._is_stopping:
                try:
                    self._obey()
                    if self._admitted:
                        self._hand_out(self._engine.step())
                        self._num_failures = 0
                except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
                    _log.exception("a step of the engine failed")
                    self._recover(error)
            for running in list(self._admitted.values()):
                self._end(running, "shutdown")
            self.is_serving = False

    # -- commands ----------------------------------------------------------------------------

    def _obey(self) -> None:
        """Carry out all commands; wait for one if there is nothing else to do."""
        is_idle = not self._admitted
        with suppress(queue.Empty):
            while True:
                self._commands.get(block=is_idle)()
                is_idle = False

    def _admit(self, runnings: Sequence[Running]) -> None:
        self._admitted |= {running.request.request_id: running for running in runnings}
        if self.has_failed:
            for running in runnings:
                self._leave(running, "engine_failed")
            _fail(runnings, EngineFailedError("it does not run any more"))
            return
        for running in runnings:
            try:
                self._engine.submit(running.request)
            except Exception as error:  # noqa: BLE001 - the others are to be queued
                _log.exception("request %s could not be queued", running.request.request_id)
                self._end(running, "engine_failed")
                _fail([running], EngineFailedError(type(error).__name__))

    def _end(self, running: Running, outcome: str) -> None:
        request = running.request
        if self._admitted.get(request.request_id) is running:
            self._engine.abort(request.request_id)
            self._leave(running, outcome)

    def _stop(self) -> None:
        self._is_stopping = True

    # -- what comes of steps -----------------------------------------------------------------

    def _hand_out(self, emissions: Iterable[Emission]) -> None:
        """Give requests what they got, with one call per event loop.

        What nobody looks at before the end is kept until then: a loop that wakes up in every step
        takes time from the next one.
        """
        at_s = time.perf_counter()
        batches: _Batches = defaultdict(list)
        for emission in emissions:
            running, reason = self._admitted[emission.request_id], emission.finish_reason
            kept = self._kept.setdefault(emission.request_id, [])
            kept.append(emission)
            self._observer.emitted(emission.request_id, len(emission.token_ids), at_s)
            if reason is None and running.is_read_at_end:
                continue
            batches[running.loop].append((running, kept))
            del self._kept[emission.request_id]
            if reason is not None:
                self._leave(running, reason.value)
        for loop, batch in batches.items():
            _call(loop, partial(_deliver, batch))

    def _leave(self, running: Running, outcome: str) -> None:
        """Forget a request that has left the engine."""
        request = running.request
        del self._admitted[request.request_id]
        self._kept.pop(request.request_id, None)
        started_s = request.stats.started_s
        waited_s = (started_s or time.perf_counter()) - running.submitted_s
        self._observer.finished(request, outcome, max(0.0, waited_s))

    def _recover(self, error: Exception) -> None:
        """End the requests that a failure may have touched, and see what is left."""
        self._num_failures += 1
        admitted = list(self._admitted.values())
        begun = [running for running in admitted if running.request.stats.started_s is not None]
        failed = begun or admitted  # one of them it was, or it will happen again
        try:
            for running in failed:
                self._end(running, "engine_failed")
            self._check_engine()
        except Exception:  # noqa: BLE001 - there is nothing left to rely on
            _log.exception("the engine is broken: no more requests are served")
            self.has_failed = True
            failed = admitted
            for running in list(self._admitted.values()):
                self._leave(running, "engine_failed")
        _fail(failed, EngineFailedError(type(error).__name__))

    def _check_engine(self) -> None:
        """Check that the engine holds what its requests need, and nothing else.

        Raises:
            RuntimeError: It does not, or it fails all the time.
        """
        engine = self._engine
        engine.cache.check_integrity()
        num_sequences, num_running = engine.cache.num_sequences, engine.num_running
        if num_sequences != num_running:
            raise RuntimeError(f"{num_sequences} cached sequences of {num_running} requests")
        if self._num_failures >= MAX_FAILURES:
            raise RuntimeError(f"{self._num_failures} steps failed one after the other")


@contextmanager
def _watched(engine: Engine, observer: Observer) -> Iterator[None]:
    """Let an observer watch an engine until the context ends; it serves in any case."""
    parts = engine.parts
    try:
        observer.watch(engine)
    except Exception:  # noqa: BLE001 - nobody waits for want of figures
        _log.exception("the engine cannot be watched: figures of steps are missing")
    try:
        yield
    finally:
        engine.parts = parts


def _deliver(batch: Sequence[tuple[Running, list[Emission]]]) -> None:
    for running, emissions in batch:
        running.deliver(emissions)


def _fail(runnings: Iterable[Running], error: EngineFailedError) -> None:
    for running in runnings:
        _call(running.loop, partial(running.fail, error))


def _call(loop: AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(function)


__all__ = ["EngineLoop"]
