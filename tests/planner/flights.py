"""A pipeline played row by row, as a loop with tokens in flight does it: what the model is held to.

Guesses are drawn per row: those of a row whose tokens are right settle at a depth of a given
distribution; a row on a wrong way has guesses of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from foretoken.planner.pipeline_model import Check

RIGHT = 0


@dataclass(slots=True)
class Row:
    """A row in flight: whether all tokens up to it are right, its guesses by depth, its depth."""

    is_right: bool
    guesses: list[int]  # after loop 1, 2, ...; RIGHT if it is the final one
    token: int
    depth: int = 0


@dataclass(slots=True)
class Played:
    """What came of it."""

    ticks_per_token: float
    rows: float
    most_rows: int
    settled: list[tuple[int, int]]


class Pipeline:
    """Plays one request.

    Args:
        settle: Probability of every settling depth.
        exit_loop: As in a plan.
        max_in_flight: As in a plan.
        check: When guesses are checked.
        change: Probability that a wrong guess differs from the wrong one before it.
        seed: Of the draws.
    """

    def __init__(
        self,
        settle: Sequence[float],
        exit_loop: int,
        max_in_flight: int,
        check: Check,
        *,
        change: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.settle, self.loops = list(settle), len(settle)
        self.exit_loop, self.max_in_flight, self.check = exit_loop, max_in_flight, check
        self._change, self._random = change, random.Random(seed)
        self._last_token = RIGHT
        self.rows = [self._row(is_right=True, token=RIGHT)]
        self.settled: list[tuple[int, int]] = []

    def _row(self, *, is_right: bool, token: int) -> Row:
        depth = self._random.choices(range(1, self.loops + 1), self.settle)[0]
        guesses, wrong = [], self._new_token()
        for loop in range(1, self.loops + 1):
            if self._random.random() < self._change:
                wrong = self._new_token()
            guesses.append(RIGHT if loop >= depth else wrong)
        return Row(is_right, guesses, token)

    def _new_token(self) -> int:
        self._last_token += 1
        return self._last_token

    def tick(self) -> tuple[int, int]:
        """Run one tick; return rows that ran and tokens that became final."""
        num_rows, num_tokens = len(self.rows), 0
        for row in self.rows:
            row.depth += 1
        while self.rows[0].depth == self.loops:
            num_tokens += 1
            root = self.rows.pop(0)
            self._settle(root)
            if not self.rows or self.rows[0].token != RIGHT:
                self.rows = [self._row(is_right=True, token=RIGHT)]
                break
        self._grow()
        return num_rows, num_tokens

    def _settle(self, root: Row) -> None:
        depth = 1 + max((n for n, guess in enumerate(root.guesses, 1) if guess != RIGHT), default=0)
        self.settled.append((depth, depth))

    def _grow(self) -> None:
        place = 0
        while place < len(self.rows):
            row = self.rows[place]
            if row.depth >= self.exit_loop:
                guess = row.guesses[row.depth - 1]
                has_child = place + 1 < len(self.rows)
                if has_child and self.check is Check.EAGER and self.rows[place + 1].token != guess:
                    del self.rows[place + 1 :]
                    has_child = False
                if not has_child and len(self.rows) < self.max_in_flight:
                    is_right = row.is_right and guess == RIGHT
                    self.rows.append(self._row(is_right=is_right, token=guess))
            place += 1

    def play(self, num_tokens: int) -> Played:
        """Run until so many tokens are final."""
        done = ticks = rows = most = 0
        while done < num_tokens:
            num_rows, num_done = self.tick()
            done, ticks, rows = done + num_done, ticks + 1, rows + num_rows
            most = max(most, num_rows)
        return Played(ticks / done, rows / ticks, most, self.settled)
