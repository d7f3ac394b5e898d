"""Measuring what ticks of a model with shared layers cost, by all rows that are in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from foretoken.core.progress import OnProgress, silent
from foretoken.models.adapter import LanguageModel
from foretoken.models.cache import CachedSequence
from foretoken.models.in_flight import InFlight, InFlightBatch
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_cache import identity, load_or_make
from foretoken.planner.cost_measure import BUDGET_S, Bench, measure_cost


def load_or_measure_ticks(
    model: LanguageModel,
    *,
    budget_s: float = BUDGET_S,
    on_progress: OnProgress = silent,
) -> CostCurve:
    """Return what a model's ticks cost: the curve kept on disk, or one that is measured and kept.

    Args:
        model: As it will be run.
        budget_s: Seconds for measuring.
        on_progress: Told of every round of measuring; not called if the curve is there.

    Raises:
        UnsupportedModelError: The model's layers have weights of their own each.
    """
    return load_or_make(
        {**identity(model), "timed": "ticks"},
        lambda: measure_ticks(model, budget_s=budget_s, on_progress=on_progress),
    )


def measure_ticks(
    model: LanguageModel,
    *,
    budget_s: float = BUDGET_S,
    on_progress: OnProgress = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> CostCurve:
    """Time ticks of a model and return their curve; arguments as for `measure_cost`.

    The rows of a request are spread over all depths, every one is scored, and one in flight is
    always on its last loop: the dearest that ticks can be.

    Raises:
        UnsupportedModelError: The model's layers have weights of their own each.
    """
    return measure_cost(
        model, budget_s=budget_s, on_progress=on_progress, clock=clock, bench_class=_TickBench
    )


class _TickBench(Bench):
    """Times ticks in place of passes."""

    def _prepare(self, sequences: Sequence[CachedSequence], num_rows: int) -> Callable[[], object]:
        """Return a tick over so many rows of each sequence, ready to be run."""
        model, cache = self._model, self._cache
        loops = model.info.loops.loops if model.info.loops is not None else 1
        in_flight = []
        for sequence in sequences:
            cache.stage(sequence, range(-1, num_rows - 1))
            first = 0
            for depth, count in spread_over(num_rows, loops):
                in_flight.append(InFlight(sequence, first, self._draw_ids(count), depth))
                first += count
        batch = InFlightBatch(cache, in_flight)
        states = torch.zeros(batch.num_rows, model.info.hidden_size, dtype=model.info.dtype)
        states = states.to(model.info.device)
        rows = range(batch.num_rows)
        return lambda: model.tick(batch, states, rows)


def spread_over(num_rows: int, loops: int) -> list[tuple[int, int]]:
    """Return depths, the last one first, and how many rows to have at each: about as many.

    Args:
        num_rows: At least 1.
        loops: Of the model.
    """
    num_depths = min(num_rows, loops)
    depths = [loops - 1 - place * loops // num_depths for place in range(num_depths)]
    share, more = divmod(num_rows, num_depths)
    return [(depth, share + (place < more)) for place, depth in enumerate(depths)]


__all__ = ["load_or_measure_ticks", "measure_ticks", "spread_over"]
