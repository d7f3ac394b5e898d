"""Time by phase of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

PHASES = ("prefill", "draft", "target", "verify", "overhead")


@dataclass(slots=True)
class Phases:
    """Seconds by phase, and milliseconds of passes by their number of rows.

    Args:
        prefill_s: Passes of the target that held rows of a prompt.
        draft_s: Everything that drafters do, their own passes included.
        target_s: The other passes of the target.
        verify_s: The verifier's walks.
        total_s: Wall time of the context, generation and everything around it.
        target_ms: Rows to milliseconds of each pass in `target_s`.
        draft_ms: The same of the passes of draft models, but for trees that grow in one call.
    """

    prefill_s: float = 0.0
    draft_s: float = 0.0
    target_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0
    target_ms: dict[int, list[float]] = field(default_factory=dict)
    draft_ms: dict[int, list[float]] = field(default_factory=dict)

    @property
    def overhead_s(self) -> float:
        """What is in none of the other phases: scheduling, batches, commit, text."""
        parts = self.prefill_s + self.draft_s + self.target_s + self.verify_s
        return max(0.0, self.total_s - parts)

    def as_dict(self) -> dict[str, float]:
        """Return seconds by name of phase; they add up to the total."""
        return {name: getattr(self, f"{name}_s") for name in PHASES}


__all__ = ["PHASES", "Phases"]
