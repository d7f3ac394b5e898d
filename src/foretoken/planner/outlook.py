"""What each way to draft promises at its best size: the plan's formula for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretoken.core.jit import jit
from foretoken.planner.gains import Arm

_ADVANTAGE = 1.02  # how much better a way has to be than the present one to replace it


@dataclass(frozen=True, slots=True)
class Outlook:
    """What ways to draft promise, each at its best size.

    Args:
        rates: Tokens per millisecond, [A].
        sizes: Draft tokens of all requests together that give it, >= 1, [A].
        draft_ms: What drafting so many takes, [A].
    """

    rates: NDArray[np.float64]
    sizes: NDArray[np.int64]
    draft_ms: NDArray[np.float64]

    def best(self, present: int | None, plain_rate: float) -> tuple[int | None, float]:
        """Return the way to take and its rate; the present one stays unless another is better.

        Args:
            present: The way that is taken now; None is plain decoding.
            plain_rate: Its tokens per millisecond.
        """
        best = int(self.rates.argmax())
        present_rate = plain_rate if present is None else float(self.rates[present])
        if self.rates[best] >= _ADVANTAGE * present_rate:
            present, present_rate = best, float(self.rates[best])
        return (present, present_rate) if present_rate > plain_rate else (None, plain_rate)


class Formula:
    """The plan's formula, before anything is drafted.

    `(requests + sum of the n best nodes' worth) / (drafting + step of n more rows)`, for every
    way to draft and every n. One compiled call: as a dozen array operations it would take longer,
    beside a small model, than the pass it plans.

    Args:
        arms: Ways to draft, A.
        labels: Their drafters, L.
    """

    def __init__(self, arms: Sequence[Arm], labels: Sequence[str]) -> None:
        self._members = np.array([[label in arm for label in labels] for arm in arms])
        # Compiled, or found in the cache, before a step waits for it.
        shape = (1, len(arms), 1)
        self.outlook(
            np.zeros(shape), np.ones(shape[:2], np.bool_), np.zeros((len(labels), 3)), np.ones(2)
        )

    def outlook(
        self,
        gains: NDArray[np.float64],
        able: NDArray[np.bool_],
        prices: NDArray[np.float64],
        step_ms: NDArray[np.float64],
    ) -> Outlook:
        """Return what every way promises.

        Args:
            gains: Expected tokens of the nodes of each request's draft, best first, [B, A, N].
            able: Which requests may draft in which way, [B, A].
            prices: Of each drafter: the time of a draft without levels, that of a level, both in
                milliseconds, and the usual number of levels, [L, 3].
            step_ms: Of a step with 0 to B * N draft tokens, drafting not counted, [1 + B * N].
        """
        best = _best_sizes(gains, able, self._members, prices, step_ms)
        return Outlook(best[:, 0], best[:, 1].astype(np.int64), best[:, 2])


@jit
def _best_sizes(
    gains: NDArray[np.float64],
    able: NDArray[np.bool_],
    members: NDArray[np.bool_],
    prices: NDArray[np.float64],
    step_ms: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return rate, size and drafting time of every way at its best size, [A, 3]."""
    num_requests, num_arms, num_nodes = gains.shape
    most = num_requests * num_nodes
    result = np.zeros((num_arms, 3))
    result[:, 1] = 1.0
    pooled = np.empty(most)
    for arm in range(num_arms):
        pooled[:] = 0.0
        for request in range(num_requests):
            if able[request, arm]:
                first = request * num_nodes
                pooled[first : first + num_nodes] = gains[request, arm]
        pooled.sort()
        tokens = float(num_requests)
        for size in range(1, most + 1):
            tokens += pooled[most - size]
            draft_ms = 0.0
            for label in range(len(prices)):
                if members[arm, label]:
                    levels = min(prices[label, 2], size / num_requests)
                    draft_ms += prices[label, 0] + prices[label, 1] * levels
            rate = tokens / (step_ms[size] + draft_ms)
            if rate > result[arm, 0]:
                result[arm, 0] = rate
                result[arm, 1] = size
                result[arm, 2] = draft_ms
    return result


__all__ = ["Formula", "Outlook"]
