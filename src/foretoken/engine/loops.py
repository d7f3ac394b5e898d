"""Which loop an engine runs: whole passes, or loop by loop where a drafter drafts in flight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from foretoken.drafters.base import Drafter
from foretoken.drafters.in_flight import InFlightDrafter
from foretoken.engine.pipelined import Pipelined
from foretoken.engine.step import Loop, WholePasses
from foretoken.errors import ConfigError, UnsupportedModelError
from foretoken.models.adapter import LanguageModel
from foretoken.planner.in_flight import FixedFlightPlanner, FlightPlan, FlightPlanner
from foretoken.verifiers.base import Verifier


def in_flight_label(drafters: Mapping[str, Drafter]) -> str | None:
    """Return the label of the drafter that drafts in flight; None if there is none.

    Raises:
        ConfigError: There are several, or others that cannot work beside it.
    """
    labels = [label for label, drafter in drafters.items() if drafter.needs.in_flight]
    if not labels:
        return None
    if len(labels) > 1:
        raise ConfigError(
            f"the target's loops are run for one drafter; got {', '.join(labels)}",
            hint="name one of them",
        )
    for label, drafter in drafters.items():
        needs = drafter.needs
        if needs.hidden_layers or needs.shared_layers or needs.target_past:
            raise ConfigError(
                f"drafter {label!r} works with what whole passes of the target leave behind; "
                f"{labels[0]!r} has it run loop by loop",
                hint=f"leave one of them out; suffix or prompt-lookup go with {labels[0]!r}",
            )
    return labels[0]


def choose_loop(
    target: LanguageModel,
    drafters: Mapping[str, Drafter],
    rule: str,
    verifier: Verifier,
    planner: FlightPlanner | None = None,
) -> Loop:
    """Return the loop that the drafters need.

    Args:
        target: The model whose output is wanted.
        drafters: Label to drafter.
        rule: Name of the verifier, for messages.
        verifier: The acceptance rule.
        planner: Of rows in flight; None for as many as the drafter says, always.

    Raises:
        ConfigError: Drafters do not go together, or not with the verifier.
        UnsupportedModelError: The target has no loops.
    """
    label = in_flight_label(drafters)
    if label is None:
        return WholePasses()
    drafter, shape = cast(InFlightDrafter, drafters[label]), target.info.loops
    if shape is None:
        raise UnsupportedModelError(
            f"drafter {label!r} needs a target that runs a group of layers several times; "
            f"{target.info.name!r} runs each layer once",
            hint="use another drafter",
        )
    is_narrow = verifier.max_width is not None or verifier.max_drafters is not None
    if drafter.width > 1 and is_narrow:
        raise ConfigError(
            f"verifier {rule!r} takes one sample per token; drafter {label!r} draws up to "
            f"{drafter.width}, each from a distribution of its own",
            hint="use the verifier coupled or mss, or have the drafter make one guess",
        )
    plan = fixed_plan(drafter, shape.loops)
    return Pipelined(label, shape.loops, planner or FixedFlightPlanner(plan))


def fixed_plan(drafter: InFlightDrafter, num_loops: int) -> FlightPlan:
    """Return what a drafter asks for; else the earliest guesses, and rows for all of them."""
    exit_loop = drafter.exit_loop or 1
    most_rows = max(1, -(-num_loops // exit_loop))
    return FlightPlan(exit_loop, drafter.max_in_flight or most_rows)


__all__ = ["choose_loop", "fixed_plan", "in_flight_label"]
