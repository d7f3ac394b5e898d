"""The paper's picture in numbers: what each model knows, at what time per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foretoken.bench.speed.cell import Rounds
from foretoken.bench.speed.settings import CHECKS, DEEP, PLAIN, SHALLOW, SHARED, SpeedSettings, Way
from foretoken.bench.statistics import rounded, spread

EQUAL = 1.05  # latencies that differ by no more count as equal


def picture(settings: SpeedSettings, rounds: Rounds) -> dict[str, Any] | None:
    """Return every model's quality and time per token, and what follows from them.

    Args:
        settings: Of the run, with what was measured of quality.
        rounds: Of one request at a time.

    Returns:
        None where the shared model's quality was not measured.
    """
    if SHARED not in settings.quality:
        return None
    bits = {name: own_bits(quality) for name, quality in settings.quality.items()}
    best = _best(rounds)
    ways = [way for way in rounds.ways if way.kind == PLAIN and way.model in bits]
    points = [
        {
            "name": way.name if way.kind == PLAIN else f"shared, SPEED ({way.name})",
            "model": way.model,
            "token_ms": spread(rounds.token_ms(way.name)),
            "bits_per_character": bits[way.model],
        }
        for way in (*ways, *([best] if best else []))
    ]
    entry: dict[str, Any] = {"points": points}
    if best is not None and SHALLOW in bits:
        entry["verdict"] = _verdict(best, bits, rounds)
    return entry


def own_bits(quality: Mapping[str, Any]) -> float:
    """Return held-out bits per character of a model itself: those of its last depth."""
    return float(quality["bits_per_character"][-1])


def _best(rounds: Rounds) -> Way | None:
    """Return the fixed way that turned out fastest; the eager ones if there are any."""
    for check in CHECKS:
        ways = [way for way in rounds.ways if way.kind == check]
        if ways:
            return min(ways, key=lambda way: float(np.median(rounds.token_ms(way.name))))
    return None


def _verdict(best: Way, bits: Mapping[str, float], rounds: Rounds) -> dict[str, Any]:
    """Hold the shared model with SPEED against unshared ones at its latency."""
    shallow = rounds.ratio(best.name, Way(SHALLOW, PLAIN).name)
    slower = 1.0 / shallow["median"]
    entry: dict[str, Any] = {
        "way": best.name,
        "latency_over_shallow": rounded(slower),
        "latency_over_shallow_interval_95": [
            rounded(1.0 / bound) for bound in reversed(shallow["interval_95"])
        ],
        "bits_below_shallow": rounded(bits[SHALLOW] - bits[SHARED]),
        "is_as_fast_as_shallow": slower <= EQUAL,
        "is_better_than_shallow": bits[SHARED] < bits[SHALLOW],
    }
    if DEEP in bits:
        times = [
            float(np.median(rounds.token_ms(name)))
            for name in (Way(SHALLOW, PLAIN).name, best.name, Way(DEEP, PLAIN).name)
        ]
        between = interpolated(times, bits[SHALLOW], bits[DEEP])
        entry["bits_of_unshared_at_this_latency"] = rounded(between)
        entry["is_better_at_equal_latency"] = bits[SHARED] < between
    else:
        entry["is_better_at_equal_latency"] = (
            entry["is_as_fast_as_shallow"] and entry["is_better_than_shallow"]
        )
    return entry


def interpolated(times: Sequence[float], shallow_bits: float, deep_bits: float) -> float:
    """Return the quality that an unshared model of a latency in between would have.

    Straight between the two that were measured, in the logarithm of latency; beyond them, the
    nearer one's.

    Args:
        times: Latency of the shallow one, the one asked for, and the deep one.
        shallow_bits: Held-out bits per character of the shallow one.
        deep_bits: Of the deep one.
    """
    low, wanted, high = np.log(times)
    if high <= low:
        return min(shallow_bits, deep_bits)
    return float(np.interp(wanted, [low, high], [shallow_bits, deep_bits]))


__all__ = ["EQUAL", "interpolated", "own_bits", "picture"]
