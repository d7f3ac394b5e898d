"""Whether a cost curve that was measured before was measured while others kept the machine busy."""

from __future__ import annotations

import time
from collections.abc import Callable

from foretoken.models.adapter import LanguageModel
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_measure import PROBES, Bench, Contexts

FASTER = 0.75  # of what a curve says: a pass that takes less was disturbed when it was measured
LONGEST_PROBED_MS = 20.0  # a pass; what disturbs one is small beside longer ones, and probes cost


def was_disturbed(
    model: LanguageModel,
    curve: CostCurve,
    *,
    clock: Callable[[], float] = time.perf_counter,
    bench_class: type[Bench] | None = None,
) -> bool:
    """Tell from a few passes whether a curve was measured while others kept the machine busy.

    That hits small passes more than large ones, so it changes how much drafting seems worth, and
    what a planner never does it never finds to have become cheaper.

    Args:
        model: As for `measure_cost`, like what follows.
        curve: Of that model, measured some time before.
        clock: Seconds from any fixed moment.
        bench_class: What runs the passes; ordinary ones if None.
    """
    contexts = Contexts.of(model)
    expected_ms = [
        curve.pass_ms(min(num_rows, contexts.max_rows), contexts.usual) for num_rows in PROBES
    ]
    if expected_ms[0] > LONGEST_PROBED_MS:
        return False
    probe_s = (bench_class or Bench)(model, contexts, clock).probe()
    pairs = zip(probe_s, expected_ms, strict=True)
    return any(1000.0 * seconds < FASTER * known_ms for seconds, known_ms in pairs)


def faster_of(one: CostCurve, other: CostCurve) -> CostCurve:
    """Return the one of two curves of a model that was measured while less disturbed it."""
    return min((one, other), key=lambda curve: sum(curve.pass_ms(rows, 0) for rows in PROBES))


__all__ = ["faster_of", "was_disturbed"]
