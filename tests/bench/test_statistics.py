"""Spreads, rates and the bootstrap of paired ratios."""

import numpy as np
import pytest

from foretoken.bench.statistics import rates, ratio_interval, rounded, spread


def test_spread_and_rounding():
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert rounded(123.456789) == 123.46
    assert rounded(0.000123456789) == 0.00012346


def test_rates_are_all_tokens_over_all_seconds():
    assert rates([10, 30], np.array([[1.0, 3.0], [1.0, 1.0]])) == [10.0, 20.0]


def test_without_noise_the_interval_is_the_ratio():
    base = np.array([[2.0, 4.0], [2.0, 4.0], [2.0, 4.0]])
    assert ratio_interval(base / 2, base) == (2.0, 2.0)


def test_drift_between_rounds_cancels_because_rounds_are_paired():
    drift = np.array([[1.0], [2.0], [5.0]])
    base = np.array([[2.0, 4.0]]) * drift
    assert ratio_interval(base / 1.5, base) == pytest.approx((1.5, 1.5), rel=1e-4)


def test_the_interval_covers_the_true_ratio():
    """400 synthetic runs of 8 rounds and 8 prompts, true ratio 1.5.

    The percentile bootstrap of so few rounds covers a little less than its nominal 95 %. At least
    85 % is asked: with a true coverage of 0.92, seeing less has a probability below 1e-6. The
    generator is seeded, so the outcome is the same each time.
    """
    generator = np.random.default_rng(0)
    num_covered = 0
    for number in range(400):
        per_prompt = generator.lognormal(0.0, 0.3, size=(1, 8))
        base = 1.5 * per_prompt * generator.lognormal(0.0, 0.1, size=(8, 8))
        ours = per_prompt * generator.lognormal(0.0, 0.1, size=(8, 8))
        low, high = ratio_interval(ours, base, seed=number)
        num_covered += low <= 1.5 <= high
    assert num_covered >= 340


def test_more_noise_makes_a_wider_interval():
    generator = np.random.default_rng(1)
    base = np.ones((6, 6))
    calm, wild = (generator.lognormal(0.0, sigma, size=(6, 6)) for sigma in (0.02, 0.3))
    narrow, wide = ratio_interval(calm, base), ratio_interval(wild, base)
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_one_round_still_gives_an_interval_over_prompts():
    low, high = ratio_interval(np.array([[1.0, 1.0]]), np.array([[1.0, 3.0]]))
    assert (low, high) == (1.0, 3.0)
