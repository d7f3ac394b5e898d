"""What a load bench's record says, loads together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from foretoken.bench.serve.level import GOODPUT_BOUND, LATENCY_BOUND

Entry: TypeAlias = Mapping[str, Any]


class Goal(NamedTuple):
    """A goal and what became of it.

    Args:
        title: What has to hold.
        holds: Whether it does.
        detail: How nearly.
    """

    title: str
    holds: bool
    detail: str


def goals(record: Entry) -> list[Goal]:
    """Return all goals of the server under load."""
    cells = record["cells"]
    systems = [system for cell in cells for system in cell["systems"].values()]
    num_errors = sum(system["num_errors"] for system in systems)
    num_rejected = sum(system["num_rejected"] for system in systems)
    num_different = sum(cell["num_different_texts"] for cell in cells)
    return [
        Goal("no errors", num_errors == 0, f"{num_errors} errors, {num_rejected} sent away"),
        Goal("the same texts", num_different == 0, f"{num_different} differ"),
        *_ratio_goal(cells, "goodput", f"goodput is at least {GOODPUT_BOUND:g} × plain", min),
        *_ratio_goal(
            cells, "latency", f"mean latency is at most {LATENCY_BOUND:g} × plain below 1", max
        ),
    ]


def num_unexpected_texts(record: Entry) -> int:
    """Return how many texts differ although the engine promises that none does."""
    return sum(
        cell["num_different_texts"] for cell in record["cells"] if cell["exactness"] == ["bitwise"]
    )


def _ratio_goal(cells: Sequence[Entry], name: str, title: str, worst: Any) -> list[Goal]:
    concerned = [cell for cell in cells if name in cell["goals"]]
    if not concerned:
        return []
    outcomes = [cell["goals"][name] for cell in concerned]
    num_held = sum(it["holds"] for it in outcomes)
    num_unclear = sum(not it["is_clear"] for it in outcomes)
    extreme = worst(cell[f"{name}_ratio"]["median"] for cell in concerned)
    detail = (
        f"at {num_held} of {len(outcomes)} loads, {num_unclear} of them within the noise; "
        f"worst {extreme:.3f}"
    )
    return [Goal(title, num_held == len(outcomes), detail)]


__all__ = ["Goal", "goals", "num_unexpected_texts"]
