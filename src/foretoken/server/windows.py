"""Counts of what steps did, since the start and over the last seconds.

Only counts are kept, and every rate is derived from them. A window is the difference of two
moments of the same counts, so counting twice is not needed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from dataclasses import dataclass, field

from foretoken.core.draft import source_names

WINDOW_S = 10.0
EVERY_S = 1.0  # between the moments that are remembered


@dataclass(slots=True, kw_only=True)
class Totals:
    """What steps did.

    Drafters are named as nodes name them, "first+second" where several proposed the same, so that
    the sum over all names counts each token once.

    Args:
        steps: Steps by kind: "prompt" if a part of a prompt was read, "speculative" if draft
            tokens were scored, else "plain".
        step_s: Seconds that they took, by kind.
        plain_s: Seconds that plain decoding would have taken for the same tokens, by kind.
        phase_s: The seconds of `step_s` by phase and drafter; "" for phases of no drafter.
        rows: Rows of the target's passes: "prompt", "root", "accepted" or "wasted".
        tokens_per_step: How often a step gave a request so many tokens.
        drafts: Drafts that were scored, by the drafters that had a part in them.
        draft_tokens: Draft tokens that were scored, by drafter.
        accepted: Draft tokens that were emitted, by position (from 0) and drafter.
        reached: How often so many levels of a draft were judged.
    """

    steps: Counter[str] = field(default_factory=Counter)
    step_s: dict[str, float] = field(default_factory=dict)
    plain_s: dict[str, float] = field(default_factory=dict)
    phase_s: dict[tuple[str, str], float] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    tokens_per_step: Counter[int] = field(default_factory=Counter)
    drafts: Counter[str] = field(default_factory=Counter)
    draft_tokens: Counter[str] = field(default_factory=Counter)
    accepted: Counter[tuple[int, str]] = field(default_factory=Counter)
    reached: Counter[int] = field(default_factory=Counter)

    def copy(self) -> Totals:
        """Return what stands now."""
        names = (item.name for item in dataclasses.fields(self))
        return Totals(**{name: getattr(self, name).copy() for name in names})

    def since(self, before: Totals) -> Totals:
        """Return what was added to an earlier copy."""
        added = {}
        for item in dataclasses.fields(self):
            now, then = getattr(self, item.name), getattr(before, item.name)
            added[item.name] = type(now)(
                {key: value - then.get(key, 0) for key, value in now.items()}
            )
        return Totals(**added)

    @property
    def num_tokens(self) -> int:
        """Tokens that were emitted."""
        return sum(size * count for size, count in self.tokens_per_step.items())

    @property
    def tokens_per_request_step(self) -> float | None:
        """Tokens that a step gave a request on average; None if there was no such step."""
        count = self.tokens_per_step.total()
        return self.num_tokens / count if count else None

    @property
    def accepted_by_source(self) -> Counter[str]:
        """Draft tokens that were emitted, by drafter as nodes name them."""
        by_source: Counter[str] = Counter()
        for (_, source), count in self.accepted.items():
            by_source[source] += count
        return by_source

    @property
    def accepted_by(self) -> Counter[str]:
        """The same by single drafter; a token that several proposed counts for each."""
        by_name: Counter[str] = Counter()
        for source, count in self.accepted_by_source.items():
            for name in source_names(source):
                by_name[name] += count
        return by_name

    @property
    def judged(self) -> dict[int, int]:
        """Drafts of which a level was judged, by depth from 1: all above it was right."""
        return {
            depth: sum(count for deepest, count in self.reached.items() if deepest >= depth)
            for depth in range(1, max(self.reached, default=0) + 1)
        }

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the judged levels that held the emitted token, from depth 1 on."""
        taken: Counter[int] = Counter()
        for (position, _), count in self.accepted.items():
            taken[position + 1] += count
        return [taken[depth] / count for depth, count in self.judged.items() if count]

    @property
    def drafter_share(self) -> float | None:
        """Share of the time that drafters took; None if no time has passed."""
        total_s = sum(self.step_s.values())
        draft_s = sum(value for (phase, _), value in self.phase_s.items() if phase == "draft")
        return draft_s / total_s if total_s else None

    @property
    def wasted_row_share(self) -> float | None:
        """Share of the rows, those of prompts left out, that scored a token nobody got."""
        num_rows = self.rows.total() - self.rows["prompt"]
        return self.rows["wasted"] / num_rows if num_rows else None

    @property
    def speedup(self) -> float | None:
        """Time of plain decoding by the time taken; None if the one or the other is unknown."""
        total_s, plain_s = sum(self.step_s.values()), sum(self.plain_s.values())
        return plain_s / total_s if total_s and plain_s else None


class Window:
    """The last seconds of counts that only grow.

    It remembers a moment every second, taken before a step is added, and tells what was added
    since the first of those that are young enough: between nine and ten seconds of steps.

    Args:
        window_s: Seconds that count.
        every_s: Seconds between moments.
    """

    def __init__(self, window_s: float = WINDOW_S, every_s: float = EVERY_S) -> None:
        self._window_s, self._every_s = window_s, every_s
        self._moments: deque[tuple[float, Totals]] = deque()
        self._last_s = float("-inf")

    def note(self, totals: Totals, at_s: float) -> None:
        """Say that a step is about to be added to the totals."""
        self._last_s = at_s
        if self._moments and at_s < self._moments[-1][0] + self._every_s:
            return
        self._moments.append((at_s, totals.copy()))
        while len(self._moments) > 1 and self._moments[0][0] < at_s - self._window_s:
            self._moments.popleft()

    def recent(self, totals: Totals, at_s: float) -> tuple[Totals, float]:
        """Return what was added lately, and over how many seconds; nothing over 0 if nothing."""
        begin_s = at_s - self._window_s
        if self._last_s < begin_s:
            return Totals(), 0.0
        young = itertools.dropwhile(lambda moment: moment[0] < begin_s, self._moments)
        since_s, before = next(young, self._moments[-1])
        return totals.since(before), at_s - since_s


__all__ = ["EVERY_S", "WINDOW_S", "Totals", "Window"]
