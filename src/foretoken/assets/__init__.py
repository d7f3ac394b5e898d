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
    draft_options: Mapping[str, float | str]


_ROOT = Path(__file__).parent

EMBEDDED = {
    "stories": EmbeddedPair(
        target=_ROOT / "stories" / "target",
        draft=_ROOT / "stories" / "draft",
        # Both models fit into the processor's caches, where every row of the target's pass and
        # every level of the draft counts: see docs/decisions/0009-small-trees-for-the-pair.md.
        draft_options={
            "max_depth": 4,
            "min_gain": 0.3,
            "width": 2,
            "max_nodes": 5,
            "dtype": "bfloat16",  # half as much to read again after each pass of the target
        },
    )
}

EMBEDDED_MODELS: Mapping[str, Path] = {
    **{name: pair.target for name, pair in EMBEDDED.items()},
    "looped": _ROOT / "looped",  # runs two layers four times, for drafters inside the pass
}
