"""Finding out which layers a model can do without: Bayesian search over sets of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RANDOM_SHARE = 0.25  # of the trials; the others are drawn by what is known so far
# Agreement of a set is taken as linear in the parts left out. One trial of some dozens of tokens
# is off by some 0.08; one part is worth some 0.1.
NOISE, SPREAD = 0.08, 0.1


@dataclass(frozen=True, slots=True)
class SkipSet:
    """Parts of layers that are left out.

    Args:
        attention: Layers without attention, ascending.
        mlp: Layers without feed-forward part, ascending.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def __str__(self) -> str:
        whole = sorted(set(self.attention) & set(self.mlp))
        parts = [(layer, "a") for layer in self.attention if layer not in whole]
        parts += [(layer, "m") for layer in self.mlp if layer not in whole]
        parts += [(layer, "") for layer in whole]
        return "-".join(f"{kind}{layer}" for layer, kind in sorted(parts))


class SkipSearch:
    """Proposes sets of parts to leave out and learns from how well each did.

    Some sets are random. For the others the agreement is modelled as linear in the parts, a
    sample of the posterior is drawn (Thompson sampling) and the set that is best for it taken, so
    that promising parts are tried together and doubtful ones now and then. The best set so far is
    left only for one that did better on the same text.

    Args:
        layers: Those that parts may be left out of.
        share: Of these layers' parts, how many are left out.
        has_parts: Whether attention and feed-forward parts can be left out separately.
        enough: Agreement at which the search ends.
        max_trials: Trials after which it ends.
        seed: Of its choices.

    Attributes:
        best: The best set so far; evenly spread at first.
        best_score: Its last agreement, None before the first trial.
        num_trials: How many there were.

    Source: SWIFT, arXiv:2410.06916, which models agreement with a Gaussian process; Draft &
    Verify, arXiv:2309.08168, which searches once, offline.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        share: float,
        has_parts: bool,
        enough: float,
        max_trials: int,
        seed: int = 0,
    ) -> None:
        self._units = [
            (layer, part) for layer in layers for part in (("a", "m") if has_parts else ("am",))
        ]
        num_units = len(self._units)
        self._num_skipped = max(1, min(num_units, round(share * num_units)))
        self._enough = enough
        self._max_trials = max_trials
        self._random = np.random.default_rng(seed)
        self._precision = np.eye(num_units) / SPREAD**2  # of the posterior of the parts' worth
        self._weighted = np.zeros(num_units)
        spread = np.linspace(0, num_units - 1, self._num_skipped).round().astype(int)
        self._best = np.isin(np.arange(num_units), spread)
        self._tried = self._best
        self.best_score: float | None = None
        self.num_trials = 0

    @property
    def best(self) -> SkipSet:
        """The best set so far."""
        return self._skip_set(self._best)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to try."""
        is_good = self.best_score is not None and self.best_score >= self._enough
        has_choice = self._num_skipped < len(self._units)
        return is_good or self.num_trials >= self._max_trials or not has_choice

    def propose(self) -> SkipSet:
        """Return a set to be compared with the best one."""
        if self._random.random() < RANDOM_SHARE:
            worth = self._random.random(len(self._units))
        else:
            covariance = np.linalg.inv(self._precision)
            worth = self._random.multivariate_normal(covariance @ self._weighted, covariance)
        self._tried = np.zeros(len(self._units), bool)
        self._tried[np.argsort(-worth)[: self._num_skipped]] = True
        return self._skip_set(self._tried)

    def observe(self, score: float, best_score: float) -> bool:
        """Learn how the proposed set and the best one did; return whether it is the best now.

        Args:
            score: Share of tokens on which the proposed set agreed with the target, in [0, 1].
            best_score: The same for the best set on the same tokens.
        """
        self.num_trials += 1
        # Texts differ in how predictable they are: the difference says more about the set.
        change = self._tried.astype(float) - self._best
        self._precision += np.outer(change, change) / NOISE**2
        self._weighted += change * (score - best_score) / NOISE**2
        is_better = score > best_score
        if is_better:
            self._best = self._tried
        self.best_score = max(score, best_score)
        return is_better

    def _skip_set(self, mask: np.ndarray) -> SkipSet:
        chosen = [unit for unit, is_skipped in zip(self._units, mask, strict=True) if is_skipped]
        return SkipSet(
            tuple(layer for layer, part in chosen if "a" in part),
            tuple(layer for layer, part in chosen if "m" in part),
        )
