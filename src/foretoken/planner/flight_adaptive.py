"""How early to guess and how many rows to have in flight, chosen by what steps take and bring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter

from foretoken.planner.cost import CostCurve
from foretoken.planner.flight_cost import FlightCosts
from foretoken.planner.in_flight import FlightPlan, FlightPlanner, TickReport
from foretoken.planner.pacing import Pace
from foretoken.planner.pipeline_model import Check, flow, full_flight
from foretoken.planner.probing import PROBING_SHARE
from foretoken.planner.settling import Settling

ADVANTAGE = 1.03  # how much better a plan has to be than the present one to replace it
UNSEEN_ADVANTAGE = 1.25  # the same for ticks of which none was timed while serving
TRIAL_TOKENS = 4  # per request that a trial of ticks lasts for at least, and as many passes
DOUBTED_TOKENS = 8.0  # what was learned of guesses before a trial weighs no more than so many
FIRST_MS = 20.0  # that a first trial of ordinary passes may lose
SWITCHING_TOKENS = 0.5  # whose time is lost by leaving a plan for a trial and coming back
EARLY_SHARE = 8  # one stretch of steps in so many looks at the guesses of all depths

_SEQUENTIAL = FlightPlan(exit_loop=1, max_in_flight=1)
_BOUNDS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # on rows in flight that are tried


class AdaptiveFlightPlanner(FlightPlanner):
    """Chooses the plan that maximizes expected tokens per second, sequential decoding included.

    Ticks of a plan (e, m) give `num_requests / (ticks_per_token * tick_ms(rows))` tokens per
    millisecond, ordinary passes `num_requests / pass_ms`. Ticks per token and rows in flight follow
    from the depths at which recent guesses settled (`planner/pipeline_model.py`), times from
    measured curves that follow the machine (`planner/flight_cost.py`).

    What is not used is tried now and then, since guesses are only seen in ticks and each side's
    times only in its own steps. A trial is begun when `PROBING_SHARE` of all time since the
    last one pays for what it is expected to lose, the first one at once if it is of ticks or
    short; what it really lost is paid before the next. Planning is paced, too.

    Args:
        ticks: Measured time of ticks by rows in flight (`planner/cost_ticks.py`).
        passes: Measured time of ordinary passes.
        loops: Of the model, at least 2.
        check: When guesses that were issued are checked.
        exit_loop: The only one to use; None chooses.
        max_in_flight: Most rows of a request; None is as many as there can be.
        clock: Seconds; what planning takes is measured by it.
    """

    def __init__(
        self,
        ticks: CostCurve,
        passes: CostCurve,
        *,
        loops: int,
        check: Check | str = Check.EAGER,
        exit_loop: int | None = None,
        max_in_flight: int | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._costs, self._settling = FlightCosts(ticks, passes), Settling(loops)
        self._loops, self._check, self._clock = loops, Check(check), clock
        self._plans = tuple(_plans(loops, exit_loop, max_in_flight))
        self._pace = Pace()
        self._plan = _SEQUENTIAL  # that holds, beside a trial
        self._early_plan = _SEQUENTIAL  # the same, with all guesses looked at
        self._trial: FlightPlan | None = None
        self._trial_left = self._num_steps = 0
        self._has_ticked = False
        self._least_steps = 0  # that the plan is kept for: one interrupted step says little
        self._reference_ms = 0.0  # per token of each request, by the plan beside which is tried
        self._credit_ms: float | None = None
        self._planning_s = 0.0  # in this step; 0 if nothing was planned

    # -- before a tick -----------------------------------------------------------------------

    def plan(self, num_requests: int, num_keys: int) -> FlightPlan:
        """Return how the next step is to be; arguments as for `FlightPlanner.plan`."""
        self._num_steps += 1
        if self._trial is not None:
            return self._trial
        self._least_steps -= 1
        if self._least_steps < 0 and self._pace.begins_plan(num_requests):
            start_s = self._clock()
            self._choose(num_requests, num_keys)
            self._planning_s = self._clock() - start_s
        if self._trial is not None:
            return self._trial
        is_early = self._num_steps // (2 * self._loops) % EARLY_SHARE == 0
        return self._early_plan if is_early else self._plan

    def _choose(self, num_requests: int, num_keys: int) -> None:
        """Choose the plan to hold, and whether to try the other side first."""
        if not self._plans:
            return
        sequential_ms = self._costs.pass_ms(num_keys, num_requests)
        settle = self._settling.estimate()
        token_ms = {
            plan: self._token_ms(plan, settle, num_keys, num_requests) for plan in self._plans
        }
        piped = min(token_ms, key=token_ms.__getitem__)
        token_ms[_SEQUENTIAL] = sequential_ms
        best = min(piped, _SEQUENTIAL, key=token_ms.__getitem__)
        needed = ADVANTAGE if self._has_ticked or best.is_sequential else UNSEEN_ADVANTAGE
        if token_ms[self._plan] > needed * token_ms[best]:
            self._hold(best)
        self._reference_ms = token_ms[self._plan]
        other = piped if self._plan.is_sequential else _SEQUENTIAL
        self._consider(other, token_ms[other])

    def _token_ms(
        self, plan: FlightPlan, settle: tuple[float, ...], num_keys: int, num_requests: int
    ) -> float:
        """Return the expected time per token of each request."""
        expected = flow(settle, plan.exit_loop, plan.max_in_flight, self._check)
        tick_ms = self._costs.tick_ms(num_requests * expected.rows, num_keys, num_requests)
        return expected.ticks_per_token * tick_ms

    def _hold(self, plan: FlightPlan) -> None:
        if plan.is_sequential is not self._plan.is_sequential:
            self._least_steps = 2 * (1 if plan.is_sequential else self._loops)
        self._plan = self._early_plan = plan
        if plan.exit_loop > 1 or (self._check is Check.LAZY and not plan.is_sequential):
            self._early_plan = FlightPlan(plan.exit_loop, plan.max_in_flight, scores_early=True)

    def _consider(self, other: FlightPlan, token_ms: float) -> None:
        """Begin a trial of a plan if its expected loss can be paid."""
        loss_ms = TRIAL_TOKENS * max(0.0, token_ms - self._reference_ms)
        loss_ms += SWITCHING_TOKENS * self._reference_ms
        if self._credit_ms is None:  # what guesses are worth, no curve says; times, it does
            self._credit_ms = min(loss_ms, FIRST_MS) if other.is_sequential else loss_ms
        self._credit_ms = min(self._credit_ms, 2.0 * loss_ms)
        if self._credit_ms < loss_ms:
            return
        self._trial = other
        self._trial_left = TRIAL_TOKENS * (1 if other.is_sequential else self._loops)
        self._credit_ms -= SWITCHING_TOKENS * self._reference_ms
        if not other.is_sequential:
            self._settling.doubt(DOUBTED_TOKENS)

    # -- after a tick ------------------------------------------------------------------------

    def observe(self, report: TickReport) -> None:
        """Learn what came of a step."""
        self._costs.observe(report)
        self._has_ticked = self._has_ticked or not report.is_pass
        for least, most in report.settled:
            self._settling.observe(least, most)
        if self._trial is not None:
            self._pay(report)
        elif self._credit_ms is not None:
            self._credit_ms += PROBING_SHARE * 1000.0 * report.tick_s
        if self._planning_s:
            self._pace.planned(self._planning_s, self._planning_s + report.tick_s)
            self._planning_s = 0.0

    def _pay(self, report: TickReport) -> None:
        """Subtract what a step of a trial lost beside the plan that holds."""
        num_tokens = report.num_requests if report.is_pass else len(report.settled)
        worth_ms = self._reference_ms * num_tokens / report.num_requests
        self._credit_ms = (self._credit_ms or 0.0) + worth_ms - 1000.0 * report.tick_s
        if self._trial is not None and report.is_pass is not self._trial.is_sequential:
            return  # rows of the plan before wind down
        self._trial_left -= 1
        if self._trial_left <= 0:
            self._trial = None
            self._pace.hurry()


def _plans(loops: int, exit_loop: int | None, max_in_flight: int | None) -> Iterator[FlightPlan]:
    """Yield plans with several rows in flight: each exit loop with a few bounds on rows."""
    for depth in range(1, loops) if exit_loop is None else (exit_loop,):
        most = full_flight(loops, depth)
        if max_in_flight is not None:
            most = min(most, max_in_flight)
        for bound in {*(bound for bound in _BOUNDS if bound < most), most}:
            if bound > 1:
                yield FlightPlan(depth, bound)


__all__ = ["AdaptiveFlightPlanner"]
