"""What ticks and ordinary passes take, here and now, side by side."""

from __future__ import annotations

import math

from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_correction import Filter
from foretoken.planner.in_flight import TickReport

LEVEL_DRIFT = 7e-5  # added variance of the level with each step: about 12 steps count
OFFSET_DRIFT = 1e-6  # added variance of what sets ticks apart from passes, with each step
SLOPE_DRIFT = 3e-6  # and of the slope, which hardly changes
LEVEL_VARIANCE, OFFSET_VARIANCE, SLOPE_VARIANCE = 1.0, 0.25, 0.02  # before the first step
_DRIFTS = (LEVEL_DRIFT, OFFSET_DRIFT, SLOPE_DRIFT)


class FlightCosts:
    """Two measured curves that follow the machine together.

    A machine that slows down does so for ticks and for passes, but only one of them can be timed
    in a step. So the logarithms of what steps take, over their curves, are taken for

        level                               of a pass,
        level + offset + slope * log(rows)  of a tick,

    of which the level drifts most: what is learned of passes moves ticks with them, and the other
    way round. A Kalman filter follows all three. The curves are of passes alone; what is around
    them (laying out, sampling, deciding) is learned as part of the three.

    Args:
        ticks: Of the model, by all rows in flight.
        passes: Of the model, ordinary ones.
    """

    def __init__(self, ticks: CostCurve, passes: CostCurve) -> None:
        self._curves = (ticks, passes)
        self._tables: dict[tuple[bool, int], tuple[list[float], list[float]]] = {}
        self._filter = Filter((LEVEL_VARIANCE, OFFSET_VARIANCE, SLOPE_VARIANCE), _DRIFTS)

    def pass_ms(self, num_keys: int, num_requests: int) -> float:
        """Return the expected time of an ordinary pass, one row per request.

        Args:
            num_keys: Cached positions that requests see, summed over them.
            num_requests: At least one.
        """
        return math.exp(self._filter.state[0]) * self._curve_ms(
            num_requests, num_keys, num_requests, is_pass=True
        )

    def tick_ms(self, num_rows: float, num_keys: int, num_requests: int) -> float:
        """Return the expected time of a tick.

        Args:
            num_rows: Of all requests together, in the mean: at least one per request.
            num_keys: As for `pass_ms`.
            num_requests: At least one.
        """
        level, offset, slope = self._filter.state
        low = int(num_rows)
        share = num_rows - low
        curve_ms = self._curve_ms(low, num_keys, num_requests, is_pass=False)
        if share > 0:
            next_ms = self._curve_ms(low + 1, num_keys, num_requests, is_pass=False)
            curve_ms += share * (next_ms - curve_ms)
        return math.exp(level + offset + slope * math.log(num_rows)) * curve_ms

    def observe(self, report: TickReport) -> None:
        """Learn what a step took."""
        is_pass = report.is_pass
        curve_ms = self._curve_ms(
            report.num_rows, report.num_keys, report.num_requests, is_pass=is_pass
        )
        deviation = math.log(max(1000.0 * report.tick_s / curve_ms, 1e-3))
        seen = (1.0, 0.0, 0.0) if is_pass else (1.0, 1.0, math.log(report.num_rows))
        self._filter.observe(seen, deviation)

    def _curve_ms(self, num_rows: int, num_keys: int, num_requests: int, *, is_pass: bool) -> float:
        table = self._tables.get((is_pass, num_requests))
        curve = self._curves[is_pass]
        if table is None:
            fixed, per_key = curve.split_table(curve.max_rows, num_requests)
            table = self._tables[is_pass, num_requests] = fixed.tolist(), per_key.tolist()
        if num_rows <= curve.max_rows:
            return table[0][num_rows] + table[1][num_rows] * num_keys
        return curve.pass_ms(num_rows, num_keys, num_requests)


__all__ = ["FlightCosts"]
