"""Drafters of other kinds beside one that drafts in flight: they fill places that are free.

Where a request begins anew, nothing of the target's own is known for at least a tick. Others may
put a chain of guesses below the root then, whose rows take part from its first loop on. As soon
as the target has a guess of its own, that one counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import DraftBudget
from foretoken.drafters.base import NO_TOP_IDS, Drafter, Outcome
from foretoken.engine.in_flight import Flight, Node
from foretoken.engine.step import StepParts, propose, top_ids
from foretoken.engine.walks import TickRows, Walk
from foretoken.planner.base import Order, StepTimes


def ask_others(
    parts: StepParts, flights: Sequence[Flight], label: str, num_free: int, times: StepTimes
) -> None:
    """Let other drafters put chains below the roots that begin in this tick.

    Args:
        parts: What a step is made of.
        flights: Of this tick.
        label: Of the drafter that drafts in flight.
        num_free: Most rows of a request beside its root.
        times: What drafting took is added here.
    """
    new = [flight for flight in flights if not flight.num_staged]
    orders = [_order(flight, label, num_free) for flight in new]
    if not any(orders):
        return
    own_times = StepTimes()
    drafts = propose(parts, [flight.work for flight in new], orders, own_times)
    for name, seconds in own_times.draft_s.items():
        times.draft_s[name] = times.draft_s.get(name, 0.0) + seconds
    for flight, draft, order in zip(new, drafts, orders, strict=True):
        if order:
            # Chains of several drafters may part.
            flight.graft(draft.prune(next(iter(order.values())).max_nodes))
            flight.asked = tuple(order)


def tell_others(drafters: Mapping[str, Drafter], walks: Sequence[Walk], rows: TickRows) -> None:
    """Let the drafters that were asked about a root know what came of it.

    What they are told of are the rows that were still there when the root became final.
    """
    outcomes: dict[str, list[Outcome]] = {}
    for walk in walks:
        if walk.asked and walk.final:
            outcome = _outcome(drafters, walk, rows)
            for label in walk.asked:
                outcomes.setdefault(label, []).append(outcome)
    for label, own in outcomes.items():
        drafters[label].commit(own)


def _order(flight: Flight, label: str, num_free: int) -> Order:
    bounds = flight.work.budget
    if bounds is None:
        return {}
    num_free = min(num_free, bounds.max_nodes)
    max_depth = min(num_free, bounds.max_depth)
    budget = DraftBudget(max_nodes=num_free, max_depth=max_depth, max_width=1)
    others = [other for other in flight.work.drafters if other != label]
    return {} if budget.is_empty else dict.fromkeys(others, budget)


def _outcome(drafters: Mapping[str, Drafter], walk: Walk, rows: TickRows) -> Outcome:
    draft, verdict = walk.judged()
    num_top = max(drafters[label].needs.top_logits for label in walk.asked)
    return Outcome(
        request_id=walk.flight.request.request_id,
        verdict=verdict,
        draft=draft,
        top_ids=_top_ids(walk.left, rows, num_top) if num_top else NO_TOP_IDS,
    )


def _top_ids(nodes: Sequence[Node], rows: TickRows, num_top: int) -> NDArray[np.int64]:
    """Return the likeliest tokens after each row that is final, [N, num_top]; -1 for others."""
    found = np.full((len(nodes), num_top), -1, np.int64)
    places = [(node, rows.final[it]) for node, it in enumerate(nodes) if it in rows.final]
    found[[node for node, _ in places]] = top_ids(
        rows.logits[[place for _, place in places]], num_top
    )
    return found
