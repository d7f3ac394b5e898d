"""The model of the pipeline beside the pipeline itself, played row by row."""

from __future__ import annotations

import numpy as np
import pytest

from foretoken.planner.pipeline_model import Check, eager_ticks, flow, full_flight, lazy_ticks
from tests.planner.flights import Pipeline

NUM_TOKENS = 4000
SETTLES = (
    (0.8, 0.1, 0.05, 0.05),
    (0.2, 0.3, 0.3, 0.2),
    (0.0, 0.0, 0.0, 1.0),
    (0.5, 0.5),
    (0.6, 0.1, 0.1, 0.1, 0.0, 0.1),
)


def _tolerance(settle: tuple[float, ...]) -> float:
    """Return 4.5 standard errors of mean ticks: exceeded by chance once in 10^5 cases."""
    depths = np.arange(1, len(settle) + 1)
    variance = np.dot(settle, depths**2) - np.dot(settle, depths) ** 2
    # Of the lazy check too, whose delays vary most: between 1 and all loops.
    share = settle[0]
    variance = max(variance, share * (1 - share) * (len(settle) - 1) ** 2)
    return 4.5 * float(np.sqrt(variance / NUM_TOKENS)) + 1e-3  # the last token's fraction


@pytest.mark.parametrize("check", Check)
@pytest.mark.parametrize("settle", SETTLES)
def test_formulas_are_what_the_pipeline_does(settle: tuple[float, ...], check: Check) -> None:
    """Every exit loop, with as many rows as there can be."""
    loops = len(settle)
    for exit_loop in range(1, loops + 1):
        most = full_flight(loops, exit_loop)
        # The guess at the exit loop is the final one only once it has settled: `change` of 1.
        played = Pipeline(settle, exit_loop, most, check, change=1.0).play(NUM_TOKENS)
        if check is Check.EAGER:
            expected = eager_ticks(settle, exit_loop)
        else:
            expected = lazy_ticks(sum(settle[:exit_loop]), loops, exit_loop)
        assert flow(settle, exit_loop, most, check).ticks_per_token == pytest.approx(expected)
        assert played.ticks_per_token == pytest.approx(expected, abs=_tolerance(settle))
        assert played.most_rows <= most


@pytest.mark.parametrize("check", Check)
@pytest.mark.parametrize("settle", SETTLES)
def test_a_bound_on_rows_costs_what_the_recursion_says(
    settle: tuple[float, ...], check: Check
) -> None:
    """Every bound below what there can be; the model looks at few tokens, hence 3 %."""
    loops = len(settle)
    for exit_loop in range(1, loops):
        for most in range(2, full_flight(loops, exit_loop)):
            played = Pipeline(settle, exit_loop, most, check).play(NUM_TOKENS)
            expected = flow(settle, exit_loop, most, check).ticks_per_token
            assert played.ticks_per_token == pytest.approx(
                expected, rel=0.03, abs=_tolerance(settle)
            )
            assert played.most_rows <= most


@pytest.mark.parametrize("settle", SETTLES)
def test_rows_in_flight_are_an_upper_estimate(settle: tuple[float, ...]) -> None:
    """They are met where wrong guesses stay what they are, and never passed by much."""
    loops = len(settle)
    for exit_loop in range(1, loops + 1):
        most = full_flight(loops, exit_loop)
        expected = flow(settle, exit_loop, most).rows
        steady = Pipeline(settle, exit_loop, most, Check.EAGER, change=0.0).play(NUM_TOKENS)
        lively = Pipeline(settle, exit_loop, most, Check.EAGER, change=1.0).play(NUM_TOKENS)
        assert steady.rows == pytest.approx(expected, rel=0.05)
        assert lively.rows <= 1.05 * expected


def test_a_guess_that_depends_on_the_last_one_changes_no_formula() -> None:
    """The mean of the recursion holds for tokens whose depths hang together, too."""
    settle = (0.5, 0.0, 0.0, 0.5)
    pipeline = Pipeline(settle, 1, 4, Check.EAGER)
    easy = [(1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)]
    done = ticks = 0
    while done < NUM_TOKENS:
        pipeline.settle = list(easy[done // 50 % 2])  # easy and hard stretches in turn
        done, ticks = done + pipeline.tick()[1], ticks + 1
    # A stretch's edges are blurred by the rows that are in flight over them.
    assert ticks / done == pytest.approx(eager_ticks(settle, 1), rel=0.05)


def test_one_row_is_one_token_after_the_other() -> None:
    """Without rows to spare, or without an early exit."""
    settle = (0.7, 0.1, 0.1, 0.1)
    assert flow(settle, 1, 1).ticks_per_token == 4.0
    assert flow(settle, 4, 4).ticks_per_token == 4.0
    assert flow(settle, 4, 4).rows == 1.0


@pytest.mark.parametrize(
    ("loops", "lazy", "eager"), [(3, 1.61, 1.47), (4, 2.21, 1.82), (6, 3.79, 2.67)]
)
def test_eager_checks_gain_what_they_gained_in_a_toy_run(
    loops: int, lazy: float, eager: float
) -> None:
    """Numbers of a run whose guesses are not known: here each loop changes one in so many.

    The run's lazy number says how many, its eager number then follows within 7 %: to the digit for
    three loops, and 2 % and 7 % above the run's for four and six, where early loops must have
    changed more than late ones.
    """
    agreement = (loops - lazy) / (loops - 1)
    keeps = agreement ** (1 / (loops - 1))
    sums = [keeps ** (loops - depth) for depth in range(1, loops + 1)]
    settle = np.diff([0.0, *sums])
    assert lazy_ticks(float(settle[0]), loops, 1) == pytest.approx(lazy)
    assert eager_ticks(settle.tolist(), 1) == pytest.approx(eager, rel=0.07)
    assert eager_ticks(settle.tolist(), 1) < lazy
