"""How far a run is, in a form that any caller can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One report of a run.

    Args:
        stage: What is being done, for example "training draft-2".
        done: Units of it that are finished.
        total: How many there are.
        detail: More, for example the loss; empty if there is none.
        is_resumed: Whether what is done was found, not made.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
    is_resumed: bool = False


OnProgress: TypeAlias = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """Show nothing."""


__all__ = ["OnProgress", "Progress", "silent"]
