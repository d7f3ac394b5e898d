"""Counts what steps do: a planner that leaves every decision to another and keeps the books."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from foretoken.core.draft import Draft, source_names
from foretoken.core.verdict import Verdict
from foretoken.engine.scheduler import Work
from foretoken.planner.base import PassingPlanner, Planner, Share, StepTimes
from foretoken.server.speedup import PlainPace, StepShape
from foretoken.server.windows import Totals, Window

Key = TypeVar("Key")


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

    def totals(self) -> Totals:
        """Return all counts so far."""
        with self._lock:
            return self._totals.copy()

    def recent(self) -> tuple[Totals, float]:
        """Return the counts of the last seconds, and over how many."""
        with self._lock:
            return self._window.recent(self._totals, self._clock())

    def add_step(
        self,
        works: Sequence[Work],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Count a step whose requests have taken their tokens; arguments as planners get them."""
        with self._lock:
            self._window.note(self._totals, self._clock() - times.total_s)
            shape = self._add_requests(works, scored, verdicts)
            self._add_times(shape, times)

    def _add_requests(
        self,
        works: Sequence[Work],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
    ) -> StepShape:
        totals = self._totals
        num_known = num_nodes = num_keys = num_decoding = num_decoding_keys = num_tokens = 0
        num_accepted = 0
        for work, draft, verdict in zip(works, scored, verdicts, strict=True):
            keys = work.num_keys
            num_known += work.num_known
            num_keys += keys
            num_drafted = draft.tree.num_draft_tokens
            num_nodes += num_drafted
            if verdict is None:
                continue
            # All that it had was fed, so the rest is what it was given: where an output ends,
            # less than the verdict says.
            num_given = len(work.request.token_ids) - keys
            totals.tokens_per_step[num_given] += 1
            num_decoding += 1
            num_decoding_keys += keys
            num_tokens += num_given
            if num_drafted:
                num_accepted += self._add_draft(draft, verdict.path[:num_given], verdict.path)
        totals.rows["prompt"] += num_known - num_decoding
        totals.rows["root"] += num_decoding
        totals.rows["accepted"] += num_accepted
        totals.rows["wasted"] += num_nodes - num_accepted
        return StepShape(
            num_requests=len(works),
            num_known=num_known,
            num_nodes=num_nodes,
            num_keys=num_keys,
            num_decoding=num_decoding,
            num_decoding_keys=num_decoding_keys,
            num_tokens=num_tokens,
        )

    def _add_draft(self, draft: Draft, given: Sequence[int], path: Sequence[int]) -> int:
        """Count a draft of which the nodes `given` of the accepted path were emitted."""
        totals, source = self._totals, draft.source
        totals.drafts[self._joint_name(frozenset(source))] += 1
        totals.draft_tokens.update(source[1:])
        for position, node in enumerate(given):
            totals.accepted[position, source[node]] += 1
        num_given = len(given)
        # What stands below the last accepted node was judged too, and was not the token.
        is_missed = num_given == len(path) and bool(draft.tree.children[path[-1] if path else 0])
        totals.reached[num_given + is_missed] += 1
        return num_given

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
