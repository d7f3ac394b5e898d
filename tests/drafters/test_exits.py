"""Which exits are best: against a simulation of the pipeline, and the closed form of the bound."""

import itertools
import random

import pytest

from foretoken.drafters.exits import (
    Exits,
    GuessRecord,
    best_exits,
    typical_disagreement,
)
from foretoken.planner.loopspec_model import PowerLaw, optimal_exits, ticks_bound


def simulate(exits, disagreement, loops, num_tokens=10_000):
    """Return ticks per token of rows whose guesses settle at a random depth and then stay."""
    rng, ticks = random.Random(3), 0
    for _ in range(num_tokens):
        level = rng.random()
        settles = next((d for d in range(1, loops) if disagreement(d) <= level), loops)
        issued = [depth for depth in (exits.first, exits.second) if depth]
        ticks += next((depth for depth in issued if depth >= settles), loops)
    return ticks / num_tokens


@pytest.mark.parametrize("loops", [2, 4, 8])
def test_expected_ticks_are_those_of_the_pipeline(loops):
    """The mean of 10 000 tokens is within five standard errors, each at most loops / 200."""
    for first, second in itertools.product(range(1, loops), range(loops)):
        if second and second <= first:
            continue
        exits = Exits(first, second)
        simulated = simulate(exits, typical_disagreement, loops)
        assert exits.ticks(typical_disagreement, loops) == pytest.approx(
            simulated, abs=5 * loops / 200
        )


def test_the_typical_exits_are_those_that_served_best():
    assert best_exits(typical_disagreement, 4) == Exits(1, 2)
    assert best_exits(typical_disagreement, 32) == Exits(2, 8)
    assert best_exits(typical_disagreement, 2) == Exits(1)


def test_settled_exits_are_kept():
    assert best_exits(typical_disagreement, 8, first=3).first == 3
    assert best_exits(typical_disagreement, 8, second=0) == Exits(2)
    assert best_exits(typical_disagreement, 8, first=2, second=7) == Exits(2, 7)
    assert best_exits(typical_disagreement, 8, second=2) == Exits(1, 2)


def test_a_model_that_is_sure_at_once_is_asked_once():
    assert best_exits(lambda depth: 0.0, 8) == Exits(1)


def test_a_model_that_learns_late_is_asked_late():
    assert best_exits(lambda depth: 0.95 if depth < 5 else 0.02, 8).second == 5
    assert best_exits(lambda depth: 1.0 if depth < 5 else 0.02, 8, second=0) == Exits(5)


# -- the record ------------------------------------------------------------------------------


def test_the_record_counts_guesses_on_the_path_that_was_taken():
    record = GuessRecord(3)
    text = [5, 6]
    record.note("r", 2, (), 1, 7)  # right
    record.note("r", 2, (), 2, 8)  # wrong
    record.note("r", 2, (7,), 1, 9)  # right, one later
    record.note("r", 2, (8,), 1, 9)  # below a guess that was wrong: never counted
    record.settle("r", text)
    assert record.num_seen == 0
    text += [7]
    record.settle("r", text)
    weight, prior = GuessRecord.PRIOR_WEIGHT, typical_disagreement
    assert record.disagreement(1) == pytest.approx(weight * prior(1) / (weight + 1))
    assert record.disagreement(2) == pytest.approx((weight * prior(2) + 1) / (weight + 1))
    text += [9]
    record.settle("r", text)
    record.settle("r", text)
    assert record.disagreement(1) == pytest.approx(weight * prior(1) / (weight + 2))
    assert record.num_seen == 1
    record.forget("r")
    record.forget("r")


# -- the bound -------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [4, 8, 32])
@pytest.mark.parametrize(("scale", "exponent"), [(0.35, 1.0), (1.0, 0.5), (0.8, 2.0), (2.0, 1.3)])
def test_the_closed_form_is_the_least_of_the_bound(loops, scale, exponent):
    law = PowerLaw(scale=scale, exponent=exponent)
    first, second = optimal_exits(loops, law)
    least = ticks_bound(first, second, loops, law)
    for left, right in itertools.product((0.5, 0.9, 0.999, 1, 1.001, 1.1, 2), repeat=2):
        assert ticks_bound(first * left, second * right, loops, law) >= least
    for shift in (1.001, 0.999):  # strictly: it is a minimum in each direction
        assert ticks_bound(first * shift, second, loops, law) > least
        assert ticks_bound(first, second * shift, loops, law) > least


def test_the_bound_bounds_what_is_expected():
    for loops in (4, 8, 32):
        law = PowerLaw(scale=0.35, exponent=1.0)
        for first in range(1, loops):
            for second in range(first + 1, loops):
                ticks = Exits(first, second).ticks(law.at, loops)
                assert ticks <= ticks_bound(first, second, loops, law)
