"""The analytic model of speculative decoding: what a draft is worth before anything is run.

n is the lookahead (draft tokens of a chain), `draft_ms` the time of one draft token,
`verify_ms(rows)` that of a target pass over so many rows, `target_ms` that of one plain step.
Acceptances are conditional: entry k is the probability that the draft token at depth k + 1 is
taken, given that all before it were. TAR, the tokens per step, counts the target's own token.

Source: Yan, Agarwal and Venkataraman, "Decoding Speculative Decoding", arXiv:2402.01528; the
independent case is Leviathan et al., arXiv:2211.17192, theorem 3.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foretoken.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookahead:
    """A length of draft and what it is worth.

    Args:
        num_draft_tokens: The length; 0 is plain decoding.
        tokens_per_step: Expected tokens per step, the target's own included.
        speed_up: Ratio of tokens per second to plain decoding.
    """

    num_draft_tokens: int
    tokens_per_step: float
    speed_up: float


def expected_tokens(acceptances: Sequence[float]) -> float:
    """Return the expected tokens per step of a chain: 1 + sum_k prod_(j <= k) a_j.

    Args:
        acceptances: Conditional acceptance at each depth, each in [0, 1]; as many as the chain
            has draft tokens.

    Raises:
        ConfigError: One is no probability.
    """
    total = reached = 1.0
    for acceptance in acceptances:
        _check_probability(acceptance)
        reached *= acceptance
        total += reached
    return total


def expected_tokens_iid(acceptance: float, num_draft_tokens: int) -> float:
    """Return the expected tokens per step if every token is accepted alike: sum_k a^k, k <= n.

    This is (1 - a^(n+1)) / (1 - a), and n + 1 for a = 1. Source: arXiv:2211.17192, equation 1.

    Raises:
        ConfigError: `acceptance` is no probability.
    """
    return expected_tokens([acceptance] * num_draft_tokens)


def step_ms(
    num_draft_tokens: int, *, draft_ms: float, verify_ms: float, overhead_ms: float = 0.0
) -> float:
    """Return the time of one step: n * t_d + t_v + overhead.

    Args:
        num_draft_tokens: n.
        draft_ms: One draft token.
        verify_ms: The target's pass over n + 1 rows.
        overhead_ms: Everything else that only a speculating step does.
    """
    return num_draft_tokens * draft_ms + verify_ms + overhead_ms


def speed_up(tokens_per_step: float, *, step_ms: float, target_ms: float) -> float:
    """Return tokens per second over those of plain decoding: S = TAR * t_t / step time."""
    return tokens_per_step * target_ms / step_ms


def break_even_tokens(*, step_ms: float, target_ms: float) -> float:
    """Return the tokens per step above which speculation pays: TAR > step time / t_t."""
    return step_ms / target_ms


def ideal_speed_up(acceptance: float, cost_ratio: float, num_draft_tokens: int) -> float:
    """Return S if a pass costs the same for any rows: (1 - a^(n+1)) / ((1 - a) (n c + 1)).

    Args:
        acceptance: a, alike for every token.
        cost_ratio: c = t_d / t_t.
        num_draft_tokens: n.
    """
    step = step_ms(num_draft_tokens, draft_ms=cost_ratio, verify_ms=1.0)
    tokens = expected_tokens_iid(acceptance, num_draft_tokens)
    return speed_up(tokens, step_ms=step, target_ms=1.0)


def best_lookahead(
    acceptances: Sequence[float],
    *,
    draft_ms: float,
    verify_ms: Callable[[int], float],
    overhead_ms: float = 0.0,
) -> Lookahead:
    """Return the length of chain, from 0 to that of `acceptances`, with the greatest speed-up.

    Equal speed-ups go to the shorter chain, so that nothing is drafted for nothing.

    Args:
        acceptances: Conditional acceptance at each depth.
        draft_ms: One draft token.
        verify_ms: Measured time of a target pass by its rows; `verify_ms(1)` is a plain step.
        overhead_ms: Everything else that only a speculating step does.
    """
    target_ms = verify_ms(1)
    best = Lookahead(num_draft_tokens=0, tokens_per_step=1.0, speed_up=1.0)
    for length in range(1, len(acceptances) + 1):
        step = step_ms(
            length, draft_ms=draft_ms, verify_ms=verify_ms(length + 1), overhead_ms=overhead_ms
        )
        tokens = expected_tokens(acceptances[:length])
        gain = speed_up(tokens, step_ms=step, target_ms=target_ms)
        if gain > best.speed_up:
            best = Lookahead(num_draft_tokens=length, tokens_per_step=tokens, speed_up=gain)
    return best


def required_gain(
    slowdown: float,
    num_draft_tokens: int,
    *,
    draft_ms: float,
    verify_ms: float,
    overhead_ms: float = 0.0,
) -> float:
    """Return the share by which TAR must rise to repay a slower draft model.

    Raising t_d by the share f lengthens the step by f * n t_d / (n t_d + t_v + overhead); where
    drafting is most of the step, a better but slower draft model seldom repays itself.

    Args:
        slowdown: f; 0.5 is a draft token half as long again, negative values are a faster one.
        num_draft_tokens: n.
        draft_ms: One draft token, before the change.
        verify_ms: The target's pass over n + 1 rows.
        overhead_ms: Everything else that only a speculating step does.
    """
    step = step_ms(
        num_draft_tokens, draft_ms=draft_ms, verify_ms=verify_ms, overhead_ms=overhead_ms
    )
    return slowdown * num_draft_tokens * draft_ms / step


def _check_probability(value: float) -> None:
    if not 0.0 <= value <= 1.0 or math.isnan(value):
        raise ConfigError(
            f"an acceptance is a probability; got {value!r}", hint="give a number from 0 to 1"
        )
