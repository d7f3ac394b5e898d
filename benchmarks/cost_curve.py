"""How well a measured cost curve predicts passes that were not measured.

    python benchmarks/cost_curve.py [--model DIR ...] [--threads N] [--plot FILE] [--output FILE]

The curve is measured once, as a planner would. Then passes over other numbers of rows, contexts
and requests are timed in rounds of random order, and compared with the curve alone, and with a
`CostModel` that predicts each pass before it observes it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import record
import torch

from foretoken.assets import EMBEDDED
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.cache import CachedSequence, KVCache
from foretoken.models.loading import load_model
from foretoken.planner.cost import CostCurve, CostModel
from foretoken.planner.cost_measure import Contexts, measure_cost, time_streak

ROWS = (1, 3, 5, 7, 9, 12, 15, 17, 19, 23, 27, 30)
BATCHES = ((2, 1), (2, 5), (3, 4), (4, 2), (6, 1), (6, 4))  # requests, rows of each


class HeldOut(NamedTuple):
    """A kind of pass that no curve is made from."""

    num_requests: int
    num_rows: int  # of each request
    num_keys: int  # of each request


def held_out(contexts: Contexts) -> list[HeldOut]:
    """Return the passes to predict: contexts other than those that the curve is measured at."""
    keys = (contexts.usual // 3, contexts.usual * 2, contexts.long * 3 // 4)
    single = [HeldOut(1, num_rows, num_keys) for num_rows in ROWS for num_keys in keys]
    batches = [HeldOut(count, rows, keys[1]) for count, rows in BATCHES]
    return [case for case in single + batches if case.num_rows <= contexts.max_rows]


class Sequences:
    """Requests with computed contexts, opened when first asked for."""

    def __init__(self, model: LanguageModel, contexts: Contexts) -> None:
        self._model = model
        self._random = np.random.default_rng(1)
        self._opened: dict[tuple[int, int], CachedSequence] = {}
        most = max(count for count, _ in BATCHES)
        num_positions = 3 * contexts.long + most * (2 * contexts.usual + 64) + 64
        self._cache: KVCache = model.new_cache(num_positions + 64 * most)

    def _get(self, index: int, num_keys: int) -> CachedSequence:
        if (index, num_keys) not in self._opened:
            sequence = self._opened[index, num_keys] = self._cache.open()
            prompt = Segment(sequence, self._draw_ids(num_keys), range(-1, num_keys - 1))
            self._model.forward(self._model.batch(self._cache, [prompt]), [])
            self._cache.commit([(sequence, range(num_keys))])
        return self._opened[index, num_keys]

    def _draw_ids(self, count: int) -> list[int]:
        return self._random.integers(self._model.info.vocab_size, size=count).tolist()

    def time_pass(self, case: HeldOut) -> float:
        """Return the seconds of a pass, after others like it if it is short."""
        sequences = [self._get(index, case.num_keys) for index in range(case.num_requests)]
        chain = range(-1, case.num_rows - 1)
        with self._cache.speculate(sequences):
            segments = [Segment(it, self._draw_ids(case.num_rows), chain) for it in sequences]
            batch = self._model.batch(self._cache, segments)
            rows = range(batch.num_rows)
            return time_streak(lambda: self._model.forward(batch, rows), time.perf_counter)


def errors(predicted: Sequence[float], actual: Sequence[float]) -> dict[str, float]:
    """Return how predictions relate to what was measured: percent, positive if too high."""
    percent = 100.0 * (np.array(predicted) / np.array(actual) - 1.0)
    size = np.abs(percent)
    return {
        "count": len(percent),
        "median_percent": round(float(np.median(percent)), 2),
        "absolute_median_percent": round(float(np.median(size)), 2),
        "absolute_p90_percent": round(float(np.quantile(size, 0.9)), 2),
        "absolute_max_percent": round(float(size.max()), 2),
    }


def predict(
    curve: CostCurve, cases: Sequence[HeldOut], passes: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """Return the errors of the curve, and of a model that follows the passes in their order.

    Args:
        curve: Measured before.
        cases: Kinds of passes.
        passes: Index of the case and seconds of each pass, in the order in which they ran.
    """
    arguments = [(c.num_requests * c.num_rows, c.num_requests * c.num_keys) for c in cases]
    curve_ms = [
        curve.pass_ms(*sizes, case.num_requests)
        for sizes, case in zip(arguments, cases, strict=True)
    ]
    model = CostModel(curve)
    followed, single, actual = [], [], []
    for index, seconds in passes:
        followed.append(model.pass_ms(*arguments[index], cases[index].num_requests))
        single.append(curve_ms[index])
        actual.append(1000 * seconds)
        model.observe_pass(*arguments[index], seconds, cases[index].num_requests)
    by_case: list[list[float]] = [[] for _ in cases]
    for index, seconds in passes:
        by_case[index].append(1000 * seconds)
    medians = [statistics.median(times) for times in by_case]
    # The curve is of a machine at one moment; what planners need of it is the proportions.
    level = statistics.median(ms / known for ms, known in zip(medians, curve_ms, strict=True))
    return {
        "medians_of_cases_against_curve": errors(curve_ms, medians),
        "the_same_at_the_curves_own_level": errors([level * ms for ms in curve_ms], medians),
        "single_passes_against_curve": errors(single, actual),
        "single_passes_against_cost_model": errors(followed, actual),
        "level_of_the_machine": round(level, 3),
        "factor_at_the_end": round(model.factor(1), 3),
        "cases": [
            {**case._asdict(), "curve_ms": round(ms, 4), "measured_ms": round(median, 4)}
            for case, ms, median in zip(cases, curve_ms, medians, strict=True)
        ],
    }


def run(name: str, rounds: int) -> dict[str, Any]:
    """Measure one model's curve, then its held-out passes."""
    model = load_model(name)
    start_s = time.perf_counter()
    curve = measure_cost(model)
    measuring_s = time.perf_counter() - start_s
    contexts = Contexts.of(model)
    cases, sequences = held_out(contexts), Sequences(model, contexts)
    for case in cases:
        sequences.time_pass(case)
    order = np.random.default_rng(2)
    passes = [
        (int(index), sequences.time_pass(cases[index]))
        for _ in range(rounds)
        for index in order.permutation(len(cases))
    ]
    return {
        "num_parameters": model.info.num_parameters,
        "dtype": str(model.info.dtype),
        "measuring_s": round(measuring_s, 3),
        "rounds": rounds,
        "curve": curve.to_dict(),
        "held_out": predict(curve, cases, passes),
    }


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw each curve with the held-out passes of one request on it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 3.4), layout="constrained")
    for place, (name, result) in enumerate(results.items(), start=1):
        curve = CostCurve.from_dict(result["curve"])
        level = result["held_out"]["level_of_the_machine"]
        axes = figure.add_subplot(1, len(results), place)
        cases = [case for case in result["held_out"]["cases"] if case["num_requests"] == 1]
        for colour, num_keys in enumerate(sorted({case["num_keys"] for case in cases})):
            table = level * curve.row_table(max(ROWS), num_keys)
            axes.plot(range(1, len(table)), table[1:], color=f"C{colour}", linewidth=1)
            points = [case for case in cases if case["num_keys"] == num_keys]
            axes.plot(
                [case["num_rows"] for case in points],
                [case["measured_ms"] for case in points],
                "o",
                markersize=3.5,
                color=f"C{colour}",
                label=f"{num_keys} positions",
            )
        axes.set(title=name, xlabel="rows of the pass", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8)
        if place == 1:
            axes.set_ylabel("milliseconds")
    figure.savefig(file, dpi=130)


def main() -> None:
    """Run the benchmark and print or write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    embedded = EMBEDDED["stories"]
    parser.add_argument("--model", nargs="+", default=[str(embedded.target), str(embedded.draft)])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {
        " ".join(Path(name).parts[-2:]) if "assets" in name else Path(name).name: run(
            name, args.rounds
        )
        for name in args.model
    }
    if args.plot:
        plot(results, args.plot)
    record.write("predicted against measured times of passes", {"models": results}, args.output)


if __name__ == "__main__":
    main()
