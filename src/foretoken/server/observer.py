"""Who watches the engine serve: told of every request and step, and never asked for anything."""

from __future__ import annotations

from collections.abc import Sequence

from foretoken.engine.engine import Engine
from foretoken.engine.request import Request


class Observer:
    """Is told what happens to requests; methods that are not overridden do nothing.

    Calls come from the event loop and from the engine's thread, in any order between the two, so
    they are quick and raise nothing. Moments are those of `time.perf_counter`.
    """

    def watch(self, engine: Engine) -> None:
        """Prepare to watch an engine; called once, before its first step."""

    def submitted(self, request: Request) -> None:
        """A request was accepted; called where its HTTP request is handled."""

    def rejected(self, reason: str) -> None:
        """A request was turned away, for one of a few reasons such as "queue_full"."""

    def emitted(self, request_id: str, num_tokens: int, at_s: float) -> None:
        """A step that ended at `at_s` gave a request so many tokens."""

    def finished(self, request: Request, outcome: str, waited_s: float) -> None:
        """A request has left the engine.

        Args:
            request: As it is at its end.
            outcome: Its finish reason, or what ended it from outside, such as "deadline".
            waited_s: Seconds that it waited until it was first scheduled.
        """


class Observers(Observer):
    """Several observers as one; each is told in the order given.

    Args:
        observers: Who is told.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def watch(self, engine: Engine) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.watch(engine)

    def submitted(self, request: Request) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.submitted(request)

    def rejected(self, reason: str) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.rejected(reason)

    def emitted(self, request_id: str, num_tokens: int, at_s: float) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.emitted(request_id, num_tokens, at_s)

    def finished(self, request: Request, outcome: str, waited_s: float) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.finished(request, outcome, waited_s)


__all__ = ["Observer", "Observers"]
