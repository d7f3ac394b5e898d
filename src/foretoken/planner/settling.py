"""From which depth on guesses are right: counted while serving, old counts fading."""

from __future__ import annotations

LAST_TOKENS = 100  # so many count, the latest most
_FADES = 1.0 - 1.0 / LAST_TOKENS
_GROWTH = 1.0 + 1.0 / LAST_TOKENS
_LARGEST_WEIGHT = 1e9  # weights grow instead of old counts shrinking; then all are scaled down
_PRIOR_TOKENS = 3.0  # what is assumed before counts as much as so many tokens
_PRIOR_AGREEMENT = 0.6  # of the first guess; the rest settles at any later depth alike
QUANTA = 64  # shares are multiples of one part in so many, so that what follows can be kept


class Settling:
    """Estimates how likely guesses are to be right from depth 1, 2, ... on.

    Args:
        loops: Of the model, at least 2.
    """

    def __init__(self, loops: int) -> None:
        later = (1.0 - _PRIOR_AGREEMENT) / (loops - 1)
        self._prior = [_PRIOR_AGREEMENT] + [later] * (loops - 1)
        self._counts = [_PRIOR_TOKENS * share for share in self._prior]
        self._exact = list(self._counts)  # tokens of which nothing has to be guessed
        self._weight = 1.0

    def observe(self, least: int, most: int) -> None:
        """Count a token.

        Args:
            least: Depth from which its guesses can have been right at the earliest.
            most: And at the latest. Between the two it counts as tokens do of which all is known.
        """
        self._weight *= _GROWTH
        if least == most:
            self._counts[least - 1] += self._weight
            self._exact[:] = [_FADES * count for count in self._exact]
            self._exact[least - 1] += 1.0
        else:
            among = range(least - 1, most)
            total = sum(self._exact[place] for place in among) or 1.0
            for place in among:
                self._counts[place] += self._weight * self._exact[place] / total
        if self._weight > _LARGEST_WEIGHT:
            self._scale(1.0 / self._weight)
            self._weight = 1.0

    def doubt(self, num_tokens: float) -> None:
        """Let all that was counted weigh no more than so many new tokens."""
        excess = sum(self._counts) / (self._weight * num_tokens)
        if excess > 1.0:
            self._scale(1.0 / excess)

    def _scale(self, factor: float) -> None:
        self._counts = [factor * count for count in self._counts]

    def estimate(self) -> tuple[float, ...]:
        """Return the share of each depth; they sum to 1."""
        prior = _PRIOR_TOKENS * self._weight
        counts = [
            count + prior * share for count, share in zip(self._counts, self._prior, strict=True)
        ]
        total, running, before, shares = sum(counts), 0.0, 0, []
        for count in counts:
            running += count
            sum_so_far = round(QUANTA * running / total)
            shares.append((sum_so_far - before) / QUANTA)
            before = sum_so_far
        return tuple(shares)


__all__ = ["LAST_TOKENS", "QUANTA", "Settling"]
