"""What was known where a token was chosen, before it was: the strata of part two."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretoken.certify.observe import Decision
from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.tree import ROOT
from foretoken.engine.request import Request


class Stratum(enum.Enum):
    """Where in a step a token was chosen; each is looked at by itself.

    A rule whose texts have the target's distribution gives it in each: which stratum a token is in
    follows from the path before it and from how far the draft goes on, which is decided before
    anything is drawn there (`core.draft.Draws`). So it is known before the token, and steps are
    independent of each other. Strata by what came after, such as rejected or not, would be wrong.
    """

    NO_DRAFT = "no draft"
    FIRST = "depth 1"
    SECOND = "depth 2"
    DEEPER = "depth 3 or more"
    BONUS = "bonus"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one token was chosen.

    Args:
        stratum: Which kind of place.
        depth: Its number in its step, from 1.
        draft_probs: The distribution that the drafter drew siblings from there, [V]; None if it
            drew none.
        children: Tokens of the siblings there if they were chosen without randomness; None if
            they were drawn, because then they may depend on what the rule draws or be drawn
            together with it.
    """

    stratum: Stratum
    depth: int
    draft_probs: NDArray[np.float32] | None = None
    children: tuple[int, ...] | None = None


class PlaceLog:
    """The places and rows of the tokens of some requests.

    Args:
        requests: Whose.
        draws: Ways in which their drafters draw siblings.
    """

    def __init__(self, requests: Sequence[Request], draws: Collection[SiblingDraw]) -> None:
        self._is_fixed = set(draws) == {SiblingDraw.DETERMINISTIC}
        self._places: dict[int, list[Place]] = {id(it.sampler): [] for it in requests}
        self._rows: dict[int, list[Tensor]] = {id(it.sampler): [] for it in requests}

    def watch(self, decision: Decision) -> None:
        """Note where the tokens of one verdict were chosen, and by which rows."""
        key = id(decision.sampler)
        if key not in self._places:
            return
        nodes = (ROOT, *decision.verdict.path)
        self._rows[key] += decision.chosen_rows
        self._places[key] += [
            self._place(decision.draft, node, depth) for depth, node in enumerate(nodes, start=1)
        ]

    def places(self, request: Request) -> list[Place]:
        """Return the place of each output token."""
        return self._places[id(request.sampler)][: len(request.output_ids)]

    def rows(self, request: Request) -> list[Tensor]:
        """Return the row that chose each output token, [V] each, on CPU."""
        return self._rows[id(request.sampler)][: len(request.output_ids)]

    def _place(self, draft: Draft, node: int, depth: int) -> Place:
        child_nodes = draft.tree.children[node]
        if not child_nodes:
            return Place(Stratum.NO_DRAFT if node == ROOT else Stratum.BONUS, depth)
        stratum = {1: Stratum.FIRST, 2: Stratum.SECOND}.get(depth, Stratum.DEEPER)
        draws = draft.draws.get(node, ())
        if draws:  # of several drafters, what they favour together
            mean = np.mean([group.probs for group in draws], axis=0)
            return Place(stratum, depth, draft_probs=mean.astype(np.float32))
        if self._is_fixed:
            tokens = tuple(sorted({draft.tree.token_ids[child] for child in child_nodes}))
            return Place(stratum, depth, children=tokens)
        return Place(stratum, depth)


__all__ = ["Place", "PlaceLog", "Stratum"]
