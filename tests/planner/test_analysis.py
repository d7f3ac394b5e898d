"""The analytic model: against the published table, against simulation, against itself."""

import random

import pytest

from foretoken.errors import ConfigError
from foretoken.planner.analysis import (
    best_lookahead,
    break_even_tokens,
    expected_tokens,
    expected_tokens_iid,
    ideal_speed_up,
    required_gain,
    speed_up,
    step_ms,
)

ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)
# Ideal speed-up at the best lookahead, by c = t_d / t_t, for each of the acceptances.
IDEAL = {
    0.02: (1.79, 2.17, 2.76, 3.82, 6.37),
    0.05: (1.63, 1.92, 2.35, 3.09, 4.67),
    0.1: (1.46, 1.67, 1.98, 2.47, 3.43),
    0.2: (1.25, 1.40, 1.58, 1.87, 2.37),
    0.3: (1.15, 1.23, 1.37, 1.55, 1.87),
}
BEST_LENGTH_AT_08 = {0.02: 11, 0.05: 8, 0.1: 6, 0.2: 4, 0.3: 3}


@pytest.mark.parametrize("cost_ratio", IDEAL)
def test_ideal_speed_ups_are_those_of_the_table(cost_ratio):
    for acceptance, ideal in zip(ACCEPTANCES, IDEAL[cost_ratio], strict=True):
        best = best_lookahead([acceptance] * 64, draft_ms=cost_ratio, verify_ms=lambda _: 1.0)
        assert round(best.speed_up, 2) == ideal
        length = best.num_draft_tokens
        assert best.speed_up == pytest.approx(ideal_speed_up(acceptance, cost_ratio, length))
        if acceptance == 0.8:
            assert length == BEST_LENGTH_AT_08[cost_ratio]


def test_some_length_wins_exactly_when_acceptance_exceeds_the_cost_ratio():
    for cost_ratio in (0.1, 0.3, 0.6):
        for acceptance in (cost_ratio - 0.02, cost_ratio + 0.02):
            best = best_lookahead([acceptance] * 30, draft_ms=cost_ratio, verify_ms=lambda _: 1.0)
            assert (best.num_draft_tokens > 0) == (acceptance > cost_ratio)


def test_expected_tokens_agree_with_simulation():
    """The mean of 40,000 chains of at most 5 tokens strays by 0.05 with P < 1e-6 (Hoeffding)."""
    acceptances = (0.9, 0.7, 0.8, 0.4)
    rng = random.Random(3)
    total = 0
    for _ in range(40_000):
        total += 1
        for acceptance in acceptances:
            if rng.random() >= acceptance:
                break
            total += 1
    assert total / 40_000 == pytest.approx(expected_tokens(acceptances), abs=0.05)


def test_independent_acceptance_is_the_geometric_sum():
    assert expected_tokens_iid(0.8, 4) == pytest.approx((1 - 0.8**5) / 0.2)
    assert expected_tokens_iid(1.0, 4) == 5
    assert expected_tokens_iid(0.0, 4) == 1
    assert expected_tokens([]) == 1


def test_break_even_is_where_the_speed_up_is_one():
    step = step_ms(5, draft_ms=2.0, verify_ms=13.0, overhead_ms=1.0)
    assert step == 24.0
    needed = break_even_tokens(step_ms=step, target_ms=10.0)
    assert needed == pytest.approx(2.4)
    assert speed_up(needed, step_ms=step, target_ms=10.0) == pytest.approx(1.0)


def test_best_lookahead_follows_a_measured_curve():
    """A pass that doubles at four rows makes the third draft token too dear."""

    def verify_ms(rows):
        return 10.0 if rows <= 3 else 20.0

    best = best_lookahead([0.8] * 8, draft_ms=0.5, verify_ms=verify_ms)
    every = [
        speed_up(
            expected_tokens_iid(0.8, length),
            step_ms=step_ms(length, draft_ms=0.5, verify_ms=verify_ms(length + 1)),
            target_ms=10.0,
        )
        for length in range(9)
    ]
    assert best.num_draft_tokens == 2
    assert best.speed_up == max(every)


def test_plain_decoding_wins_where_nothing_pays():
    best = best_lookahead([0.3] * 8, draft_ms=4.0, verify_ms=lambda rows: 10.0 + rows)
    assert best.num_draft_tokens == 0
    assert best.speed_up == 1.0


def test_required_gain_keeps_the_speed_up_as_it_was():
    """TAR raised by exactly the required share leaves S unchanged, for a slower and a faster."""
    for slowdown in (0.5, -0.4):
        costs = {"verify_ms": 12.0, "overhead_ms": 0.5}
        gain = required_gain(slowdown, 6, draft_ms=2.0, **costs)
        before = speed_up(3.0, step_ms=step_ms(6, draft_ms=2.0, **costs), target_ms=10.0)
        slower = step_ms(6, draft_ms=2.0 * (1 + slowdown), **costs)
        after = speed_up(3.0 * (1 + gain), step_ms=slower, target_ms=10.0)
        assert after == pytest.approx(before)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(ConfigError, match="probability"):
        expected_tokens([0.5, value])
