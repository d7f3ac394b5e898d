"""Watching an engine decide: which rows chose which tokens, and below which drafts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Exactness, FinalKind, Verdict
from foretoken.engine.engine import Engine
from foretoken.engine.request import FinishReason, Request
from foretoken.models.adapter import LanguageModel
from foretoken.verifiers.base import TargetRows, Verifier


class Decision(NamedTuple):
    """One verdict with what it was made of.

    Attributes:
        draft: What was scored.
        rows: The target's at its nodes.
        sampler: The request's own, by which it is known.
        verdict: What was kept.
    """

    draft: Draft
    rows: TargetRows
    sampler: Sampler
    verdict: Verdict

    @property
    def chosen_rows(self) -> list[Tensor]:
        """Copies of the rows that chose the verdict's tokens, [V] each, on CPU."""
        nodes = (ROOT, *self.verdict.path)
        return [self.rows.logits[node].to("cpu", copy=True) for node in nodes]


Watch = Callable[[Decision], None]


class PlainRule:
    """The target's own choice after the root, whatever was drafted: plain decoding.

    A certificate's reference. It shares no code with the rules that it is compared with.
    """

    exactness: ClassVar[Exactness] = Exactness.BITWISE
    draws: ClassVar[tuple[SiblingDraw, ...]] = tuple(SiblingDraw)
    max_width: ClassVar[int | None] = None
    max_drafters: ClassVar[int | None] = None

    def verify(
        self,
        draft: Draft,  # noqa: ARG002 - part of the contract
        rows: TargetRows,
        sampler: Sampler,
        token_ids: Sequence[int],
    ) -> Verdict:
        """Return the one token."""
        return Verdict((), (sampler.choose(rows.logits[ROOT], token_ids),), FinalKind.BONUS)


class WatchedRule:
    """Another rule, watched.

    Args:
        rule: Decides.
        watch: Is told.
    """

    exactness: ClassVar[Exactness] = Exactness.LOSSY  # nobody asks; the rule's own counts
    draws: ClassVar[tuple[SiblingDraw, ...]] = tuple(SiblingDraw)
    max_width: ClassVar[int | None] = None
    max_drafters: ClassVar[int | None] = None

    def __init__(self, rule: Verifier, watch: Watch) -> None:
        self._rule = rule
        self._watch = watch

    def verify(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> Verdict:
        """Return the rule's verdict."""
        verdict = self._rule.verify(draft, rows, sampler, token_ids)
        self._watch(Decision(draft, rows, sampler, verdict))
        return verdict


@contextmanager
def watched(engine: Engine, watch: Watch, *, rule: Verifier | None = None) -> Iterator[None]:
    """Watch an idle engine for as long as the context lasts.

    Args:
        engine: Used by nobody else meanwhile.
        watch: Told of every verdict.
        rule: Decides in place of the engine's own.
    """
    parts = engine.parts
    engine.parts = replace(parts, verifier=WatchedRule(rule or parts.verifier, watch))
    try:
        yield
    finally:
        engine.parts = parts


def target_of(engine: Engine) -> LanguageModel:
    """Return the model that the engine serves."""
    return engine.parts.target


def rule_of(engine: Engine) -> Verifier:
    """Return the engine's acceptance rule."""
    return engine.parts.verifier


def agreed_draws(engine: Engine) -> Mapping[str, SiblingDraw]:
    """Return how each drafter draws siblings when sampling."""
    return engine.parts.draws


def decode(engine: Engine, requests: Sequence[Request], batch_size: int) -> Iterator[Request]:
    """Run requests, as many at once as the batch size says, and yield each when it is finished.

    They join and leave at any step, as a server's do.

    Raises:
        RequestError: Something of a request's own went wrong.
    """
    waiting = deque(requests)
    running: dict[str, Request] = {}
    try:
        while waiting or running:
            while waiting and len(running) < batch_size:
                request = waiting.popleft()
                engine.submit(request)
                running[request.request_id] = request
            for emission in engine.step():
                if emission.finish_reason is None:
                    continue
                finished = running.pop(emission.request_id)
                if finished.finish_reason is FinishReason.ERROR and finished.error is not None:
                    raise finished.error
                yield finished
    finally:
        for request_id in list(running):
            engine.abort(request_id)


class RowLog:
    """The rows that chose the tokens of requests, in the order of the tokens.

    Args:
        requests: Whose rows are wanted.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._rows: dict[int, list[Tensor]] = {id(request.sampler): [] for request in requests}

    def watch(self, decision: Decision) -> None:
        """Keep the rows of one verdict."""
        kept = self._rows.get(id(decision.sampler))
        if kept is not None:
            kept += decision.chosen_rows

    def rows(self, request: Request) -> list[Tensor]:
        """Return the row, [V], of each output token; those of tokens that were cut are left out."""
        return self._rows[id(request.sampler)][: len(request.output_ids)]


__all__ = [
    "Decision",
    "PlainRule",
    "RowLog",
    "Watch",
    "WatchedRule",
    "agreed_draws",
    "decode",
    "rule_of",
    "target_of",
    "watched",
]
