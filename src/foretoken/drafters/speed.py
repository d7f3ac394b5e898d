"""SPEED: the target's own early guesses, run through its shared layers beside what they follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from foretoken.core.checks import check_int
from foretoken.core.draft import SiblingDraw
from foretoken.drafters.base import DrafterHost, DrafterNeeds, Taxonomy
from foretoken.drafters.in_flight import (
    Growth,
    Guess,
    InFlightDrafter,
    InFlightNode,
    early_choices,
)
from foretoken.errors import ConfigError, UnsupportedModelError
from foretoken.models.loops import LoopShape

CHECKS = ("eager", "lazy")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions:
    """Options of `speed`.

    Args:
        exit_loop: Loops after which a row's guess of the next token is issued, at least 1. If it
            is not given, an adaptive plan chooses, and others take the first.
        in_flight: Most tokens of a request on their way at once. If it is not given, an adaptive
            plan chooses, and others take all that the exit loop leads to.
        check: `eager` looks at a row after every further loop, takes a guess back as soon as
            the row has changed its mind and issues the new one; `lazy` leaves it until the row
            is final, which saves the head on rows in between.
    """

    exit_loop: int | None = None
    in_flight: int | None = None
    check: str = "eager"

    def __post_init__(self) -> None:
        if self.exit_loop is not None:
            check_int("speed:exit_loop", self.exit_loop, 1)
        if self.in_flight is not None:
            check_int("speed:in_flight", self.in_flight, 1)
        if self.check not in CHECKS:
            raise ConfigError(
                f"speed:check is {' or '.join(CHECKS)}; got {self.check!r}", hint="change check"
            )


class SpeedDrafter(InFlightDrafter):
    """Begins the next token with what the last one would say if it ended after a few loops.

    All loops have the same weights, so a row that is in its third loop and one that is in its
    first take one read of them. A row's early choice is the target's own sampler on its
    unfinished state, with the noise of its position: for sampling as for greedy requests it is
    the final one as often as the two distributions allow.

    Source: SPEED, Hooper et al. 2023, arXiv:2310.12072. Its idea is followed; there is no code of
    the authors'. Looking again after every loop, sampling, and trees beside it are ours.

    Args:
        options: When guesses are issued and taken back.
        shape: How the target shares its layers.

    Raises:
        ConfigError: Guesses would be issued when rows are final.
    """

    Options: ClassVar[type[Any]] = SpeedOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="target itself (unfinished loops)",
        is_trained=False,
        termination="adaptive",
        structure="chain",
        reference="SPEED, arXiv:2310.12072",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(
        {SiblingDraw.COUPLED, SiblingDraw.DETERMINISTIC}
    )
    width = 1

    def __init__(self, options: SpeedOptions, shape: LoopShape) -> None:
        if options.exit_loop is not None and options.exit_loop >= shape.loops:
            raise ConfigError(
                f"speed:exit_loop is below the target's {shape.loops} loops; "
                f"got {options.exit_loop}",
                hint="change exit_loop",
            )
        self.needs = DrafterNeeds(in_flight=True)
        self.exit_loop = options.exit_loop
        self.max_in_flight = options.in_flight
        self.is_eager = options.check == "eager"
        self._num_loops = shape.loops

    @classmethod
    def create(cls, options: SpeedOptions, host: DrafterHost) -> SpeedDrafter:
        """Build it for a target that runs a group of layers several times.

        Raises:
            UnsupportedModelError: The target does not.
            ConfigError: Guesses would be issued when rows are final.
        """
        shape = host.target.info.loops
        if shape is None or shape.loops < 2:
            raise UnsupportedModelError(
                f"speed needs a target that runs a group of layers several times, so that tokens "
                f"at different depths share one read of its weights; {host.target.info.name!r} "
                f"has other weights at each depth, and nothing would be shared",
                hint="use early-exit, layer-skip, suffix, prompt-lookup or draft-model instead",
            )
        return cls(options, shape)

    def looks(self, exit_loop: int) -> frozenset[int]:
        """Return the exit loop, and if eager the depths after it."""
        last = self._num_loops if self.is_eager else min(exit_loop + 1, self._num_loops)
        return frozenset(range(exit_loop, last))

    def grow(
        self,
        nodes: Sequence[InFlightNode],
        logits: Tensor,  # [F, V]
        exit_loop: int,
    ) -> list[Growth]:
        """Return for each row the token that it would lead to if it ended here."""
        depths = self.looks(exit_loop)
        return [
            Growth(_guesses(best_id) if node.depth in depths else None, best_id)
            for node, best_id in zip(nodes, early_choices(nodes, logits), strict=True)
        ]


def _guesses(best_id: int | None) -> list[Guess]:
    return [] if best_id is None else [Guess(best_id)]
