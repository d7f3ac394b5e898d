"""What `foretoken bench speed` measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foretoken.bench.workloads import Workload
from foretoken.errors import ConfigError

SHARED, SHALLOW, DEEP = "shared", "shallow", "deep"
PLAIN = "plain"  # one token after the other, by ordinary passes
AUTO = "auto"  # the planner chooses
LOOPSPEC = "loopspec"
CHECKS = ("eager", "lazy")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode with one of the models.

    Args:
        model: SHARED, SHALLOW or DEEP.
        kind: PLAIN, AUTO, LOOPSPEC or one of CHECKS.
        exit_loop: Of a fixed plan; 0 if there is none.
    """

    model: str
    kind: str
    exit_loop: int = 0

    @property
    def name(self) -> str:
        """What reports call it."""
        if self.kind == PLAIN:
            return f"{self.model} {PLAIN}"
        return f"{self.kind} e={self.exit_loop}" if self.exit_loop else self.kind

    @property
    def is_fixed(self) -> bool:
        """Whether the model of the pipeline says how many ticks it takes."""
        return self.kind in CHECKS


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSettings:
    """What is measured.

    Args:
        models: SHARED and, if given, SHALLOW and DEEP to their directories.
        names: What reports call them.
        weights: What changes when their weights do: fingerprints.
        quality: Of each model whose quality was measured: `bits_per_character` and `agreement`
            by depth, the last of which is the model's own, and `num_tokens`.
        workload: Prompts; number i is sampled with seed + i.
        max_prompt_tokens: What is beyond is cut off.
        exit_loops: Each is a way of its own.
        checks: Each of CHECKS wanted.
        loopspec: Options of the drafter; None leaves it out.
        max_new_tokens: Per prompt, always all.
        temperatures: Each is a set of rounds of its own.
        batch_sizes: Prompts at once; likewise.
        rounds: How often every way does all the work.
        seed: Of the first prompt's noise.
        dtype: As of `LLM`.
        device: As of `LLM`.
        threads: CPU threads.
    """

    models: Mapping[str, str]
    names: Mapping[str, str]
    weights: Mapping[str, str]
    quality: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    workload: Workload
    max_prompt_tokens: int
    exit_loops: Sequence[int]
    checks: Sequence[str]
    loopspec: Mapping[str, Any] | None
    max_new_tokens: int
    temperatures: Sequence[float]
    batch_sizes: Sequence[int]
    rounds: int
    seed: int
    dtype: str
    device: str
    threads: int

    def __post_init__(self) -> None:
        """Check what the command line cannot know.

        Raises:
            ConfigError: A check has another name, or there are too few tokens to time.
        """
        for check in self.checks:
            if check not in CHECKS:
                raise ConfigError(
                    f"checks are {' and '.join(CHECKS)}; got {check!r}", hint="change --check"
                )
        if self.max_new_tokens < 2:
            raise ConfigError(
                f"max_new_tokens is at least 2, since the first is the prompt's own; got "
                f"{self.max_new_tokens}",
                hint="raise --max-new-tokens",
            )

    @property
    def ways(self) -> list[Way]:
        """All ways, plain decoding of the shared model first."""
        fixed = [
            Way(SHARED, check, exit_loop) for exit_loop in self.exit_loops for check in self.checks
        ]
        others = [Way(SHARED, AUTO)] + ([] if self.loopspec is None else [Way(SHARED, LOOPSPEC)])
        unshared = [Way(name, PLAIN) for name in self.models if name != SHARED]
        return [Way(SHARED, PLAIN), *fixed, *others, *unshared]

    def as_json(self) -> dict[str, Any]:
        """Return all that the numbers depend on."""
        return {
            "models": dict(self.names),
            "weights": dict(self.weights),
            "workload": self.workload.name,
            "num_prompts": len(self.workload.prompts),
            "max_prompt_tokens": self.max_prompt_tokens,
            "exit_loops": list(self.exit_loops),
            "checks": list(self.checks),
            "loopspec": None if self.loopspec is None else dict(self.loopspec),
            "max_new_tokens": self.max_new_tokens,
            "temperatures": list(self.temperatures),
            "batch_sizes": list(self.batch_sizes),
            "rounds": self.rounds,
            "seed": self.seed,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
        }


__all__ = [
    "AUTO",
    "CHECKS",
    "DEEP",
    "LOOPSPEC",
    "PLAIN",
    "SHALLOW",
    "SHARED",
    "SpeedSettings",
    "Way",
]
