"""The curve as a value, and the model that follows the machine."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.errors import ConfigError
from foretoken.planner.cost import KEYS_STEP, NOTICEABLE, CostCurve, CostModel
from foretoken.planner.cost_running import LARGEST_RATIO, NUM_TRUSTED, RunningCost

CURVE = CostCurve(
    rows=(1, 4, 12, 13, 24),
    base_ms=(10.0, 11.0, 12.0, 20.0, 22.0),
    context_rows=(1, 12),
    context_ms=(0.01, 0.03),
    request_ms=0.5,
)

times_ms = st.floats(0.001, 1e5)


@st.composite
def curves(draw):
    rows = sorted(draw(st.sets(st.integers(2, 80), min_size=1, max_size=8)))
    context_rows = sorted(draw(st.sets(st.integers(2, 30), max_size=3)))
    return CostCurve(
        rows=(1, *rows),
        base_ms=tuple(draw(st.lists(times_ms, min_size=len(rows) + 1, max_size=len(rows) + 1))),
        context_rows=(1, *context_rows),
        context_ms=tuple(
            draw(
                st.lists(
                    st.floats(0, 1), min_size=len(context_rows) + 1, max_size=len(context_rows) + 1
                )
            )
        ),
        request_ms=draw(st.floats(0, 10)),
    )


# -- the curve -----------------------------------------------------------------------------------


def test_a_step_between_two_measured_rows_stays_a_step():
    assert CURVE.pass_ms(13, 0) - CURVE.pass_ms(12, 0) == pytest.approx(8.0)
    assert CURVE.pass_ms(8, 0) == pytest.approx(11.5)


def test_context_costs_by_position_and_by_the_rows_of_a_request():
    assert CURVE.pass_ms(1, 100) - CURVE.pass_ms(1, 0) == pytest.approx(1.0)
    assert CURVE.pass_ms(12, 100) - CURVE.pass_ms(12, 0) == pytest.approx(3.0)
    # Twelve requests of one row each look at their own hundred positions.
    assert CURVE.pass_ms(12, 1200, 12) - CURVE.pass_ms(12, 0, 12) == pytest.approx(12.0)


def test_each_request_after_the_first_costs_its_share():
    assert CURVE.pass_ms(4, 0, 3) - CURVE.pass_ms(4, 0, 1) == pytest.approx(1.0)


def test_beyond_the_measured_rows_the_last_half_goes_on():
    # From 12 rows, the middle, to 24: 10 ms for 12 rows. The last two points alone say less.
    assert CURVE.pass_ms(36, 0) == pytest.approx(32.0)
    assert CURVE.row_table(48, 0)[48] == pytest.approx(42.0)


def test_a_falling_end_is_not_continued_below_its_last_time():
    curve = CostCurve(rows=(1, 2, 4), base_ms=(5.0, 9.0, 8.0))
    assert curve.pass_ms(400, 0) == pytest.approx(8.0)


@given(curves(), st.integers(1, 120), st.integers(0, 5000), st.integers(1, 8))
def test_a_table_holds_the_time_of_every_number_of_rows(curve, max_rows, num_keys, num_requests):
    table = curve.row_table(max_rows, num_keys, num_requests)
    assert table.shape == (max_rows + 1,)
    assert table[0] == 0.0
    assert curve.pass_ms(0, num_keys, num_requests) == 0.0
    alone = [curve.pass_ms(rows, num_keys, num_requests) for rows in range(1, max_rows + 1)]
    np.testing.assert_array_equal(table[1:], alone)
    assert (table[1:] > 0).all()


@given(curves())
def test_a_curve_survives_its_description(curve):
    assert CostCurve.from_dict(curve.to_dict()) == curve


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": (1, 4, 4), "base_ms": (1.0, 1.0, 1.0)},
        {"rows": (2, 4), "base_ms": (1.0, 1.0)},
        {"rows": (1, 2), "base_ms": (1.0,)},
        {"rows": (), "base_ms": ()},
        {"base_ms": (10.0, 11.0, float("nan"), 20.0, 22.0)},
        {"base_ms": (0.0, 11.0, 12.0, 20.0, 22.0)},
        {"context_ms": (-0.1, 0.3)},
        {"request_ms": float("inf")},
    ],
)
def test_what_is_no_curve_is_refused(changes):
    fields = {
        name: changes.get(name, getattr(CURVE, name))
        for name in ("rows", "base_ms", "context_rows", "context_ms", "request_ms")
    }
    with pytest.raises(ConfigError, match="cost curve"):
        CostCurve(**fields)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"base_ms": [1, 2], "context_ms": {"1": 0}, "request_ms": 0},
        {"base_ms": {"one": 1.0}, "context_ms": {"1": 0.0}, "request_ms": 0.0},
        {"base_ms": {"1": 1.0}, "context_ms": {"1": 0.0}, "request_ms": None},
        {"base_ms": None, "context_ms": {}, "request_ms": 0.0},
    ],
)
def test_a_description_of_something_else_is_refused(values):
    with pytest.raises(ConfigError):
        CostCurve.from_dict(values)


# -- following the machine -----------------------------------------------------------------------


def observe(model, slowness, count, rows=(1, 8, 13)):
    for index in range(count):
        num_rows = rows[index % len(rows)]
        seconds = slowness * CURVE.pass_ms(num_rows, 200) / 1000
        model.observe_passes([(num_rows, 200)], seconds)


@pytest.mark.parametrize("slowness", [0.5, 0.9, 1.3, 2.2])
def test_the_correction_finds_how_fast_the_machine_is(slowness):
    model = CostModel(CURVE)
    observe(model, slowness, 60)
    assert model.factor(4) == pytest.approx(slowness, rel=0.02)
    assert model.pass_ms(24, 300, 2) == pytest.approx(
        slowness * CURVE.pass_ms(24, 300, 2), rel=0.02
    )


def test_the_correction_follows_a_machine_that_changes():
    model = CostModel(CURVE)
    observe(model, 1.0, 500)
    observe(model, 2.0, 60)
    assert model.factor(4) == pytest.approx(2.0, rel=0.03)


def test_what_comes_on_top_of_small_passes_is_nothing_to_large_ones():
    """Learned of few rows, a power of the rows made many of them a tenth dearer than they are."""
    model, rng = CostModel(CURVE), random.Random(0)
    for _ in range(400):
        num_rows = rng.randint(1, 13)
        seconds = (0.5 * CURVE.base_ms[0] + CURVE.pass_ms(num_rows, 200)) / 1000
        model.observe_passes([(num_rows, 200)], seconds)
    assert model.factor(1) == pytest.approx(1.0 + 0.5 * 10.0 / 12.0, rel=0.05)
    more_ms = model.pass_ms(128, 200) - model.pass_ms(64, 200)
    assert more_ms == pytest.approx(CURVE.pass_ms(128, 200) - CURVE.pass_ms(64, 200), rel=0.05)


def test_what_a_row_takes_around_passes_is_told_by_plain_steps_beside_those_with_drafts():
    """Drafts of eight requests all had about as many rows, and rows seemed to take nothing."""
    model, rng = CostModel(CURVE), random.Random(0)
    for number in range(200):
        num_rows = rng.randint(62, 68)
        rest_ms = (0.3 + 0.01 * num_rows) * rng.uniform(0.9, 1.1)
        model.observe_overhead(8, num_rows, rest_ms / 1000)
        if number % 40 == 39:
            model.observe_plain(8, 800, 0.002, 0.38 / 1000, 5)
    assert model.overhead_ms(8, 1) - model.overhead_ms(8, 0) == pytest.approx(0.01, rel=0.2)


def test_one_interrupted_pass_says_little():
    model = CostModel(CURVE)
    observe(model, 1.0, 100)
    observe(model, 500.0, 1)
    assert model.factor(4) < 1.05


def test_passes_of_batches_are_compared_with_what_batches_cost():
    model = CostModel(CURVE)
    for _ in range(50):
        model.observe_passes([(12, 2400)], CURVE.pass_ms(12, 2400, 12) / 1000, 12)
    assert model.factor(4) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("num_rows", [0, 512])
def test_passes_that_the_curve_does_not_know_teach_nothing(num_rows):
    model = CostModel(CURVE)
    model.observe_passes([(num_rows, 0)], 100.0)
    assert model.factor(4) == 1.0


def test_a_table_is_that_of_the_curve_times_the_correction():
    model = CostModel(CURVE)
    observe(model, 1.7, 200)
    expected = model.factor(1) * CURVE.row_table(30, 3 * 10 * KEYS_STEP, 3)
    # A table is kept until the correction is off by more than `NOTICEABLE`.
    np.testing.assert_allclose(
        model.row_table(30, 3 * 10 * KEYS_STEP - 3, 3), expected, rtol=NOTICEABLE
    )


def test_a_table_is_made_again_only_for_a_reason():
    model = CostModel(CURVE)
    table = model.row_table(30, 100)
    observe(model, 1.0 + NOTICEABLE / 4, 200)
    assert model.row_table(30, 101) is table
    assert model.row_table(30, 101 + KEYS_STEP) is not table
    observe(model, 1.5, 200)
    assert model.row_table(30, 100)[1] == pytest.approx(1.5 * table[1], rel=NOTICEABLE)


def test_nobody_writes_into_a_table():
    with pytest.raises(ValueError, match="read-only"):
        CostModel(CURVE).row_table(8, 0)[3] = 0.0


# -- what is around passes -----------------------------------------------------------------------


def test_a_linear_time_is_found():
    running, random = RunningCost(), np.random.default_rng(0)
    for _ in range(400):
        first, second = random.integers(1, 9), random.integers(0, 30)
        noise = random.normal(1.0, 0.05)
        running.observe(first, second, noise * (0.3 * first + 0.1 * second) / 1000)
    # Fifty observations with 5 % noise: a standard error of about 1 % of each part.
    assert running.expect_ms(1, 0) == pytest.approx(0.3, rel=0.08)
    assert running.expect_ms(0, 1) == pytest.approx(0.1, rel=0.08)


def test_counts_that_never_vary_apart_share_the_time():
    running = RunningCost()
    for _ in range(100):
        running.observe(1, 4, 0.005)
    assert running.expect_ms(1, 4) == pytest.approx(5.0, rel=0.01)
    assert 0 <= running.expect_ms(1, 0) <= 5.0


def test_what_steps_with_drafts_take_is_not_forgotten_while_nobody_drafts():
    """Plain steps have a request and a row, and say nothing of how their time is shared."""
    running = RunningCost()
    for num_rows in (1, 6) * 20:
        running.observe(1, num_rows, (0.04 + 0.01 * num_rows) / 1000)
    for _ in range(1000):
        running.observe(1, 1, 0.05 / 1000)
        running.expect_ms(1, 1)  # now and then somebody plans
    assert running.expect_ms(1, 1) == pytest.approx(0.05, rel=0.01)
    assert running.expect_ms(1, 6) == pytest.approx(0.10, rel=0.05)


def test_a_machine_that_slows_down_meanwhile_is_followed():
    running = RunningCost()
    for num_rows in (1, 6) * 20:
        running.observe(1, num_rows, (0.04 + 0.01 * num_rows) / 1000)
    for _ in range(300):
        running.observe(1, 1, 0.08 / 1000)
    assert running.expect_ms(1, 1) == pytest.approx(0.08, rel=0.01)
    assert 0.08 < running.expect_ms(1, 6) < 0.2


def test_an_interrupted_pass_tells_little_of_what_more_rows_cost():
    model = CostModel(CURVE)
    observe(model, 1.0, 5)
    model.observe_passes([(8, 100)], 20 * model.pass_ms(8, 100) / 1000)
    assert model.factor(8) < 1.5
    observe(model, 1.0, 20)
    assert model.factor(8) == pytest.approx(1.0, abs=0.15)


def test_plain_steps_have_a_time_of_their_own_that_follows_the_machine():
    """Beside a small model, drafting leaves the caches to something else; plain steps do not."""
    model = CostModel(CURVE)
    plain_ms, rest_ms = CURVE.pass_ms(1, 100), 0.2

    def decode(slowness, *, is_plain):
        num_rows = 1 if is_plain else 6
        factor = slowness * (1.0 if is_plain else 1.4)
        for _ in range(40):
            ms = factor * CURVE.pass_ms(num_rows, 100)
            model.observe_passes([(num_rows, 100)], ms / 1000, is_plain=is_plain)
            rest = rest_ms * factor * (1 if is_plain else 2)
            model.observe_overhead(1, num_rows, rest / 1000, is_plain=is_plain)

    for _ in range(3):
        decode(1.0, is_plain=True)
        decode(1.0, is_plain=False)
    assert model.plain_ms(100, 1) == pytest.approx(plain_ms + rest_ms, rel=0.05)
    assert model.pass_ms(6, 100) == pytest.approx(1.4 * CURVE.pass_ms(6, 100), rel=0.05)
    decode(1.3, is_plain=False)  # nobody decodes plainly, but the machine has slowed down
    assert model.plain_ms(100, 1) == pytest.approx(1.3 * plain_ms + rest_ms, rel=0.07)
    decode(1.0, is_plain=True)  # and now it is as fast as before, which only plain steps tell
    assert model.pass_ms(6, 100) == pytest.approx(1.4 * CURVE.pass_ms(6, 100), rel=0.15)


def test_plain_steps_say_what_is_around_drafts_until_there_are_some():
    model = CostModel(CURVE)
    assert model.plain_ms(0, 1) == pytest.approx(CURVE.pass_ms(1, 0))
    model.observe_overhead(2, 2, 0.0004, is_plain=True)
    assert model.overhead_ms(1, 5) == pytest.approx(0.2, rel=0.01)
    model.observe_overhead(1, 5, 0.0007)
    assert model.overhead_ms(1, 5) == pytest.approx(0.7, rel=0.01)
    assert model.plain_ms(0, 1) - CURVE.pass_ms(1, 0) == pytest.approx(0.2, rel=0.01)


def test_shares_are_never_negative():
    running = RunningCost()
    for levels in (1, 2, 3, 4) * 20:
        running.observe(1, levels, (5 - levels) / 1000)
    assert running.expect_ms(0, 1) == 0.0
    assert running.expect_ms(1, 0) > 0.0


def test_one_interruption_says_little_about_a_running_time():
    running = RunningCost()
    for _ in range(100):
        running.observe(1, 1, 0.001)
    running.observe(1, 1, 3.0)
    assert running.expect_ms(1, 1) < 1.0 + LARGEST_RATIO / 40


def test_a_drafter_that_begins_to_cost_something_is_noticed():
    """A bound relative to an expectation of zero would keep it at zero for ever."""
    running = RunningCost()
    for _ in range(NUM_TRUSTED + 1):
        running.observe(0, 4, 0.001)
    for _ in range(100):
        running.observe(1, 0, 0.002)
    assert running.expect_ms(1, 0) == pytest.approx(2.0, rel=0.1)


def test_overhead_and_drafters_are_told_apart():
    model = CostModel(CURVE)
    assert model.overhead_ms(3, 9) == model.draft_ms("suffix", 1, 4) == 0.0
    for count in (1, 2, 3, 4) * 30:
        num_rows = count * (1 + count % 3)
        model.observe_overhead(count, num_rows, (0.2 * count + 0.05 * num_rows) / 1000)
        model.observe_draft("draft-model", count, 4 * count + count % 2, 0.0004 * count)
        model.observe_draft("suffix", count, 3 * count, 0.00001 * count)
    assert model.overhead_ms(8, 24) == pytest.approx(2.8, rel=0.02)
    assert model.draft_ms("suffix", 2, 6) == pytest.approx(0.02, rel=0.02)
    assert model.draft_ms("draft-model", 2, 8) == pytest.approx(0.8, rel=0.05)


def test_a_step_never_takes_less_than_its_pass_whatever_the_clock_says():
    cost = CostModel(CostCurve(rows=(1, 2), base_ms=(1.0, 1.5)))
    for _ in range(50):
        cost.observe_overhead(1, 1, -0.01)
    assert cost.step_table(4, 0, 1)[1] >= cost.pass_ms(1, 0) > 0


def test_a_table_of_steps_begins_where_it_is_asked_to_and_never_falls_below_that():
    falling = CostCurve(rows=(1, 2, 4, 8), base_ms=(1.0, 2.0, 1.5, 4.0))
    cost = CostModel(falling)
    for num_rows in (1, 3) * 25:
        cost.observe_overhead(1, num_rows, 0.0001 * num_rows)
    whole, part = cost.step_table(8, 0, 1), cost.step_table(8, 0, 1, 2)
    assert len(whole) == 9
    assert len(part) == 7
    row_ms = cost.overhead_ms(1, 1) - cost.overhead_ms(1, 0)
    assert row_ms > 0
    expected = cost.row_table(8, 0)[2:] + cost.overhead_ms(1, 0) + row_ms * np.arange(2, 9)
    assert expected[2] < expected[0]
    np.testing.assert_allclose(part, np.maximum(expected, expected[0]))
