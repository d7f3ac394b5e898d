"""Models that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EmbeddedPair:
    """A target and a draft that share their tokens.

    Args:
        target: Directory of the target model.
        draft: Directory of the draft model.
        draft_options: Options of the drafter `draft-model` that suit the pair.
    """

    target: Path
    draft: Path
    draft_options: Mapping[str, float]


_ROOT = Path(__file__).parent

EMBEDDED = {
    "stories": EmbeddedPair(
        target=_ROOT / "stories" / "target",
        draft=_ROOT / "stories" / "draft",
        # A pass of this draft costs about a sixth of the target's: a level has to be worth more
        # than it would beside a large target.
        draft_options={"max_depth": 6, "min_gain": 0.25},
    )
}
