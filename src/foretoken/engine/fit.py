"""Whether a verifier and drafters go together, and what a step then has to do for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from foretoken.core.draft import SiblingDraw
from foretoken.drafters.base import Drafter
from foretoken.drafters.in_flight import InFlightDrafter
from foretoken.errors import ConfigError
from foretoken.verifiers.base import Verifier, as_node_rule


def agree_on_draws(
    rule: str,
    verifier: Verifier | type[Verifier],
    drafters: Mapping[str, Drafter | type[Drafter]],
) -> dict[str, SiblingDraw]:
    """Return for each drafter the way of drawing siblings that the verifier prefers of its ways.

    Args:
        rule: Name of the verifier, for messages.
        verifier: Or its class; both say it.
        drafters: Label to drafter or class.

    Raises:
        ConfigError: A drafter has no way that the verifier takes, or drafts in flight and the
            verifier cannot settle one token after the other.
    """
    agreed = {}
    for label, drafter in drafters.items():
        fitting = [draw for draw in verifier.draws if draw in drafter.draws]
        if not fitting:
            raise ConfigError(
                f"verifier {rule!r} takes siblings drawn as {_listed(verifier.draws)}; "
                f"drafter {label!r} draws them as {_listed(drafter.draws)}",
                hint="use the verifier coupled, which takes every draft, or another drafter",
            )
        agreed[label] = fitting[0]
        kind = drafter if isinstance(drafter, type) else type(drafter)
        if issubclass(kind, InFlightDrafter):
            as_node_rule(rule, cast(Verifier, verifier))  # a class has what its objects have
    return agreed


def takes_copies_in_trees(verifier: Verifier | type[Verifier]) -> bool:
    """Return whether tokens that were not sampled may be added to any other draft."""
    return verifier.max_width is None and SiblingDraw.DETERMINISTIC in verifier.draws


def observed_layers(drafters: Mapping[str, Drafter]) -> dict[str, tuple[int, ...]]:
    """Return the layers whose states drafters ask for; only those that do."""
    layers = {label: drafter.needs.hidden_layers for label, drafter in drafters.items()}
    return {label: own for label, own in layers.items() if own}


def most_sharing(drafters: Mapping[str, Drafter]) -> str | None:
    """Return the drafter that runs most of the target's layers itself; None if none does."""
    shared = {label: drafter.needs.shared_layers for label, drafter in drafters.items()}
    label = max(shared, key=shared.__getitem__, default=None)
    return label if label is not None and shared[label] else None


def _listed(draws: Collection[SiblingDraw]) -> str:
    return " or ".join(sorted(draw.value for draw in draws))
