"""The planner contract: how much is drafted for whom, and which nodes are worth their rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.verdict import Verdict

Order = Mapping[str, DraftBudget]
"""Drafters that are to draft for one request in one step, each with the bounds of its draft."""


class Text(Protocol):
    """What a request has said so far, as the planner sees it: a live view."""

    @property
    def request_id(self) -> str:
        """Whose it is."""
        ...

    @property
    def temperature(self) -> float:
        """Of its sampling; 0 if greedy."""
        ...

    @property
    def token_ids(self) -> Sequence[int]:
        """Prompt and output."""
        ...

    @property
    def num_prompt_ids(self) -> int:
        """How many of them are the prompt."""
        ...


Retrace = Callable[[Sequence[int], int, int], NDArray[np.int64]]
"""Returns what drafts along a text would have given: `Retracer.retrace` of a drafter."""


class Share(Protocol):
    """One request's share of a step, as the planner sees it."""

    @property
    def request_id(self) -> str:
        """Identifies the request as long as it runs."""
        ...

    @property
    def drafters(self) -> tuple[str, ...]:
        """Labels of the drafters that it may have."""
        ...

    @property
    def budget(self) -> DraftBudget | None:
        """What a draft may never exceed; None while the prompt goes on."""
        ...

    @property
    def temperature(self) -> float:
        """Of its sampling; 0 if greedy."""
        ...

    @property
    def text(self) -> Text:
        """What it has said so far."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the pass that it takes in any case: the root, or a part of the prompt."""
        ...

    @property
    def num_keys(self) -> int:
        """Positions that its rows look back on."""
        ...


@dataclass(slots=True)
class StepTimes:
    """Where the time of a step went, in seconds.

    Args:
        draft_s: Of each drafter that drafted.
        pass_s: The target's pass.
        total_s: All of it, what is around the two included.
    """

    draft_s: dict[str, float] = field(default_factory=dict)
    pass_s: float = 0.0
    total_s: float = 0.0


class Planner(Protocol):
    """Decides in every step; its answers change speed, never tokens."""

    def order(self, shares: Sequence[Share]) -> list[Order]:
        """Return for each request who drafts and within which bounds; nobody is plain decoding."""
        ...

    def choose(self, shares: Sequence[Share], drafts: Sequence[Draft]) -> list[Draft]:
        """Return the drafts cut down to the nodes that are to be scored."""
        ...

    def observe(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Learn from a step: what was kept of the drafts that were scored, and what it took."""
        ...

    def finish(self, text: Text) -> None:
        """Learn from the text of a request that is about to be forgotten, because it has ended."""
        return

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended; unknown ones are ignored."""
        ...


class PassingPlanner(Planner):
    """Leaves every decision to another planner; those who only watch steps derive from it.

    Args:
        planner: Who decides.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def order(self, shares: Sequence[Share]) -> list[Order]:
        """Return the other planner's orders."""
        return self._planner.order(shares)

    def choose(self, shares: Sequence[Share], drafts: Sequence[Draft]) -> list[Draft]:
        """Return the other planner's choice."""
        return self._planner.choose(shares, drafts)

    def observe(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Pass it on."""
        self._planner.observe(shares, scored, verdicts, times)

    def finish(self, text: Text) -> None:
        """Pass it on."""
        self._planner.finish(text)

    def forget(self, request_id: str) -> None:
        """Pass it on."""
        self._planner.forget(request_id)


class FixedPlanner(Planner):
    """Every drafter drafts in every step, within the bounds, and all of it is scored.

    Args:
        aside: Labels of drafters that have nothing to say before a pass.
    """

    def __init__(self, aside: Collection[str] = ()) -> None:
        self._aside = frozenset(aside)

    def order(self, shares: Sequence[Share]) -> list[Order]:
        """Return the request's own bounds for each of its drafters."""
        return [
            {}
            if share.budget is None or share.budget.is_empty
            else {label: share.budget for label in share.drafters if label not in self._aside}
            for share in shares
        ]

    def choose(self, shares: Sequence[Share], drafts: Sequence[Draft]) -> list[Draft]:
        """Return the drafts as they are."""
        return list(drafts)

    def observe(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Learn nothing."""

    def forget(self, request_id: str) -> None:
        """Forget nothing."""
