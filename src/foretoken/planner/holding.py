"""What comes of a plan while it holds: tokens counted, nothing looked at more closely."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from foretoken.core.draft import Draft, source_names
from foretoken.core.verdict import Verdict
from foretoken.planner.base import Share
from foretoken.planner.choices import Passed, Seen

_LEAST_STEPS = 6  # before a plan is found wanting
_WANTING = 0.9  # of plain decoding's tokens per time; under it a plan is
_PRIOR_VARIANCE = 0.5  # of the tokens of all steps, where none has differed from the others


@dataclass(slots=True)
class Tally:
    """Tokens of drafts that were taken.

    Args:
        num_taken: How many.
        num_squares: Sum of the squares of those of each draft.
    """

    num_taken: int = 0
    num_squares: int = 0

    def add(self, num_taken: int) -> None:
        """Count one draft."""
        self.num_taken += num_taken
        self.num_squares += num_taken * num_taken


@dataclass(slots=True)
class Counts:
    """What came of drafts for one request.

    Args:
        temperature: Of the request.
        drafters: That it may have.
        num_steps: In which there were drafts.
        taken: What was taken of them.
        alone: Where several drafters drafted, by the name of each that proposed any of the tokens
            said, what it would have given alone.
    """

    temperature: float
    drafters: Sequence[str]
    num_steps: int = 0
    taken: Tally = field(default_factory=Tally)
    alone: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))


class Holding:
    """Counts what comes of the plan that holds, from one planned step to the next.

    Args:
        always: Drafters whose tokens are no merit of any plan.

    Attributes:
        plain_rate: Tokens per millisecond that plain decoding is expected to give.
    """

    def __init__(self, always: Collection[str]) -> None:
        self._always = frozenset(always)
        self.begin(0.0)

    def begin(self, plain_rate: float) -> None:
        """Begin with a new plan.

        Args:
            plain_rate: Tokens per millisecond that plain decoding is expected to give.
        """
        self.plain_rate = plain_rate
        self._counts: dict[str, Counts] = {}
        self._num_steps = self._num_tokens = self._num_squares = 0
        self._ms = 0.0

    def count(
        self, steps: Sequence[Seen], *, is_union: bool = False, is_usual: bool = True
    ) -> None:
        """Count steps in which somebody drafted, several drafters at once if it is a union.

        One that is not usual, such as the first of a trial, which is planned and may have to read
        what was missed, says nothing of how fast the plan is. What each of several drafters would
        have given alone is counted by what it proposed: who is cut away because little is known
        of him is to become known nonetheless.
        """
        for seen in steps:
            num_tokens = 0
            for place, verdict in enumerate(seen.verdicts):
                if verdict is not None:
                    share = seen.shares[place]
                    counts = self._counts_of(share)
                    counts.num_steps += 1
                    counts.taken.add(self._num_merits(share, seen.scored[place], verdict))
                    if is_union:
                        _count_alone(counts.alone, seen.proposed[place], verdict.token_ids)
                    num_tokens += len(verdict.token_ids)
            if is_usual:
                self._num_tokens += num_tokens
                self._num_squares += num_tokens * num_tokens
                self._num_steps += 1
                self._ms += 1000.0 * seen.times.total_s

    def count_passed(self, passed: Passed) -> None:
        """Count steps of which numbers are known: usual ones of one drafter, no other beside it."""
        for share, taken in zip(passed.shares, passed.taken, strict=True):
            if taken:
                counts = self._counts_of(share)
                counts.num_steps += len(taken)
                counts.taken.num_taken += sum(taken)
                counts.taken.num_squares += sum(num * num for num in taken)
        self._num_tokens += sum(passed.num_tokens)
        self._num_squares += sum(num * num for num in passed.num_tokens)
        self._num_steps += len(passed.num_tokens)
        self._ms += 1000.0 * sum(passed.seconds)

    def _counts_of(self, share: Share) -> Counts:
        counts = self._counts.get(share.request_id)
        if counts is None:
            counts = self._counts[share.request_id] = Counts(share.temperature, share.drafters)
        return counts

    def _num_merits(self, share: Share, draft: Draft, verdict: Verdict) -> int:
        if self._always.isdisjoint(share.drafters):
            return len(verdict.path)
        names = (source_names(draft.source[node]) for node in verdict.path)
        return sum(not self._always.issuperset(own) for own in names)

    @property
    def is_wanting(self) -> bool:
        """Whether plain decoding would likely have given more, so that a new plan is due.

        By more than the luck of so many steps: plans that are mostly good have bad moments.
        """
        num_steps, num_tokens = self._num_steps, self._num_tokens
        if num_steps < _LEAST_STEPS:
            return False
        variance = self._num_squares - num_tokens * num_tokens / num_steps + _PRIOR_VARIANCE
        return num_tokens + math.sqrt(variance) < _WANTING * self.plain_rate * self._ms

    @property
    def rate(self) -> float | None:
        """Tokens per millisecond that the plan gives; None as long as that is not known."""
        return self._num_tokens / self._ms if self._num_steps >= _LEAST_STEPS else None

    def take(self, request_id: str) -> Counts | None:
        """Return what was counted of a request, if anything was, and forget it."""
        return self._counts.pop(request_id, None)


def _count_alone(alone: defaultdict[str, Tally], draft: Draft, token_ids: Sequence[int]) -> None:
    """Count for each drafter of a union the tokens that it would have given without the others."""
    given: Counter[str] = Counter()
    left: list[str] | None = None
    for node in draft.tree.match(token_ids):
        names = source_names(draft.source[node])
        left = names if left is None else [name for name in left if name in names]
        if not left:
            break
        given.update(left)
    for name, num_taken in given.items():
        alone[name].add(num_taken)


__all__ = ["Counts", "Holding", "Tally"]
