"""Families of metrics in Prometheus' terms, made from plain counts when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

PREFIX = "foretoken:"
# Bounds of the histograms; those of times are of one to five in each decade.
SECONDS = tuple(round(digit * 10.0**power, 6) for power in range(-4, 3) for digit in (1, 2.5, 5))
TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class Distribution:
    """Numbers of observations below bounds, several equal ones added at once.

    Args:
        bounds: Upper bounds, ascending, included.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str, unit: str = "") -> HistogramMetricFamily:
        """Return it as Prometheus has it: cumulative."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(PREFIX + name, text, buckets, self._sum, unit=unit)


def counter(
    name: str,
    text: str,
    values: float | Mapping[str, float] | Mapping[tuple[str, str], float],
    labels: Sequence[str] = (),
    *,
    unit: str = "",
) -> CounterMetricFamily:
    """Return a counter.

    Args:
        name: Without prefix; one with a unit ends in it.
        text: What it counts.
        values: By the values of the labels, or one number if there are none.
        labels: Their names.
        unit: For OpenMetrics.
    """
    family = CounterMetricFamily(PREFIX + name, text, labels=labels, unit=unit)
    for key, value in _by_labels(values):
        family.add_metric(key, value)
    return family


def gauge(name: str, text: str, value: float, *, unit: str = "") -> GaugeMetricFamily:
    """Return a gauge without labels; arguments as for `counter`."""
    return GaugeMetricFamily(PREFIX + name, text, value, unit=unit)


def _by_labels(
    values: float | Mapping[str, float] | Mapping[tuple[str, str], float],
) -> Iterable[tuple[tuple[str, ...], float]]:
    if not isinstance(values, Mapping):
        return [((), values)]
    return [(key if isinstance(key, tuple) else (key,), value) for key, value in values.items()]


__all__ = ["PREFIX", "SECONDS", "TOKENS", "Distribution", "counter", "gauge"]
