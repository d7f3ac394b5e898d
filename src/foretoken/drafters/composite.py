"""What drafters that are made of drafters have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from foretoken.core.draft import Draft, SiblingDraw, merge_drafts
from foretoken.core.options import ComponentSpec
from foretoken.core.params import SamplingParams
from foretoken.drafters import DRAFTERS, prepare_drafter
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Outcome,
    RequestView,
    StandingStates,
)
from foretoken.errors import ConfigError
from foretoken.models.batch import RowStates

_MAX_MEMBERS = 64
T = TypeVar("T")


class CompositeDrafter(Drafter):
    """Serves every request with all its members: they start, learn and stop together.

    Args:
        members: Label to drafter, as `build_members` makes them; the labels are the sources of
            the nodes.

    Raises:
        ConfigError: One of them drafts in flight.

    Attributes:
        members: As given.
    """

    def __init__(self, members: dict[str, Drafter]) -> None:
        self.members = list(members.items())
        for label, drafter in self.members:
            if drafter.needs.in_flight:
                raise ConfigError(
                    f"drafter {label!r} drafts inside the target's pass and is no part of others",
                    hint="name it beside the others, as one of the request's drafters",
                )
        needs = [drafter.needs for _, drafter in self.members]
        self.needs = DrafterNeeds(
            hidden_layers=tuple(sorted({layer for it in needs for layer in it.hidden_layers})),
            top_logits=max((it.top_logits for it in needs), default=0),
            draft_cache=any(it.draft_cache for it in needs),
            shared_layers=max((it.shared_layers for it in needs), default=0),
            target_past=any(it.target_past for it in needs),
        )

    def serves(self, params: SamplingParams, *, has_reference: bool) -> bool:
        """Return whether any of them does; the others then have nothing to say."""
        return any(
            drafter.serves(params, has_reference=has_reference) for _, drafter in self.members
        )

    def start(self, request: RequestView) -> None:
        """Let every member learn of a new request."""
        for _, drafter in self.members:
            drafter.start(request)

    def observe(self, standing: Sequence[StandingStates]) -> None:
        """Let every member that asks for states have its own."""
        for _, drafter in self.members:
            if layers := drafter.needs.hidden_layers:
                drafter.observe(
                    [
                        replace(it, hidden={layer: it.hidden[layer] for layer in layers})
                        for it in standing
                    ]
                )

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Tell every member what was kept; they are used to drafts that are not theirs."""
        for _, drafter in self.members:
            drafter.commit(outcomes)

    def row_states(self, request_id: str, positions: range, draft: Draft) -> RowStates | None:
        """Return what the first member knows that has computed any of the target's rows."""
        known = (
            drafter.row_states(request_id, positions, draft)
            for _, drafter in self.members
            if drafter.needs.shared_layers
        )
        return next((states for states in known if states is not None), None)

    def stop(self, request_id: str) -> None:
        """Let every member forget a request."""
        for _, drafter in self.members:
            drafter.stop(request_id)

    def close(self) -> None:
        """Let every member let go of what it holds."""
        for _, drafter in self.members:
            drafter.close()


def member_context(context: DraftContext, place: int, drafter: Drafter) -> DraftContext:
    """Return what a member is to know of a request: all of it, with randomness of its own.

    Members that cannot draw siblings as the request wants them choose them without randomness.
    """
    siblings = context.siblings
    return replace(
        context,
        siblings=siblings if siblings in drafter.draws else SiblingDraw.DETERMINISTIC,
        # One number for each path through the members, whatever the depth of nesting.
        drafter_index=(context.drafter_index + 1) * _MAX_MEMBERS + place,
    )


def ways_to_mix(drafters: Collection[Drafter]) -> frozenset[SiblingDraw]:
    """Return the ways of drawing siblings that drafts have to which several drafters contribute.

    Copies may stand among siblings that are ranked by the request's race: every rule that takes
    these takes any. Samples may not be mixed with copies, nor may those of several drafters pass
    for those of one: rules that compare probabilities count drafters.
    """
    ways = {SiblingDraw.DETERMINISTIC}
    if any(SiblingDraw.COUPLED in drafter.draws for drafter in drafters):
        ways.add(SiblingDraw.COUPLED)
    return frozenset(ways)


def merge_mixed(drafts: Sequence[Draft], siblings: SiblingDraw) -> Draft:
    """Return the union of drafts of one of the `ways_to_mix`, said to be of this way."""
    return replace(merge_drafts(drafts), siblings=siblings)


def expected_tokens(draft: Draft) -> float:
    """Return how many of its draft tokens are taken, by its own estimate."""
    return sum(map(math.exp, draft.path_logprobs()[1:]))


def check_members(option: str, specs: Sequence[ComponentSpec]) -> None:
    """Check the specs of an option such as `merged:of` before anything is loaded.

    Raises:
        UnknownNameError: There is no such drafter, or one of them has no such option.
        ConfigError: There are none or too many, or an option's value is not allowed.
    """
    if not 1 <= len(specs) <= _MAX_MEMBERS:
        raise ConfigError(
            f"{option} names from 1 to {_MAX_MEMBERS} drafters; got {len(specs)}",
            hint=f"write {option}=first+second(key=value)",
        )
    for spec in specs:
        prepare_drafter(spec)
        if SiblingDraw.DETERMINISTIC not in DRAFTERS.load(spec.name).draws:
            raise ConfigError(
                f"{option} is for drafters that can choose siblings; {spec.name} draws them all",
                hint="use that drafter by itself",
            )


def check_capable(option: str, specs: Sequence[ComponentSpec], kind: type, does: str) -> None:
    """Check that each drafter of an option is of a kind.

    Args:
        option: Such as `tail:then`.
        specs: What was given.
        kind: A protocol that can be checked at run time, or a class.
        does: What drafters of that kind can do, for the message.

    Raises:
        ConfigError: One of them is not.
    """
    for spec in specs:
        if not issubclass(DRAFTERS.load(spec.name), kind):
            raise ConfigError(
                f"{option} is for drafters that {does}; {spec.name} does not",
                hint=f"for example {option}=suffix",
            )


def build_members(specs: Sequence[ComponentSpec], host: DrafterHost) -> dict[str, Drafter]:
    """Build drafters, each under its name; those whose names come again are numbered.

    Raises:
        ModelError: A drafter's own model cannot be loaded or does not fit.
    """
    return numbered((spec.name, prepare_drafter(spec)(host)) for spec in specs)


def numbered(items: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Number names that come again, `name#2`, so that all can be told apart."""
    seen: Counter[str] = Counter()
    labelled = {}
    for name, item in items:
        seen[name] += 1
        labelled[f"{name}#{seen[name]}" if seen[name] > 1 else name] = item
    return labelled
