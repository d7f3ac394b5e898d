"""What a way to decode would make per second, from the steps that it would take.

The time of a step is draft + pass(rows, keys) + the rest. A replay tells the steps exactly; the
cost curve tells the pass. What a replay says of the other times is too good: without the target
in between, everything stays in the processor's caches. So each drafter runs live once, at one
size, and the ratios of its times to those of the same steps replayed scale the other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foretoken.bench.tune.lab import Run
from foretoken.engine.step_log import StepRecord

PassMs = Callable[[int, int, int], float]
"""Milliseconds of a target pass by rows, positions looked back on and requests, all summed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How the times of live steps compare with what is known without them.

    Args:
        draft: Live over replayed seconds of drafting.
        other: The same of what is neither drafting nor the target's pass.
        target: Live seconds of the target's passes over those of the cost curve.
        outside_s: Seconds per step that no step sees: starting and ending requests, the loop.
    """

    draft: float
    other: float
    target: float
    outside_s: float

    @classmethod
    def of(cls, live: Run, played: Run, pass_ms: PassMs) -> Calibration:
        """Compare a live run with its replay, step by step on average.

        Both took the same steps, unless the target's exactness is less than bitwise.
        """
        share = len(played.steps) / len(live.steps)
        curve_s = _curve_s(live.steps, pass_ms)
        return cls(
            draft=_ratio(share * _draft_s(live.steps), _draft_s(played.steps)),
            other=_ratio(share * _other_s(live.steps), _other_s(played.steps)),
            target=_ratio(_pass_s(live.steps), curve_s),
            outside_s=_outside_s(live) / len(live.steps),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a way to decode should take for all prompts.

    Args:
        num_tokens: Output tokens.
        num_steps: Steps of the engine.
        prompt_s: Passes over prompts.
        target_s: The other passes of the target.
        draft_s: Drafting.
        other_s: Everything else.
    """

    num_tokens: int
    num_steps: int
    prompt_s: float
    target_s: float
    draft_s: float
    other_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.prompt_s + self.target_s + self.draft_s + self.other_s

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, the prompts' own passes included."""
        return self.num_tokens / self.total_s

    @property
    def step_ms(self) -> float:
        """Mean time of a step, the prompts' own passes not included."""
        return 1000 * (self.total_s - self.prompt_s) / self.num_steps


def predict(
    played: Run, pass_ms: PassMs, calibration: Calibration, *, prompt_s: float
) -> Prediction:
    """Return what replayed steps should take live.

    Args:
        played: The steps.
        pass_ms: The target's cost curve.
        calibration: Of the same drafter, at any size.
        prompt_s: Seconds of the passes over prompts, which are alike for every drafter.
    """
    return Prediction(
        num_tokens=played.num_tokens,
        num_steps=len(played.steps),
        prompt_s=prompt_s,
        target_s=calibration.target * _curve_s(played.steps, pass_ms),
        draft_s=calibration.draft * _draft_s(played.steps),
        other_s=calibration.other * _other_s(played.steps)
        + calibration.outside_s * len(played.steps),
    )


def observe(live: Run) -> Prediction:
    """Return what live steps took, to be expected again."""
    return Prediction(
        num_tokens=live.num_tokens,
        num_steps=len(live.steps),
        prompt_s=prompt_seconds(live),
        target_s=_pass_s(live.steps),
        draft_s=_draft_s(live.steps),
        other_s=_other_s(live.steps) + _outside_s(live),
    )


def prompt_seconds(live: Run) -> float:
    """Return how long the passes took that had a prompt among their rows."""
    return math.fsum(step.times.pass_s for step in live.steps if step.has_prompt)


def _pass_s(steps: Sequence[StepRecord]) -> float:
    return math.fsum(step.times.pass_s for step in steps if not step.has_prompt)


def _outside_s(live: Run) -> float:
    return max(0.0, sum(live.unit_s) - math.fsum(step.times.total_s for step in live.steps))


def _curve_s(steps: Sequence[StepRecord], pass_ms: PassMs) -> float:
    return 0.001 * math.fsum(
        pass_ms(step.num_rows, step.num_keys, step.num_requests)
        for step in steps
        if not step.has_prompt
    )


def _draft_s(steps: Sequence[StepRecord]) -> float:
    return math.fsum(step.draft_s for step in steps)


def _other_s(steps: Sequence[StepRecord]) -> float:
    return math.fsum(step.other_s for step in steps)


def _ratio(live: float, other: float) -> float:
    return live / other if other > 0 else 1.0


__all__ = ["Calibration", "PassMs", "Prediction", "observe", "predict", "prompt_seconds"]
