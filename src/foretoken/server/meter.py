"""Counts what steps do: a planner that leaves every decision to another and keeps the books."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from foretoken.core.draft import Draft, source_names
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Verdict
from foretoken.engine.scheduler import Work
from foretoken.planner.base import PassingPlanner, Planner, Share, StepTimes
from foretoken.server.speedup import PlainPace, StepShape
from foretoken.server.windows import Totals, Window

Key = TypeVar("Key")

# Steps are counted some at a time: between two of them a pass has emptied the processor's caches,
# and what counting takes is mostly to fill them again.
BATCH_STEPS = 32
BATCH_S = 0.25

Outcome = tuple[int, tuple[str, ...], tuple[int, ...], int]
"""What a step did for a request: tokens given; of its draft the source of each node, the nodes
emitted, and how many levels were judged. All that is counted of a draft, and nothing that keeps
the draft itself."""

_PLAIN = ("",)  # the source of a draft that is its root alone


class Meter:
    """The counts of all steps. One thread adds, any thread reads.

    Args:
        pace: Estimates plain decoding's time; None leaves it out.
        clock: Seconds; those of the steps.
    """

    def __init__(
        self, pace: PlainPace | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.pace = pace
        self._clock = clock
        self._lock = threading.Lock()
        self._totals = Totals()
        self._window = Window()
        self._joint_names: dict[frozenset[str], str] = {}
        # To be counted: each with its end, its times and what it did. A deque needs no lock.
        self._steps: deque[tuple[float, StepTimes, StepShape, list[Outcome]]] = deque()
        self._due_s = -math.inf

    def totals(self) -> Totals:
        """Return all counts so far."""
        with self._lock:
            self._count()
            return self._totals.copy()

    def recent(self) -> tuple[Totals, float]:
        """Return the counts of the last seconds, and over how many."""
        with self._lock:
            self._count()
            return self._window.recent(self._totals, self._clock())

    def add_step(
        self,
        works: Sequence[Work],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Count a step whose requests have taken their tokens; arguments as planners get them."""
        at_s = self._clock()
        if at_s >= self._due_s or len(self._steps) >= BATCH_STEPS:
            with self._lock:
                self._count()
            self._due_s = at_s + BATCH_S
        self._steps.append((at_s, times, *_outline(works, scored, verdicts)))

    def _count(self) -> None:
        """Add the steps that are still to be counted to the totals."""
        outcomes: Counter[Outcome] = Counter()
        is_first = True
        while self._steps:
            at_s, times, shape, own = self._steps.popleft()
            if is_first:  # nothing of the others is in the totals yet
                self._window.note(self._totals, at_s - times.total_s)
                is_first = False
            self._add_rows(shape)
            self._add_times(shape, times)
            outcomes.update(own)
        for outcome, count in outcomes.items():
            self._add_outcome(outcome, count)

    def _add_rows(self, shape: StepShape) -> None:
        rows = self._totals.rows
        rows["prompt"] += shape.num_known - shape.num_decoding
        rows["root"] += shape.num_decoding
        rows["wasted"] += shape.num_nodes

    def _add_outcome(self, outcome: Outcome, count: int) -> None:
        """Count what steps did for so many requests."""
        totals, (num_given, source, given, num_judged) = self._totals, outcome
        totals.tokens_per_step[num_given] += count
        if source == _PLAIN:
            return
        totals.drafts[self._joint_name(frozenset(source))] += count
        for name in source[1:]:
            totals.draft_tokens[name] += count
        for position, node in enumerate(given):
            totals.accepted[position, source[node]] += count
        totals.rows["accepted"] += len(given) * count
        totals.rows["wasted"] -= len(given) * count
        totals.reached[num_judged] += count

    def _joint_name(self, sources: frozenset[str]) -> str:
        name = self._joint_names.get(sources)
        if name is None:
            names = {name for source in sources for name in source_names(source)}
            name = self._joint_names[sources] = "+".join(sorted(names))
        return name

    def _add_times(self, shape: StepShape, times: StepTimes) -> None:
        totals, kind, total_s = self._totals, shape.kind, times.total_s
        totals.steps[kind] += 1
        _add(totals.step_s, kind, total_s)
        _add(totals.phase_s, ("pass", ""), times.pass_s)
        other_s = total_s - times.pass_s
        for label, seconds in times.draft_s.items():
            _add(totals.phase_s, ("draft", label), seconds)
            other_s -= seconds
        _add(totals.phase_s, ("other", ""), max(0.0, other_s))
        if self.pace is not None:
            _add(totals.plain_s, kind, self.pace.observe(shape, times))


def _outline(
    works: Sequence[Work], scored: Sequence[Draft], verdicts: Sequence[Verdict | None]
) -> tuple[StepShape, list[Outcome]]:
    """Return what there is to count of a step, before its requests go on."""
    num_known = num_nodes = num_keys = num_decoding_keys = num_tokens = 0
    outcomes: list[Outcome] = []
    for work, draft, verdict in zip(works, scored, verdicts, strict=True):
        keys, source = work.num_keys, draft.source
        num_known += work.num_known
        num_keys += keys
        num_nodes += len(source) - 1
        if verdict is None:
            continue
        # All that it had was fed, so the rest is what it was given: where an output ends,
        # less than the verdict says.
        num_given = len(work.request.token_ids) - keys
        num_decoding_keys += keys
        num_tokens += num_given
        path = verdict.path
        given = path[:num_given]
        num_judged = len(given)
        # What stands below the last accepted node was judged too, and was not the token.
        if num_judged == len(path) and draft.tree.children[path[-1] if path else ROOT]:
            num_judged += 1
        outcomes.append((num_given, source, given, num_judged))
    shape = StepShape(
        len(works),
        num_known,
        num_nodes,
        num_keys,
        len(outcomes),
        num_decoding_keys,
        num_tokens,
    )
    return shape, outcomes


class MeteringPlanner(PassingPlanner):
    """Leaves every decision to another planner and has each step counted.

    It counts when the step's clock has stopped.

    Args:
        planner: Who decides.
        meter: Who counts.
    """

    def __init__(self, planner: Planner, meter: Meter) -> None:
        super().__init__(planner)
        self._meter = meter

    def observe(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Have the step counted, then pass it on."""
        # The engine's shares are its works, whose requests have their tokens by now.
        self._meter.add_step(cast("Sequence[Work]", shares), scored, verdicts, times)
        super().observe(shares, scored, verdicts, times)


def _add(sums: dict[Key, float], key: Key, value: float) -> None:
    sums[key] = sums.get(key, 0.0) + value


__all__ = ["Meter", "MeteringPlanner"]
