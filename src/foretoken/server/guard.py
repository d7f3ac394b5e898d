"""A drafter that breaks is left out; requests go on without it.

Drafts never decide what is said, so a server need not fail anybody because a drafter has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor

from foretoken.core.draft import Draft
from foretoken.core.params import SamplingParams
from foretoken.drafters.base import DraftContext, Drafter, Outcome, RequestView, StandingStates
from foretoken.drafters.in_flight import Growth, InFlightDrafter, InFlightNode
from foretoken.engine.engine import Engine
from foretoken.engine.step import check_draft
from foretoken.models.batch import RowStates

T = TypeVar("T")
Otherwise = TypeVar("Otherwise")
_log = logging.getLogger("foretoken.server")


class GuardedDrafter:
    """Passes everything on to a drafter, until that fails once; from then on it drafts nothing.

    Args:
        label: The drafter's, for the log.
        drafter: Who drafts.
        vocab_size: V of the target, for the check of what it returns.

    Attributes:
        is_broken: Whether it has failed.
    """

    def __init__(self, label: str, drafter: Drafter, vocab_size: int) -> None:
        self.is_broken = False
        self.drafter = drafter
        self._label = label
        self._vocab_size = vocab_size

    def __getattr__(self, name: str) -> Any:
        """Return what the drafter says of itself: taxonomy, draws, needs."""
        return getattr(self.drafter, name)

    def serves(self, params: SamplingParams, *, has_reference: bool) -> bool:
        """Return whether the drafter could draft for a request; never if it is broken."""
        return self._guarded(
            lambda: self.drafter.serves(params, has_reference=has_reference), otherwise=False
        )

    def start(self, request: RequestView) -> None:
        """Pass it on."""
        self._guarded(lambda: self.drafter.start(request), otherwise=None)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return the drafter's drafts if they keep its contract, else empty ones."""
        drafts = self._guarded(lambda: self._checked(contexts), otherwise=None)
        if drafts is None:
            return [Draft.empty(context.token_ids[-1]) for context in contexts]
        return drafts

    def grow(self, nodes: Sequence[InFlightNode], logits: Tensor, exit_loop: int) -> list[Growth]:
        """Return what the drafter makes of rows in flight; nothing if it is broken."""
        drafter = cast(InFlightDrafter, self.drafter)  # no other is asked
        growths = self._guarded(lambda: drafter.grow(nodes, logits, exit_loop), otherwise=None)
        return [Growth(None)] * len(nodes) if growths is None else growths

    def observe(self, standing: Sequence[StandingStates]) -> None:
        """Pass it on."""
        self._guarded(lambda: self.drafter.observe(standing), otherwise=None)

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Pass it on."""
        self._guarded(lambda: self.drafter.commit(outcomes), otherwise=None)

    def row_states(self, request_id: str, positions: range, draft: Draft) -> RowStates | None:
        """Return what the drafter knows of the rows; nothing if it is broken."""
        return self._guarded(
            lambda: self.drafter.row_states(request_id, positions, draft), otherwise=None
        )

    def stop(self, request_id: str) -> None:
        """Pass it on."""
        self._guarded(lambda: self.drafter.stop(request_id), otherwise=None)

    def close(self) -> None:
        """Pass it on."""
        self._guarded(self.drafter.close, otherwise=None)

    def _checked(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        drafts = self.drafter.propose(contexts)
        for context, draft in zip(contexts, drafts, strict=True):
            check_draft(self._label, draft, context, self._vocab_size)
        return drafts

    def _guarded(self, call: Callable[[], T], *, otherwise: Otherwise) -> T | Otherwise:
        if self.is_broken:
            return otherwise
        try:
            return call()
        except Exception:  # noqa: BLE001 - it may be anybody's code
            self.is_broken = True
            _log.exception("drafter %s failed and is left out from now on", self._label)
            return otherwise


@contextmanager
def guarded(engine: Engine) -> Iterator[None]:
    """Guard all drafters of an engine until the context ends."""
    before = dict(engine.drafters)
    vocab_size = engine.parts.target.info.vocab_size
    for label, drafter in before.items():
        guard = GuardedDrafter(label, drafter, vocab_size)
        engine.drafters[label] = cast(Drafter, guard)  # it answers all that drafters are asked
    try:
        yield
    finally:
        engine.drafters.update(before)


__all__ = ["GuardedDrafter", "guarded"]
