"""Measuring what a model's passes cost, with real passes over its own cache.

Rounds of passes are taken in random order, so that a drift of the machine meets all of them
alike, and the lower quartile of each counts: whatever disturbs a pass makes it slower. Short
passes are timed in streaks: after others like it, as while decoding, a small model's pass finds its
weights in the processor's caches; after one over a hundred rows it takes half as long again.

Tokens are random and distinct. In a mixture of experts, rows choose different experts then and
each row reads weights of its own; rows of real text share more, and the correction of `CostModel`
learns by how much. What cached positions hold does not matter for time, so they are not computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.cache import CachedSequence, KVCache
from foretoken.planner.cost import CostCurve, extended

BUDGET_S = 3.0
MIN_ROUNDS, USUAL_ROUNDS, MAX_ROUNDS = 3, 7, 25
STREAK, STREAK_S = 12, 3e-3  # passes of one kind in a row, or as many as fill so much time
COUNTED = 3  # of them, the last ones
QUICK_S = 0.2  # rounds beyond the usual are taken within this: tiny passes scatter most
# Rows to measure, the finest that the budget allows: where trees are, and both sides of the steps
# that kernels with blocks of 4, 8 or 12 rows make.
GRIDS = (
    (*range(1, 17), 18, 20, 22, 24, 25, 28, 32, 36, 37, 48, 64, 96, 128),
    (1, 2, 3, 4, 6, 8, 10, 11, 12, 13, 14, 16, 20, 24, 25, 32, 48),
    (1, 2, 4, 8, 12, 13, 16, 24, 25, 32),
    (1, 4, 12, 13, 24),
)
PROBES = (1, 4, 12)  # rows that tell how long a round will take
CONTEXT_ROWS = (1, 4, 12, 24)  # rows, of every grid, that tell what context costs
BATCH = 4  # requests of the passes that tell what a request more costs
USUAL_KEYS = 256  # context of most passes
MOST_KEYS = 4096  # context of those that tell its cost
MOST_CACHE_BYTES = 128 << 20
STAGE = "measuring the model"
FILL = 0.02  # what cached positions hold
LARGEST_SHARE = 0.5  # of a pass over the usual context that may be put down to context
DIP = 1.02  # a pass over fewer rows that is so much slower in most rounds is so indeed


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of pass.

    Args:
        num_rows: Of each request, a chain.
        num_requests: In the batch.
        is_long: Whether the context is the long one; else each request has the usual one.
    """

    num_rows: int
    num_requests: int = 1
    is_long: bool = False


@dataclass(frozen=True, slots=True)
class Contexts:
    """Cached positions of the passes, and the most rows that fit behind them."""

    usual: int
    long: int
    max_rows: int

    @classmethod
    def of(cls, model: LanguageModel) -> Contexts:
        """Choose them within what the model can address and what filling them may cost."""
        limit = model.info.context_limit
        max_rows = max(1, min(GRIDS[0][-1], limit // 2))
        affordable = MOST_CACHE_BYTES // max(1, model.info.kv_bytes_per_token)
        long = max(0, min(limit - max_rows, MOST_KEYS, affordable))
        return cls(usual=min(USUAL_KEYS, long // 4), long=long, max_rows=max_rows)


def measure_cost(
    model: LanguageModel,
    *,
    budget_s: float = BUDGET_S,
    on_progress: OnProgress = silent,
    clock: Callable[[], float] = time.perf_counter,
    bench_class: type[Bench] | None = None,
) -> CostCurve:
    """Time passes of a model and return their curve.

    A slow model is measured at fewer numbers of rows. Three rounds over the coarsest choice, some
    forty passes, are taken whatever the budget.

    Args:
        model: As it will be run: the number of threads counts.
        budget_s: Seconds that it may take.
        on_progress: Told of every round.
        clock: Seconds from any fixed moment.
        bench_class: What runs the passes; ordinary ones if None.
    """
    contexts = Contexts.of(model)
    bench = (bench_class or Bench)(model, contexts, clock)
    cases = choose_cases(contexts, bench.probe(), budget_s)
    start_s = clock()
    samples = [bench.run(cases)]
    num_rounds = choose_rounds(clock() - start_s, budget_s)
    while len(samples) < num_rounds:
        on_progress(Progress(done=len(samples), total=num_rounds, stage=STAGE))
        samples.append(bench.run(cases))
    on_progress(Progress(done=num_rounds, total=num_rounds, stage=STAGE))
    return fit_curve(cases, np.stack(samples), contexts)


def choose_rounds(round_s: float, budget_s: float) -> int:
    """Return how many rounds to take if one takes so long."""
    wanted = min(MAX_ROUNDS, max(USUAL_ROUNDS, int(QUICK_S / round_s)))
    return max(MIN_ROUNDS, min(wanted, int(budget_s / round_s)))


def choose_cases(contexts: Contexts, probe_s: Sequence[float], budget_s: float) -> list[Case]:
    """Return the passes of a round: the finest grid of which enough rounds fit the budget.

    Args:
        contexts: What fits.
        probe_s: Seconds of passes over `PROBES` rows.
        budget_s: For all rounds.
    """
    extra = [Case(num_rows, 1, is_long=True) for num_rows in CONTEXT_ROWS]
    extra += [Case(num_rows, BATCH) for num_rows in (1, 3)]
    cases: list[Case] = []
    for grid in GRIDS:
        cases = [Case(num_rows) for num_rows in grid] + extra
        cases = [case for case in cases if case.num_rows <= contexts.max_rows]
        sizes = np.array([case.num_rows * case.num_requests for case in cases], np.float64)
        # Beyond the probes as if rows were all that costs: then no budget is exceeded by far.
        seconds = np.interp(sizes, PROBES, probe_s) * np.maximum(1.0, sizes / PROBES[-1])
        streaks_s = np.maximum(np.minimum(STREAK_S, STREAK * seconds), seconds)
        if MIN_ROUNDS * streaks_s.sum() <= budget_s:
            break
    return cases


class Bench:
    """Sequences with context, and timed passes over new rows of them."""

    def __init__(
        self, model: LanguageModel, contexts: Contexts, clock: Callable[[], float]
    ) -> None:
        self._model, self._clock, self._max_rows = model, clock, contexts.max_rows
        self._random = np.random.default_rng(0)
        self._vocab_size = model.info.vocab_size
        sizes = [contexts.usual] * BATCH + [contexts.long]
        # A block more for each sequence, whose last one is seldom full.
        self._cache = model.new_cache(sum(sizes) + len(sizes) * (contexts.max_rows + 16))
        for pool in (*self._cache.keys, *self._cache.values):
            pool.fill_(FILL)
        *self._usual, self._long = (_with_context(self._cache, size) for size in sizes)

    def probe(self) -> list[float]:
        """Return seconds of passes over `PROBES` rows, the faster of two after one to warm up."""
        cases = [Case(min(num_rows, self._max_rows)) for num_rows in PROBES]
        rounds = np.stack([self.run(cases) for _ in range(3)])
        seconds: list[float] = rounds[1:].min(axis=0).tolist()
        return seconds

    def run(self, cases: Sequence[Case]) -> NDArray[np.float64]:
        """Return seconds of a pass of each case, taken in random order."""
        seconds = np.zeros(len(cases))
        for index in self._random.permutation(len(cases)):
            seconds[index] = self._time(cases[index])
        return seconds

    def _time(self, case: Case) -> float:
        """Return seconds of a pass, the median of the last ones of a streak."""
        sequences = self._choose_sequences(case)
        with self._cache.speculate(sequences):
            run = self._prepare(sequences, case.num_rows)
            self._wait()

            def run_and_wait() -> None:
                run()
                self._wait()

            return time_streak(run_and_wait, self._clock)

    def _prepare(self, sequences: Sequence[CachedSequence], num_rows: int) -> Callable[[], object]:
        """Return a pass over so many new rows of each sequence, a chain, ready to be run."""
        chain = range(-1, num_rows - 1)
        segments = [Segment(sequence, self._draw_ids(num_rows), chain) for sequence in sequences]
        batch = self._model.batch(self._cache, segments)
        rows = range(batch.num_rows)
        return lambda: self._model.forward(batch, rows)

    def _choose_sequences(self, case: Case) -> list[CachedSequence]:
        if case.is_long:
            return [self._long]
        # In turn, so that a usual context is no warmer in the processor's caches than the long one.
        self._usual = [*self._usual[case.num_requests :], *self._usual[: case.num_requests]]
        return self._usual[: case.num_requests]

    def _draw_ids(self, count: int) -> list[int]:
        ids: list[int] = self._random.integers(self._vocab_size, size=count).tolist()
        return ids

    def _wait(self) -> None:
        """Wait for devices that work behind the program's back."""
        if self._model.info.device.type != "cpu":
            torch.accelerator.synchronize(self._model.info.device)


def time_streak(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return seconds of what is run, after it was run a few times if it is short.

    Args:
        run: What is timed; done when it returns.
        clock: Seconds from any fixed moment.
    """
    times_s: list[float] = []
    first_s = start_s = clock()
    while len(times_s) < STREAK and start_s - first_s < STREAK_S:
        run()
        start_s, before_s = clock(), start_s
        times_s.append(start_s - before_s)
    return median(times_s[-COUNTED:])


def _with_context(cache: KVCache, num_keys: int) -> CachedSequence:
    sequence = cache.open()
    if num_keys:
        cache.stage(sequence, range(-1, num_keys - 1))
        cache.commit([(sequence, range(num_keys))])
    return sequence


# -- from times to a curve -----------------------------------------------------------------------


def fit_curve(
    cases: Sequence[Case],
    samples: NDArray[np.float64],  # [rounds, cases] seconds
    contexts: Contexts,
) -> CostCurve:
    """Return the curve that the times of some rounds tell.

    Args:
        cases: What was timed; those of one request and the usual context ascend in rows.
        samples: Its times.
        contexts: Behind how many positions.
    """
    ms = 1000.0 * np.asarray(samples)
    grid = [i for i, case in enumerate(cases) if case.num_requests == 1 and not case.is_long]
    rows = tuple(cases[index].num_rows for index in grid)
    usual_ms = halved(rows, cleaned(ms[:, grid]))
    context_rows, context_ms = _fit_context(cases, ms, contexts)
    of_context = contexts.usual * extended(np.array(rows, float), context_rows, context_ms)
    base_ms = usual_ms - np.minimum(of_context, LARGEST_SHARE * usual_ms)
    curve = CostCurve(
        rows=rows,
        base_ms=tuple(np.round(base_ms, 6).tolist()),  # to the nanosecond
        context_rows=context_rows,
        context_ms=context_ms,
    )
    return replace(curve, request_ms=_fit_request(cases, ms, contexts, curve))


def cleaned(ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the time of each number of rows, where more rows take no less but for good reason.

    The lower quartiles over rounds are made monotone (isotonic regression), since more rows are
    more work. A time that falls again is kept, though, if it does so in most rounds: two small
    blocks of rows can be faster than a large one, and a planner had better know.

    Args:
        ms: Times of ascending numbers of rows, [rounds, rows].
    """
    level = _quartile(ms)
    falls = np.quantile(ms[:, :-1] / ms[:, 1:], 0.25, axis=0) > DIP
    runs = np.split(level, np.flatnonzero(falls) + 1)
    return np.concatenate([isotonic(run) for run in runs])


def halved(rows: Sequence[int], ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return times of which none is more than that of two passes over half the rows.

    So many rows could be fed that way. A time beyond it was disturbed in most rounds, and would
    keep a planner from ever feeding so many rows, and so from learning better.

    Args:
        rows: Ascending from 1.
        ms: Of passes over them.
    """
    bounded = ms.copy()
    for index, num_rows in enumerate(rows[1:], start=1):
        half_ms = float(np.interp(num_rows / 2, rows[:index], bounded[:index]))
        bounded[index] = min(bounded[index], 2.0 * half_ms)
    return bounded


def isotonic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ascending numbers next to some numbers in least squares (pool adjacent violators).

    Source: Barlow et al., "Statistical Inference under Order Restrictions", 1972.
    """
    pools: list[tuple[float, int]] = []  # mean and size
    for value in values.tolist():
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    return np.repeat([mean for mean, _ in pools], [size for _, size in pools])


def _fit_context(
    cases: Sequence[Case], ms: NDArray[np.float64], contexts: Contexts
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return what a cached position adds, by the rows of its request."""
    index_of = {case: index for index, case in enumerate(cases)}
    num_more = contexts.long - contexts.usual
    rows = tuple(case.num_rows for case in cases if case.is_long)
    if not rows or not num_more:
        return (1,), (0.0,)
    # Within a round, since the difference is smaller than what the machine drifts between rounds.
    more = np.stack(
        [
            ms[:, index_of[Case(count, 1, is_long=True)]] - ms[:, index_of[Case(count)]]
            for count in rows
        ],
        axis=1,
    )
    # What most passes do not show is noise, and as each position's share it would be multiplied
    # by all that many requests see. What is left out, the correction takes up as contexts grow.
    is_shown = np.quantile(more, 0.25) > 0
    slopes = isotonic(_quartile(more) / num_more).clip(0.0) if is_shown else np.zeros(len(rows))
    return rows, tuple(np.round(slopes, 9).tolist())


def _fit_request(
    cases: Sequence[Case], ms: NDArray[np.float64], contexts: Contexts, curve: CostCurve
) -> float:
    """Return what each request after the first adds beyond its rows and its context."""
    more = []
    for index, case in enumerate(cases):
        count = case.num_requests
        if count > 1:
            known_ms = curve.pass_ms(count * case.num_rows, count * contexts.usual, count)
            more.append((float(_quartile(ms[:, index])) - known_ms) / (count - 1))
    return max(0.0, round(float(np.mean(more)), 6)) if more else 0.0


def _quartile(ms: NDArray[np.float64]) -> NDArray[np.float64]:
    lower: NDArray[np.float64] = np.quantile(ms, 0.25, axis=0)
    return lower


__all__ = [
    "BUDGET_S",
    "Bench",
    "Case",
    "Contexts",
    "choose_cases",
    "cleaned",
    "fit_curve",
    "halved",
    "measure_cost",
    "time_streak",
]
