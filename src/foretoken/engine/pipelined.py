"""The loop for targets that run one group of layers several times: tokens begin before others end.

A step is an ordinary pass for prompts, and one tick for all requests that decode: every row in
flight goes through the group once, at its own depth. Then, request by request,

    while the oldest row, the root, has all its loops behind it:
        the target's next token is what the verifier makes of the root's row
        the row below that carries it is the new root, and all others are dropped;
        without one, the token begins as a new root at depth 0 in the next tick
    the rows that are left are shown to the drafter, which says what is to hang on them

Rows below the root decide nothing, so the tokens are those of plain decoding, whatever was
guessed. A planner says before every tick how early guesses may be issued and how many rows a
request may have, or that ordinary passes are faster; then steps are those of `WholePasses`.

Source: SPEED, Hooper et al. 2023, arXiv:2310.12072.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import cast

from torch import Tensor

from foretoken.core.draft import SiblingDraw
from foretoken.core.ranking import argmax_ids
from foretoken.drafters.in_flight import InFlightDrafter, InFlightNode
from foretoken.engine.fillers import ask_others, tell_others
from foretoken.engine.in_flight import Flight, Node
from foretoken.engine.request import Emission, join_emissions
from foretoken.engine.scheduler import Work
from foretoken.engine.step import Loop, StepParts, run_pass, violation
from foretoken.engine.walks import TickRows, Walk, walk_down
from foretoken.models.in_flight import InFlightBatch
from foretoken.planner.base import StepTimes
from foretoken.planner.in_flight import FlightPlan, FlightPlanner, TickReport
from foretoken.verifiers.base import NodeRule

_SEQUENTIAL = FlightPlan(exit_loop=1, max_in_flight=1)


class Pipelined(Loop):
    """Runs prompts by whole passes and everything else loop by loop, as the planner says.

    Args:
        label: Of the drafter that drafts inside the pass.
        num_loops: G, of the target.
        planner: Says how many rows are in flight, and from which depth on.
    """

    def __init__(self, label: str, num_loops: int, planner: FlightPlanner) -> None:
        self._label = label
        self._num_loops = num_loops
        self._planner = planner
        self._flights: dict[str, Flight] = {}
        self._states: Tensor | None = None  # of all rows of the last tick, [R, D]
        self._times = StepTimes()  # of the ticks since one gave tokens

    def step(self, parts: StepParts) -> list[Emission]:
        """Advance every running request: prompts by a pass, others by a tick or a pass."""
        works = parts.scheduler.schedule()
        plan = self._plan(works)
        try:
            self._flights = self._board(parts, works, plan)
            rest = [work for work in works if work.request_id not in self._flights]
            emissions = self._pass(parts, rest) if rest else []
            if self._flights:
                emissions += self._tick(parts, list(self._flights.values()), plan)
        except BaseException:
            self._drop_all(parts)
            raise
        return emissions

    def forget(self, request_id: str) -> None:
        """Forget the rows of a request; the cache forgets them with its sequence."""
        self._flights.pop(request_id, None)

    def num_in_flight(self, request_id: str) -> int:
        """Return how many rows of a request have begun and are not final."""
        flight = self._flights.get(request_id)
        return flight.num_staged if flight else 0

    # -- who flies ---------------------------------------------------------------------------

    def _plan(self, works: Sequence[Work]) -> FlightPlan:
        """Return the planner's plan; a sequential one if nobody drafts in flight."""
        decoding = [work for work in works if _is_decoding(work)]
        if not any(self._label in work.drafters for work in decoding):
            return _SEQUENTIAL
        return self._planner.plan(len(decoding), sum(work.num_keys for work in decoding))

    def _board(
        self, parts: StepParts, works: Sequence[Work], plan: FlightPlan
    ) -> dict[str, Flight]:
        """Return the flights of this step, each cut to its bounds, before anything is staged.

        Under sequential plans those go on that have rows on their way.
        """
        flights: dict[str, Flight] = {}
        if plan.is_sequential and not self._flights:
            return flights
        for work in works:
            flight = self._flights.get(work.request_id)
            if flight is None or flight.sequence is not work.sequence:  # it was thrown back
                flight = Flight(work)
            if not _is_decoding(work) or (plan.is_sequential and not flight.num_staged):
                continue
            flight.work = work
            self._drop(parts, flight, flight.trim(work.budget))
            flights[work.request_id] = flight
        return flights

    @staticmethod
    def _drop(parts: StepParts, flight: Flight, dropped: Sequence[Node]) -> None:
        """Let the cache forget rows that have left a flight, and count those that were run."""
        if dropped:
            flight.request.stats.add_drafted([node.source for node in dropped if node.depth])
            flight.settle(parts.cache)

    def _drop_all(self, parts: StepParts) -> None:
        """Forget all rows: after a failure, nobody knows how far they came."""
        for flight in self._flights.values():
            if flight.sequence.is_open:
                parts.cache.rollback(flight.sequence)
        self._flights = {}

    # -- passes and ticks --------------------------------------------------------------------

    def _pass(self, parts: StepParts, works: Sequence[Work]) -> list[Emission]:
        """Advance requests by an ordinary pass."""
        start_s = perf_counter()
        emissions, num_rows = run_pass(parts, works)
        if all(_is_decoding(work) for work in works):
            self._planner.observe(
                TickReport(
                    num_requests=len(works),
                    num_rows=num_rows,
                    num_keys=sum(work.num_keys for work in works),
                    tick_s=perf_counter() - start_s,
                    is_pass=True,
                )
            )
        return emissions

    def _tick(
        self, parts: StepParts, flights: Sequence[Flight], plan: FlightPlan
    ) -> list[Emission]:
        """Advance all rows by one loop, give out what has become final, and guess anew."""
        start_s = perf_counter()
        ask_others(parts, flights, self._label, plan.max_in_flight - 1, self._times)
        num_rows = sum(len(flight.nodes) for flight in flights)
        rows = self._run(parts, flights, self._depths(parts, plan))
        rule, siblings = cast(NodeRule, parts.verifier), parts.draws[self._label]
        walks = [walk_down(it, rows, rule, siblings, parts.cache) for it in flights]
        # The cache has moved on, and so have requests, before anything of the drafters' can fail.
        tell_others(parts.drafters, walks, rows)
        self._grow(parts, rows, plan.max_in_flight, plan.exit_loop)
        tick_s = perf_counter() - start_s
        self._times.total_s += tick_s
        self._keep_books(parts, walks)
        self._planner.observe(
            TickReport(
                num_requests=len(flights),
                num_rows=num_rows,
                num_keys=sum(flight.work.num_keys for flight in flights),
                tick_s=tick_s,
                settled=[since for walk in walks for since in walk.settled(self._num_loops)],
            )
        )
        return [join_emissions(walk.emissions) for walk in walks if walk.emissions]

    def _run(self, parts: StepParts, flights: Sequence[Flight], depths: frozenset[int]) -> TickRows:
        """Run one loop of all rows; return the logits of those that are final or looked at."""
        segments = [segment for flight in flights for segment in flight.stage(parts.cache)]
        nodes = [(flight, node) for flight in flights for node in flight.nodes]
        states = None if self._states is None else self._states[[node.row for _, node in nodes]]
        final: dict[Node, int] = {}
        early = []
        for row, (flight, node) in enumerate(nodes):
            node.row = row
            node.depth += 1
            if node.depth == self._num_loops:
                final[node] = len(final)
            elif node.depth in depths and self._label in flight.work.drafters:
                early.append((flight, node))
        wanted = [*final, *(node for _, node in early)]
        before_s = perf_counter()
        output = parts.target.tick(
            InFlightBatch(parts.cache, segments), states, [node.row for node in wanted]
        )
        self._states = output.states
        is_argmax = final and any(flight.request.sampler.is_argmax for flight in flights)
        largest_ids = argmax_ids(output.logits[: len(final)]) if is_argmax else []
        self._times.pass_s += perf_counter() - before_s
        for flight in flights:
            flight.request.stats.add_tick(self._num_loops)
        return TickRows(output.logits, final, largest_ids, early)

    def _keep_books(self, parts: StepParts, walks: Sequence[Walk]) -> None:
        """Let those who watch steps see the ticks since the last tokens as one step."""
        given = [walk for walk in walks if walk.final]
        if given:
            judged = [walk.judged() for walk in given]
            parts.planner.observe(
                [walk.flight.work for walk in given],
                [draft for draft, _ in judged],
                [verdict for _, verdict in judged],
                self._times,
            )
            self._times = StepTimes()

    # -- guesses -----------------------------------------------------------------------------

    def _depths(self, parts: StepParts, plan: FlightPlan) -> frozenset[int]:
        """Return the depths at which rows are looked at."""
        if plan.is_sequential:
            return frozenset()
        depths = self._drafter(parts).looks(plan.exit_loop)
        return depths | frozenset(range(1, self._num_loops)) if plan.scores_early else depths

    def _grow(self, parts: StepParts, rows: TickRows, max_rows: int, exit_loop: int) -> None:
        """Let the drafter say what is to hang on the rows that are still on their way."""
        places = [
            place
            for place, (flight, node) in enumerate(rows.early)
            if flight.request.finish_reason is None and node in flight.nodes
        ]
        if not places:
            return
        looked = [rows.early[place] for place in places]
        logits = rows.logits[len(rows.final) :]
        if len(places) < len(rows.early):
            logits = logits[places]
        drafter_index = list(parts.drafters).index(self._label)
        nodes = [self._view(parts, flight, node, drafter_index) for flight, node in looked]
        growths = self._drafter(parts).grow(nodes, logits, exit_loop)
        if len(growths) != len(nodes):
            raise violation(self._label, f"{len(growths)} growths for {len(nodes)} rows")
        for (flight, node), growth in zip(looked, growths, strict=True):
            node.looks.append((node.depth, growth.best_id))
            if growth.guesses is not None and node in flight.nodes:
                self._check(parts, [guess.token_id for guess in growth.guesses])
                dropped = flight.grow(node, growth.guesses, self._label, max_rows)
                self._drop(parts, flight, dropped)

    def _view(
        self, parts: StepParts, flight: Flight, node: Node, drafter_index: int
    ) -> InFlightNode:
        request = flight.request
        is_greedy = request.sampler.is_greedy
        return InFlightNode(
            request_id=request.request_id,
            token_ids=request.token_ids,
            path=flight.path(node),
            depth=node.depth,
            guesses=node.guesses,
            sampler=request.sampler,
            siblings=SiblingDraw.DETERMINISTIC if is_greedy else parts.draws[self._label],
            drafter_index=drafter_index,
        )

    def _check(self, parts: StepParts, token_ids: Sequence[int]) -> None:
        """Check that guesses are tokens, and not too many.

        Raises:
            DrafterError: They are not.
        """
        vocab_size, width = parts.target.info.vocab_size, self._drafter(parts).width
        if len(token_ids) > width:
            raise violation(self._label, f"{len(token_ids)} guesses of one row; its width: {width}")
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise violation(self._label, f"guesses outside [0, {vocab_size}): {token_ids}")

    def _drafter(self, parts: StepParts) -> InFlightDrafter:
        return cast(InFlightDrafter, parts.drafters[self._label])


def _is_decoding(work: Work) -> bool:
    """Return whether a request has nothing to be fed but its pending token."""
    return work.budget is not None and work.num_known == 1
