"""What a pass of a model costs: a measured curve, and what is learned of it while decoding.

A pass over R rows of B requests, which together see K cached positions, takes

    base(R) + request * (B - 1) + position(R / B) * K

milliseconds. `base` is piecewise linear between measured numbers of rows and keeps their steps: a
kernel that works in blocks of rows makes a row that opens a block dear, and the last of a block
may cost more than the first of the next. `position` is what a cached position costs the rows of
the request that sees it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from foretoken.errors import ConfigError
from foretoken.planner.cost_correction import Correction
from foretoken.planner.cost_running import RunningCost
from foretoken.planner.cost_tables import row_times, step_times

_MOST_TIMES = 16  # that the mean of many counts for, of what is around passes
_MOST_TIMES_OF_DRAFTS = 4  # likewise, where plain steps tell what steps with drafts take
NOTICEABLE = 0.02  # the correction that tables carry is kept until it is wrong by so much
BEYOND = 4  # times the rows that were measured: the curve goes on, and passes still teach
KEYS_STEP = 16  # tables are made for multiples of so many positions per request

_Parts: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCurve:
    """Measured time of a model's passes.

    Args:
        rows: Numbers of rows that were measured, ascending, the first 1.
        base_ms: Time of a pass over so many rows of one request without context.
        context_rows: Rows of one request at which the cost of context was measured, likewise.
        context_ms: What each cached position adds to a pass over so many rows of its request.
        request_ms: What each request after the first adds to a pass.

    Raises:
        ConfigError: The numbers are no curve.
    """

    rows: tuple[int, ...]
    base_ms: tuple[float, ...]
    context_rows: tuple[int, ...] = (1,)
    context_ms: tuple[float, ...] = (0.0,)
    request_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_points("rows", self.rows, self.base_ms)
        _check_points("context_rows", self.context_rows, self.context_ms)
        if min(self.base_ms) <= 0 or not 0 <= self.request_ms < math.inf:
            raise ConfigError(
                f"a cost curve's times are positive; got base_ms {self.base_ms} and request_ms "
                f"{self.request_ms}",
                hint="measure the model again",
            )

    @property
    def max_rows(self) -> int:
        """Most rows that were measured; beyond them the last half of the curve goes on."""
        return self.rows[-1]

    def pass_ms(self, num_rows: int, num_keys: int, num_requests: int = 1) -> float:
        """Return the time of one pass, 0 for no rows.

        Args:
            num_rows: Rows of the flat batch, of all requests together.
            num_keys: Cached positions that the requests see, summed over requests.
            num_requests: Requests in the batch; their rows are taken as evenly spread.
        """
        if num_rows <= 0:
            return 0.0
        fixed, per_key = self._split(np.array([num_rows], np.float64), num_requests)
        return float(fixed[0] + per_key[0] * num_keys)

    def row_table(self, max_rows: int, num_keys: int, num_requests: int = 1) -> NDArray[np.float64]:
        """Return the time of a pass over 0, 1, ..., `max_rows` rows, [max_rows + 1]; no rows, 0.

        Other arguments are those of `pass_ms`.
        """
        fixed, per_key = self.split_table(max_rows, num_requests)
        return fixed + per_key * num_keys

    def split_table(
        self, max_rows: int, num_requests: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what makes up `row_table`: times without context, and per position of it."""
        fixed, per_key = self._split(np.arange(max_rows + 1, dtype=np.float64), num_requests)
        fixed[0] = per_key[0] = 0.0
        return fixed, per_key

    def _split(
        self, num_rows: NDArray[np.float64], num_requests: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        fixed = extended(num_rows, self.rows, self.base_ms) + self.request_ms * (num_requests - 1)
        rows_each = np.maximum(1.0, num_rows / num_requests)
        return fixed, extended(rows_each, self.context_rows, self.context_ms)

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as a JSON object: times by their rows."""
        return {
            "base_ms": dict(zip(map(str, self.rows), self.base_ms, strict=True)),
            "context_ms": dict(zip(map(str, self.context_rows), self.context_ms, strict=True)),
            "request_ms": self.request_ms,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostCurve:
        """Return the curve that `to_dict` described.

        Raises:
            ConfigError: It did not describe one.
        """
        try:
            base, context = dict(values["base_ms"]), dict(values["context_ms"])
            return cls(
                rows=tuple(map(int, base)),
                base_ms=tuple(map(float, base.values())),
                context_rows=tuple(map(int, context)),
                context_ms=tuple(map(float, context.values())),
                request_ms=float(values["request_ms"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"this is no cost curve: {type(error).__name__}: {error}",
                hint="measure the model again",
            ) from error


def extended(x: NDArray[np.float64], xs: Sequence[int], ys: Sequence[float]) -> NDArray[np.float64]:
    """Interpolate between points; beyond the last, go on as from the middle to the last.

    The last two points may stand on both sides of a step, so they are no slope to go on with.

    Args:
        x: Where to evaluate, none before the first point.
        xs: Ascending from 1.
        ys: One per point.
    """
    inside: NDArray[np.float64] = np.interp(x, xs, ys)
    if len(xs) > 1:
        middle = float(np.interp(xs[-1] / 2, xs, ys))
        slope = max(0.0, (ys[-1] - middle) / (xs[-1] / 2))
        inside += slope * np.maximum(0.0, x - xs[-1])
    return inside


def _check_points(name: str, xs: Sequence[int], ys: Sequence[float]) -> None:
    is_ascending = all(before < after for before, after in itertools.pairwise(xs))
    is_curve = len(xs) == len(ys) > 0 and xs[0] == 1 and is_ascending
    if not is_curve or not all(0 <= y < math.inf for y in ys):
        raise ConfigError(
            f"a cost curve's {name} ascend from 1, each with a time >= 0; got {xs} and {ys}",
            hint="measure the model again",
        )


class CostModel:
    """A curve that follows the machine: what a step costs here and now.

    Passes are compared with the curve, and a correction follows their ratio: machines speed up and
    slow down by a factor of two within minutes, and the curve was measured in one of them. What a
    step spends outside passes and what drafters take has no curve; it is estimated from the steps
    themselves, see `RunningCost`. All of it forgets: the last dozens of steps count.

    Args:
        curve: Of the model.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.curve = curve
        fixed, per_key = curve.split_table(curve.max_rows, 1)
        self._fixed: list[float] = fixed.tolist()
        self._per_key: list[float] = per_key.tolist()
        self._correction = Correction()
        self._applied = (0.0, 0.0)  # level and extra that tables carry
        # By rows: times without context, those of a position of it, and smallness.
        self._parts: dict[tuple[int, int], _Parts] = {}
        self._table_key: tuple[int, int, int, tuple[float, float]] | None = None
        self._table = np.zeros(0)
        self._overhead = RunningCost()
        self._plain_overhead = RunningCost()
        self._drafts: dict[str, RunningCost] = {}
        self.step_table(1, 0, 1)  # compiled, or found in the cache, before a step waits for it

    def factor(self, num_rows: int) -> float:
        """Return how much slower than the curve passes over so many rows are now."""
        return self._correction.factor(self._smallness(num_rows))

    def _smallness(self, num_rows: float) -> float:
        """Return what part of a pass over so many rows one over a single row takes."""
        place = max(1, round(num_rows))
        is_known = place < len(self._fixed)
        return self._fixed[1] / (self._fixed[place] if is_known else self.curve.pass_ms(place, 0))

    # -- passes ------------------------------------------------------------------------------

    def pass_ms(self, num_rows: int, num_keys: int, num_requests: int = 1) -> float:
        """Return the expected time of one pass; arguments as for `CostCurve.pass_ms`."""
        if num_rows <= 0:
            return 0.0
        return self.factor(num_rows) * self._curve_ms(num_rows, num_keys, num_requests)

    def row_table(self, max_rows: int, num_keys: int, num_requests: int = 1) -> NDArray[np.float64]:
        """Return the expected time of a pass over 0 to `max_rows` rows, [max_rows + 1]; read-only.

        It is made again only if the correction or the context moved by more than matters.
        """
        step = KEYS_STEP * num_requests
        num_keys = -(-num_keys // step) * step
        key = (max_rows, num_keys, num_requests, self._applied)
        if key != self._table_key:
            parts = self._parts.get((max_rows, num_requests))
            if parts is None:
                smallness = np.array([self._smallness(rows) for rows in range(max_rows + 1)])
                parts = (*self.curve.split_table(max_rows, num_requests), smallness)
                self._parts[max_rows, num_requests] = parts
            self._table = row_times(*parts, num_keys, *self._applied)
            self._table.flags.writeable = False
            self._table_key = key
        return self._table

    def observe_passes(
        self,
        sizes: Sequence[tuple[int, int]],
        seconds: float,
        num_requests: int = 1,
        *,
        is_plain: bool = False,
    ) -> None:
        """Learn how long some passes took together that were about as large.

        Passes over many more rows than were measured, such as those of a prompt, teach nothing.

        Args:
            sizes: Rows of each, and positions that they look back on.
            seconds: All of them took.
            num_requests: Of each.
            is_plain: Whether they were of plain decoding.
        """
        num_rows = sum(rows for rows, _ in sizes) / len(sizes)
        if not 0 < num_rows <= BEYOND * self.curve.max_rows:
            return
        curve_ms = sum(self._curve_ms(*size, num_requests) for size in sizes)
        correction, ratio = self._correction, 1000.0 * seconds / curve_ms
        smallness = self._smallness(num_rows)
        correction.observe(smallness, ratio, is_plain=is_plain, num_passes=len(sizes))
        level, extra = self._applied
        if abs(correction.level - level) + abs(correction.extra - extra) > NOTICEABLE:
            self._applied = correction.level, correction.extra

    def observe_plain(
        self, num_requests: int, num_keys: int, pass_s: float, rest_s: float, num_steps: int
    ) -> None:
        """Learn what some steps of plain decoding took in the mean.

        Args:
            num_requests: Of each step.
            num_keys: Positions that its rows look back on.
            pass_s: Its pass.
            rest_s: All but its pass.
            num_steps: How many they were.
        """
        curve_ms = self._curve_ms(num_requests, num_keys, num_requests)
        ratio = 1000.0 * pass_s / curve_ms
        smallness = self._smallness(num_requests)
        self._correction.observe(smallness, ratio, is_plain=True, num_passes=num_steps)
        self._plain_overhead.observe(num_requests, 0, rest_s, num_times=min(num_steps, _MOST_TIMES))
        if self._overhead.is_known:
            # It takes about as much around a pass whose rows are all drafted for and none drafted,
            # and steps with drafts alone are too much alike to tell what a row takes.
            num_times = min(num_steps, _MOST_TIMES_OF_DRAFTS)
            self._overhead.observe(num_requests, num_requests, rest_s, num_times=num_times)

    def _curve_ms(self, num_rows: int, num_keys: int, num_requests: int) -> float:
        if not 0 < num_rows < len(self._fixed):
            return self.curve.pass_ms(num_rows, num_keys, num_requests)
        # The same without arrays, which take longer than a draft model's pass.
        return (
            self._fixed[num_rows]
            + self.curve.request_ms * (num_requests - 1)
            + self._per_key[num_rows // num_requests or 1] * num_keys
        )

    # -- what is around passes ---------------------------------------------------------------

    def observe_overhead(
        self,
        num_requests: int,
        num_rows: float,
        seconds: float,
        *,
        is_plain: bool = False,
        num_steps: int = 1,
    ) -> None:
        """Learn how long a step took without its pass and its drafters, or some did in the mean.

        That is not less than nothing.
        """
        overhead = self._plain_overhead if is_plain else self._overhead
        num_rows = 0 if is_plain else num_rows
        overhead.observe(num_requests, num_rows, max(0.0, seconds), num_times=num_steps)

    def plain_ms(self, num_keys: int, num_requests: int) -> float:
        """Return the expected time of a step of plain decoding; arguments as for `row_table`."""
        pass_ms = self._correction.factor(
            self._smallness(num_requests), is_plain=True
        ) * self._curve_ms(num_requests, num_keys, num_requests)
        if self._plain_overhead.is_known:
            return pass_ms + self._plain_overhead.expect_ms(num_requests, 0)
        return pass_ms + self.overhead_ms(num_requests, num_requests)

    def overhead_ms(self, num_requests: int, num_rows: int) -> float:
        """Return the expected time of a step without its pass and its drafters; 0 if unknown.

        Rows have their price here too: each one's tokens are laid out, sampled and checked.
        """
        if not self._overhead.is_known:  # nobody has drafted yet
            return self._plain_overhead.expect_ms(num_requests, 0)
        return self._overhead.expect_ms(num_requests, num_rows)

    def step_table(
        self, max_rows: int, num_keys: int, num_requests: int, num_fixed: int = 0
    ) -> NDArray[np.float64]:
        """Return the expected time of steps without their drafters, [max_rows - num_fixed + 1].

        Args:
            max_rows: Most rows.
            num_keys: As for `row_table`.
            num_requests: Likewise.
            num_fixed: Least rows; none is said to take less than a step with so many.
        """
        pass_ms = self.row_table(max_rows, num_keys, num_requests)
        none_ms = self.overhead_ms(num_requests, 0)
        row_ms = self.overhead_ms(num_requests, 1) - none_ms
        return step_times(pass_ms, num_fixed, none_ms, row_ms)

    def observe_draft(
        self,
        drafter: str,
        num_requests: int,
        num_levels: float,
        seconds: float,
        num_steps: int = 1,
    ) -> None:
        """Learn how long a drafter took in one step, or in some in the mean.

        Args:
            drafter: Its label.
            num_requests: Requests it drafted for.
            num_levels: Levels of their drafts, summed over requests; a drafter that does not
                work level by level will turn out to cost nothing per level.
            seconds: What it took.
            num_steps: How many they were.
        """
        running = self._drafts.get(drafter)
        if running is None:
            running = self._drafts[drafter] = RunningCost()
        running.observe(num_requests, num_levels, seconds, num_times=num_steps)

    def draft_ms(self, drafter: str, num_requests: int, num_levels: int) -> float:
        """Return the expected time of a drafter in one step; 0 if it was never seen."""
        running = self._drafts.get(drafter)
        return 0.0 if running is None else running.expect_ms(num_requests, num_levels)


__all__ = ["CostCurve", "CostModel", "extended"]
