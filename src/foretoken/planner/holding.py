"""What comes of a plan while it holds: tokens counted, nothing looked at more closely."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from foretoken.core.draft import Draft, source_names
from foretoken.core.verdict import Verdict
from foretoken.planner.base import Share, StepTimes

_LEAST_STEPS = 6  # before a plan is found wanting
_WANTING = 0.9  # of plain decoding's tokens per time; under it a plan is


class Holding:
    """Counts what comes of the plan that holds, from one planned step to the next.

    Args:
        always: Drafters whose tokens are no merit of any plan.
    """

    def __init__(self, always: Collection[str]) -> None:
        self._always = frozenset(always)
        self.begin(0.0)

    def begin(self, plain_rate: float) -> None:
        """Begin with a new plan.

        Args:
            plain_rate: Tokens per millisecond that plain decoding is expected to give.
        """
        self._plain_rate = plain_rate
        self._counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._alone: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._num_steps = self._num_tokens = 0
        self._ms = 0.0

    def count(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        total_s: float,
        *,
        is_union: bool = False,
    ) -> None:
        """Count a step in which somebody drafted; `is_union`: several drafters at once."""
        for share, draft, verdict in zip(shares, scored, verdicts, strict=True):
            if verdict is not None:
                counts = self._counts[share.request_id]
                counts[0] += 1
                counts[1] += self._num_merits(draft, verdict)
                if is_union:
                    self._count_alone(share.request_id, draft, verdict)
                self._num_tokens += len(verdict.token_ids)
        self._num_steps += 1
        self._ms += 1000.0 * total_s

    def _num_merits(self, draft: Draft, verdict: Verdict) -> int:
        if not self._always:
            return len(verdict.path)
        names = (source_names(draft.source[node]) for node in verdict.path)
        return sum(not self._always.issuperset(own) for own in names)

    def _count_alone(self, request_id: str, draft: Draft, verdict: Verdict) -> None:
        """Count for each drafter the tokens that it would have given without the others."""
        alone, left = self._alone[request_id], None
        for node in verdict.path:
            names = source_names(draft.source[node])
            left = names if left is None else [name for name in left if name in names]
            if not left:
                return
            for name in left:
                alone[name] += 1

    @property
    def is_wanting(self) -> bool:
        """Whether plain decoding would likely have given more, so that a new plan is due."""
        is_known = self._num_steps >= _LEAST_STEPS
        return is_known and self._num_tokens < _WANTING * self._plain_rate * self._ms

    def take(self, request_id: str) -> tuple[int, int, Mapping[str, int]]:
        """Return what was counted of a request, and forget it.

        Returns:
            Steps; draft tokens taken; and of these, by the name of each drafter that proposed any,
            those that it would have given alone.
        """
        num_steps, num_taken = self._counts.pop(request_id, (0, 0))
        return num_steps, num_taken, self._alone.pop(request_id, {})


def lost_s(verdicts: Sequence[Verdict | None], times: StepTimes, rate: float) -> float:
    """Return how many seconds longer a step took for its tokens than by another way.

    Args:
        verdicts: Of the step.
        times: Of the step.
        rate: Tokens per millisecond of the other way.
    """
    num_tokens = sum(len(verdict.token_ids) for verdict in verdicts if verdict)
    return times.total_s - num_tokens / rate / 1000.0


__all__ = ["Holding", "lost_s"]
