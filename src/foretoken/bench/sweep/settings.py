"""What a sweep measures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from foretoken.bench.record import portable
from foretoken.bench.settings import RoundSettings
from foretoken.errors import ConfigError

PLAIN = "plain"
PLAIN_AGAIN = "plain again"  # does what plain does, in an engine of its own
AUTO = "auto"  # all drafters loaded, the engine chooses

MOST_LEAST_SECONDS = 600.0  # no prompt comes twice, and seeds are dealt out beforehand


class Kind(StrEnum):
    """A kind of text."""

    STORY = "story"
    EDIT = "edit"
    RANDOM = "random"


class CellKey(NamedTuple):
    """Where a cell stands."""

    workload: Kind
    temperature: float
    batch_size: int

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.workload}, temperature {self.temperature:g}, batch {self.batch_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings(RoundSettings):
    """What is measured: each drafter, plain decoding and the engine's own choice in every cell.

    Args:
        weights: What changes when the weights of the models do: their fingerprints.
        workloads: Kinds of text.
        num_prompts: Least prompts per round; there are only whole batches.
        least_seconds: Of plain decoding per round; as many prompts are added as that takes.
        max_rounds: Most rounds of a cell, if intervals stay wide.
        width: Widest interval that needs no more rounds, as a part of its median.
    """

    weights: tuple[str, ...]
    workloads: tuple[Kind, ...]
    num_prompts: int
    least_seconds: float
    max_rounds: int
    width: float

    def __post_init__(self) -> None:
        """Check what the command line cannot know.

        Raises:
            ConfigError: There is nothing to compare, or a limit is below what it limits.
        """
        if not self.drafters:
            raise ConfigError("a sweep compares drafters; got none", hint="name one or more")
        if self.max_rounds < self.rounds:
            raise ConfigError(
                f"max_rounds is at least rounds, {self.rounds}; got {self.max_rounds}",
                hint="raise --max-rounds or lower --rounds",
            )
        if not 0 <= self.least_seconds <= MOST_LEAST_SECONDS:
            raise ConfigError(
                f"least_seconds is in [0, {MOST_LEAST_SECONDS:g}]; got {self.least_seconds}",
                hint="change --least-seconds",
            )
        if not self.width > 0:
            raise ConfigError(
                f"width is a part of a ratio, > 0; got {self.width}", hint="change --width"
            )

    @property
    def cells(self) -> list[CellKey]:
        """All cells, in the order in which they are measured."""
        return [
            CellKey(workload, temperature, batch_size)
            for workload in self.workloads
            for temperature in self.temperatures
            for batch_size in self.batch_sizes
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all that the numbers depend on; two equal ones may share a record."""
        return {
            "model": self.model_name,
            "weights": list(self.weights),
            "drafters": [portable(drafter) for drafter in self.drafters],
            "max_nodes": list(self.max_nodes),
            "workloads": list(self.workloads),
            "temperatures": list(self.temperatures),
            "batch_sizes": list(self.batch_sizes),
            "num_prompts": self.num_prompts,
            "least_seconds": self.least_seconds,
            "max_new_tokens": self.max_new_tokens,
            "rounds": self.rounds,
            "max_rounds": self.max_rounds,
            "width": self.width,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
        }


__all__ = ["AUTO", "PLAIN", "PLAIN_AGAIN", "CellKey", "Kind", "SweepSettings"]
