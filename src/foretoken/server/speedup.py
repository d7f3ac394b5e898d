"""What plain decoding would have taken for the same tokens: the live speed-up's other half.

A step that gave its B requests T tokens stands for T / B steps of plain decoding over the same
requests, each with one row per request. What such a step takes comes from the target's measured
cost curve, which follows the passes that come by (`planner/cost.py`), and from what steps spend
outside passes. Where steps are plain, they say themselves how far off that is.

So the speed-up is that of the rate at which the running requests get tokens. A closed batch that
ends with its slowest request gains less by the clock on the wall.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from foretoken.planner.base import StepTimes
from foretoken.planner.cost import CostCurve, CostModel

BIAS_GAIN = 0.05  # of a plain step in the correction that they make: the last twenty count
LARGEST_DEVIATION = 0.25  # of its logarithm; a step that was interrupted says little


class StepShape(NamedTuple):  # made in every step; a frozen dataclass takes four times as long
    """What a step worked on.

    Args:
        num_requests: Requests in the pass.
        num_known: Rows without drafts: roots and parts of prompts.
        num_nodes: Rows of draft tokens.
        num_keys: Positions that the requests look back on, summed over requests.
        num_decoding: Requests that were given tokens.
        num_decoding_keys: Positions that these look back on.
        num_tokens: Tokens that they were given.
    """

    num_requests: int
    num_known: int
    num_nodes: int
    num_keys: int
    num_decoding: int
    num_decoding_keys: int
    num_tokens: int

    @property
    def has_prompt(self) -> bool:
        """Whether a part of a prompt was read."""
        return self.num_known > self.num_requests or self.num_decoding < self.num_requests

    @property
    def kind(self) -> str:
        """One of "prompt", "speculative" and "plain"."""
        if self.has_prompt:
            return "prompt"
        return "speculative" if self.num_nodes else "plain"


class PlainPace:
    """Estimates the time of plain decoding from steps as they come.

    Args:
        curve: Of the target's passes.

    Attributes:
        num_plain: Plain steps that were compared with what was expected of them.
    """

    def __init__(self, curve: CostCurve) -> None:
        self._cost = CostModel(curve)
        self._log_bias = 0.0
        self.num_plain = 0

    def observe(self, shape: StepShape, times: StepTimes) -> float:
        """Return the seconds that plain decoding would have taken, then learn from the step."""
        draft_s = sum(times.draft_s.values())
        plain_s = self._plain_s(shape, times, draft_s)
        if not shape.has_prompt:  # what comes beside prompts says little about what comes later
            self._learn(shape, times, draft_s)
        return plain_s

    def step_s(self, num_requests: int, num_keys: int) -> float:
        """Return what a plain step over so many requests is expected to take."""
        ms = math.exp(self._log_bias) * self._cost.pass_ms(num_requests, num_keys, num_requests)
        return (ms + self._cost.overhead_ms(num_requests, num_requests)) / 1000.0

    def _plain_s(self, shape: StepShape, times: StepTimes, draft_s: float) -> float:
        num_steps = shape.num_tokens / max(1, shape.num_decoding)
        if shape.kind == "speculative":
            return num_steps * self.step_s(shape.num_requests, shape.num_keys)
        # One plain step is in there: what is left without drafting and without draft rows. It is
        # taken as measured, since curves know little about prompts.
        plain_s = times.total_s - draft_s - self._nodes_s(shape)
        if num_steps > 1:
            plain_s += (num_steps - 1) * self.step_s(shape.num_decoding, shape.num_decoding_keys)
        return max(0.0, plain_s)

    def _nodes_s(self, shape: StepShape) -> float:
        """Return what the rows of draft tokens added to a pass."""
        if not shape.num_nodes:
            return 0.0
        cost, rest = self._cost, (shape.num_keys, shape.num_requests)
        with_ms = cost.pass_ms(shape.num_known + shape.num_nodes, *rest)
        return max(0.0, with_ms - cost.pass_ms(shape.num_known, *rest)) / 1000.0

    def _learn(self, shape: StepShape, times: StepTimes, draft_s: float) -> None:
        num_rows, num_requests = shape.num_known + shape.num_nodes, shape.num_requests
        if not shape.num_nodes:
            self._learn_bias(times.pass_s, num_requests, shape.num_keys)
        self._cost.observe_passes([(num_rows, shape.num_keys)], times.pass_s, num_requests)
        rest_s = times.total_s - times.pass_s - draft_s
        self._cost.observe_overhead(num_requests, num_rows, rest_s)

    def _learn_bias(self, pass_s: float, num_requests: int, num_keys: int) -> None:
        """Follow what plain passes take, compared with what was expected of them.

        The curve's correction follows all passes; where most have many rows, those of few are
        expected to differ alike, and need not.
        """
        self.num_plain += 1
        expected_s = self._cost.pass_ms(num_requests, num_keys, num_requests) / 1000.0
        deviation = math.log(max(pass_s, 1e-9) / expected_s) - self._log_bias
        deviation = max(-LARGEST_DEVIATION, min(LARGEST_DEVIATION, deviation))
        self._log_bias += max(BIAS_GAIN, 1 / (self.num_plain + 1)) * deviation


__all__ = ["PlainPace", "StepShape"]
