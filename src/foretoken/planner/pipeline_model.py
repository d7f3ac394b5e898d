"""How many ticks a token takes when a model with shared layers guesses ahead of itself.

A token's row goes through G loops, a tick each. Its guess of the next token may be issued as a row
of its own after e loops, so that rows of several tokens are in flight, at different depths. Let S
be the depth from which a row's guesses equal its final one, from 1 to G. If token i's row with
the right tokens before it starts at time T(i), then that of the next one starts at

    T(i + 1) = T(i) + D,    D = max(e, S)                          eager: a guess that changes is
                                                                   replaced at once
                            D = e if the first guess is right, G otherwise           lazy check

so that a token takes E[D] ticks: e * a + (1 - a) * G for the lazy check with agreement a. What
wrong guesses lead to never delays a right one. With at most m rows in flight a row also has to
wait until the one m tokens before it is done, T(i + 1) >= T(i + 1 - m) + G; that never happens
with m = ceil(G / e). The recursion holds as it stands, whatever S depends on; formulas for means
take the depths of different tokens as independent.

Source: Hooper et al. 2023, arXiv:2310.12072 (the pipeline). The formula of the lazy check is that
of Theorem 2 of LoopSpec, arXiv:2609.17184.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np

NUM_SAMPLES = 192  # tokens of the sequence that tells what a bound on rows does


class Check(StrEnum):
    """When a guess that was issued is held against later ones."""

    EAGER = "eager"  # after every loop
    LAZY = "lazy"  # when the row is final


@dataclass(frozen=True, slots=True)
class Flow:
    """How a request goes through the pipeline, in the mean.

    Args:
        ticks_per_token: From 1 to the number of loops.
        rows: In flight in a tick, those of wrong guesses included. An upper estimate: guesses
            that change on the way to the right one leave fewer rows.
    """

    ticks_per_token: float
    rows: float


def full_flight(loops: int, exit_loop: int) -> int:
    """Return how many rows of a request there can be at once: ceil(loops / exit_loop)."""
    return -(-loops // exit_loop)


def lazy_ticks(agreement: float, loops: int, exit_loop: int) -> float:
    """Return ticks per token of the lazy check, with as many rows as there can be.

    Args:
        agreement: Probability that the guess at the exit loop is the final one.
        loops: Of the model.
        exit_loop: After which a guess is issued.
    """
    return exit_loop * agreement + (1.0 - agreement) * loops


def eager_ticks(settle: Sequence[float], exit_loop: int) -> float:
    """Return ticks per token with eager checks, E[max(e, S)], with as many rows as there can be.

    Args:
        settle: Probability that guesses equal the final one from depth 1, 2, ... on; sums to 1.
        exit_loop: After which a guess is issued.
    """
    return sum(max(exit_loop, depth) * share for depth, share in enumerate(settle, start=1))


@lru_cache(maxsize=4096)
def flow(
    settle: tuple[float, ...], exit_loop: int, max_in_flight: int, check: Check = Check.EAGER
) -> Flow:
    """Return ticks per token and rows in flight.

    Args:
        settle: As for `eager_ticks`. For the lazy check its sums up to each depth are taken for
            the agreement at that depth.
        exit_loop: After which a guess is issued.
        max_in_flight: Most rows of the request at once; 1 is one token after the other.
        check: When guesses are checked.
    """
    loops = len(settle)
    if max_in_flight == 1 or exit_loop >= loops:
        return Flow(float(loops), 1.0)
    if max_in_flight >= full_flight(loops, exit_loop):
        shares = _delays(settle, exit_loop, check)
    else:
        shares = _bounded_delays(settle, exit_loop, max_in_flight, check)
    ticks = sum(delay * share for delay, share in shares.items())
    wrong = sum(_wrong_rows(delay, exit_loop) * share for delay, share in shares.items())
    return Flow(ticks, min(float(max_in_flight), (loops + wrong) / ticks))


def _delays(settle: Sequence[float], exit_loop: int, check: Check) -> dict[int, float]:
    """Return the probability of every D: ticks from a row's start to that of its right child."""
    loops = len(settle)
    if check is Check.LAZY:
        agreement = sum(settle[:exit_loop])
        return {exit_loop: agreement, loops: 1.0 - agreement}
    shares = dict.fromkeys(range(exit_loop, loops + 1), 0.0)
    for depth, share in enumerate(settle, start=1):
        shares[max(exit_loop, depth)] += share
    return shares


def _bounded_delays(
    settle: Sequence[float], exit_loop: int, max_in_flight: int, check: Check
) -> dict[int, float]:
    """Return how often D is what, by the recursion itself over a sample of tokens.

    With so few rows, a guess may be issued later than the exit loop, when a place is free; the
    lazy check then goes by the guess of that depth.
    """
    loops = len(settle)
    starts = [-loops] * (max_in_flight - 1)  # of the rows before, the latest last
    now, delays = 0, dict.fromkeys(range(exit_loop, loops + 1), 0)
    for depth in _sample(tuple(settle)):
        first = max(exit_loop, starts[-(max_in_flight - 1)] + loops - now)  # a place is free
        is_redone = check is Check.LAZY and depth > first
        delay = loops if is_redone else max(first, depth)
        delays[delay] += 1
        starts.append(now)
        now += delay
    return {delay: count / NUM_SAMPLES for delay, count in delays.items()}


@lru_cache(maxsize=64)
def _sample(settle: tuple[float, ...]) -> tuple[int, ...]:
    """Return settling depths of some tokens: as often as is likely, in an order that is fixed."""
    quantiles = (np.arange(NUM_SAMPLES) + 0.5) / NUM_SAMPLES
    depths = 1 + np.searchsorted(np.cumsum(settle)[:-1], quantiles * sum(settle))
    return tuple(np.random.default_rng(0).permutation(depths).tolist())


def _wrong_rows(delay: int, exit_loop: int) -> int:
    """Return row-ticks below a row until its right child starts: a row more every e ticks."""
    return sum(age // exit_loop for age in range(delay))


__all__ = ["Check", "Flow", "eager_ticks", "flow", "full_flight", "lazy_ticks"]
