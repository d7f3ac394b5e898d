"""The contract of drafters that draft inside the target's own pass, out of its unfinished rows.

A target that applies one group of layers several times (G loops) can be run a loop at a time: a
tick takes all rows in flight one loop further, each at its own depth. What a row would say if it
ended early is a guess of the next token, and the row of that guess enters the next tick at depth
0 while the first one is still on its way. The engine's loop keeps the books; a drafter only says,
row by row, which children a row is to have.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.noise import Stream
from foretoken.core.sampling import Frontier, Sampler, best_guesses
from foretoken.drafters.base import DraftContext, Drafter
from foretoken.drafters.levels import RACE_TEMPERATURE


@dataclass(frozen=True, slots=True, eq=False)
class Guess:
    """A token that may come after a row.

    Args:
        token_id: The token.
        probs: The distribution that it was drawn from, [V] float64; None if it was not sampled.
    """

    token_id: int
    probs: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlightNode:
    """A row in flight that has just been run.

    Args:
        request_id: As given to `start`.
        token_ids: Prompt and output so far, a live view, not to be changed. The last one is the
            root, the oldest row in flight.
        path: Tokens in flight below the root, down to this row's own; empty for the root.
        depth: Loops that it has behind it, from 1 to G - 1.
        guesses: What may come after it by what was said so far, in the order in which it was
            said, those of other drafters included.
        sampler: Makes the target's choices.
        siblings: How guesses are to be drawn, one of the drafter's `draws`.
        drafter_index: Which of the request's drafters this is.
    """

    request_id: str
    token_ids: Sequence[int]
    path: Sequence[int]
    depth: int
    guesses: Sequence[Guess]
    sampler: Sampler
    siblings: SiblingDraw
    drafter_index: int

    def generator(self) -> np.random.Generator:
        """Return the randomness of this drafter's samples after this row at this depth."""
        position = len(self.token_ids) + len(self.path)
        return self.sampler.generator(Stream.DRAFT, position, self.drafter_index, self.depth)


@dataclass(frozen=True, slots=True)
class Growth:
    """What a drafter makes of a row.

    Args:
        guesses: What may come after the row from now on, in the order of drawing; None leaves
            what was said. Rows in flight below it that carry another token are dropped, and
            tokens that have none get one, as far as there is room. A sample that was once said
            has to stay, and is put to the verifier whether it has a row or not: so what is
            drawn never depends on the room for it.
        best_id: The token that the target would choose if the row ended here, for the planner;
            None if that was not looked at, or if there is none.
    """

    guesses: Sequence[Guess] | None
    best_id: int | None = None


class InFlightDrafter(Drafter):
    """A drafter whose drafts are rows in flight; its `needs.in_flight` is set.

    Attributes:
        width: Most guesses that a row may get.
        exit_loop: Loops after which a guess may be issued; None leaves it to the planner.
        max_in_flight: Most rows of one request at once; None leaves it to the planner.
        is_eager: Whether guesses are looked at again at greater depths, and taken back.
    """

    width: int
    exit_loop: int | None
    max_in_flight: int | None
    is_eager: bool

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return empty drafts: in an ordinary pass nothing is unfinished."""
        return [Draft.empty(context.token_ids[-1]) for context in contexts]

    @abstractmethod
    def looks(self, exit_loop: int) -> frozenset[int]:
        """Return the depths, of 1 to G - 1, at which `grow` wants to see a row.

        Args:
            exit_loop: Loops after which a guess may be issued, by the plan of this tick.
        """

    @abstractmethod
    def grow(
        self,
        nodes: Sequence[InFlightNode],
        logits: Tensor,  # [F, V]
        exit_loop: int,
    ) -> list[Growth]:
        """Return what is to become of each row, in the same order.

        What becomes of a row depends on its own path, depth and logits alone. Rows are given in
        the order of their age for each request; those below a row whose children are dropped
        are dropped with them, whatever is said of them.

        Args:
            nodes: Rows that are at one of the depths of `looks`. At other ones, which a planner
                may ask for too, only `best_id` is wanted.
            logits: The target's head on their unfinished states, one row each.
            exit_loop: As for `looks`.
        """


def early_choices(nodes: Sequence[InFlightNode], logits: Tensor) -> list[int | None]:
    """Return the token that the target would choose after each row if it ended here.

    Sampled requests run the race of the token's position, with the noise that the target itself
    will use. None where the request's controls leave no token.

    Args:
        nodes: Rows in flight.
        logits: Of their unfinished states, [F, V].
    """
    if not nodes:
        return []
    frontiers = [Frontier(node.sampler, node.token_ids, [node.path]) for node in nodes]
    token_ids, _ = best_guesses(logits, frontiers, 1, RACE_TEMPERATURE)
    return [best[0] if best else None for best in token_ids]


__all__ = ["Growth", "Guess", "InFlightDrafter", "InFlightNode", "early_choices"]
