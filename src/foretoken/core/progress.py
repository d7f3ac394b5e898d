"""How far a long piece of work is, in a form that any caller can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One report of work that takes a while.

    Args:
        done: Units of the stage that are finished.
        total: How many there are.
        stage: What is being done, for example "training draft-2"; empty if it is all one.
        detail: What goes on within it, in a few words; empty if there is nothing to say.
        is_resumed: Whether what is done was found, not made.
        left_s: Seconds that the rest may take; None if that is not known.
    """

    done: int
    total: int
    stage: str = ""
    detail: str = ""
    is_resumed: bool = False
    left_s: float | None = None


OnProgress: TypeAlias = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """Show nothing."""


__all__ = ["OnProgress", "Progress", "silent"]
