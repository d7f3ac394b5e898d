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
        rates: Tokens per millisecond, and those of plain decoding, [A + 1].
        times_ms: Of a step that gives as many, likewise, [A + 1].
        sizes: Draft tokens of all requests together, >= 1, [A].
        draft_ms: What drafting so many takes, [A].
        nodes: Expected tokens of the nodes of each request's draft, best first; nothing where a
            request may not draft so, [B, A, N].
        num_drafters: Of each way, [A].
    """

    rates: NDArray[np.float64]
    times_ms: NDArray[np.float64]
    sizes: NDArray[np.int64]
    draft_ms: NDArray[np.float64]
    nodes: NDArray[np.float64]
    num_drafters: NDArray[np.int64]

    @property
    def plain(self) -> int:
        """Plain decoding, as one more way."""
        return len(self.sizes)

    def best(self, present: int) -> int:
        """Return the way to take; the present one stays unless another is better.

        Several drafters at once have to be better than one, too: what a union is worth is known
        less well, and no less than what its best part is.

        Args:
            present: The way that is taken now.
        """
        rates = self.rates.copy()
        rates[:-1][self.num_drafters > 1] /= _ADVANTAGE
        best = int(rates[:-1].argmax())
        if rates[best] >= _ADVANTAGE * rates[present]:
            present = best
        return present if self.rates[present] > self.rates[self.plain] else self.plain


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
        self._num_drafters = self._members.sum(axis=1)
        # Compiled, or found in the cache, before a step waits for it.
        shape = (1, len(arms), 1)
        self.outlook(
            np.zeros(shape),
            np.ones(shape[:2], np.bool_),
            np.zeros((len(labels), 3)),
            np.ones(2),
            1.0,
        )

    def outlook(
        self,
        gains: NDArray[np.float64],
        able: NDArray[np.bool_],
        prices: NDArray[np.float64],
        step_ms: NDArray[np.float64],
        plain_ms: float,
    ) -> Outlook:
        """Return what every way promises.

        Args:
            gains: Expected tokens of the nodes of each request's draft, best first, [B, A, N]; set
                to nothing where a request may not draft so.
            able: Which requests may draft in which way, [B, A].
            prices: Of each drafter: the time of a draft without levels, that of a level, both in
                milliseconds, and the usual number of levels, [L, 3].
            step_ms: Of a step with 0 to B * N draft tokens, drafting not counted, [1 + B * N].
            plain_ms: Of a step of plain decoding.
        """
        best = _best_sizes(gains, able, self._members, prices, step_ms, plain_ms)
        return Outlook(
            rates=best[:, 0],
            times_ms=best[:, 3],
            sizes=best[:-1, 1].astype(np.int64),
            draft_ms=best[:-1, 2],
            nodes=gains,
            num_drafters=self._num_drafters,
        )


@jit
def _best_sizes(
    nodes: NDArray[np.float64],
    able: NDArray[np.bool_],
    members: NDArray[np.bool_],
    prices: NDArray[np.float64],
    step_ms: NDArray[np.float64],
    plain_ms: float,
) -> NDArray[np.float64]:
    """Return rate, size, drafting time and time of every way at its best size, [A + 1, 4]."""
    num_requests, num_arms, num_nodes = nodes.shape
    most = num_requests * num_nodes
    result = np.zeros((num_arms + 1, 4))
    result[:, 1] = 1.0
    result[num_arms, 0], result[num_arms, 3] = num_requests / plain_ms, plain_ms
    pooled = np.empty(most)
    for arm in range(num_arms):
        is_possible = False
        for request in range(num_requests):
            is_possible |= able[request, arm]
            if not able[request, arm]:
                nodes[request, arm] = 0.0
            first = request * num_nodes
            pooled[first : first + num_nodes] = nodes[request, arm]
        if not is_possible:  # a way that nobody may take promises nothing
            continue
        pooled.sort()
        tokens = float(num_requests)
        for size in range(1, most + 1):
            tokens += pooled[most - size]
            draft_ms = 0.0
            for label in range(len(prices)):
                if members[arm, label]:
                    levels = min(prices[label, 2], size / num_requests)
                    draft_ms += prices[label, 0] + prices[label, 1] * levels
            ms = step_ms[size] + draft_ms
            if tokens / ms > result[arm, 0]:
                result[arm, 0], result[arm, 1] = tokens / ms, size
                result[arm, 2], result[arm, 3] = draft_ms, ms
    return result


__all__ = ["Formula", "Outlook"]
