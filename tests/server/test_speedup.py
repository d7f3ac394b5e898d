"""What plain decoding would have taken: arithmetic on made-up steps, no clock involved."""

import pytest

from foretoken.planner.base import StepTimes
from foretoken.planner.cost import CostCurve
from foretoken.server.speedup import PlainPace, StepShape

# 10 ms for any row, 1 ms for each beyond the first, nothing else.
CURVE = CostCurve(rows=(1, 101), base_ms=(10.0, 110.0))


def shape(num_requests=1, num_nodes=0, num_tokens=None, **values):
    """Return a step in which every request decodes."""
    defaults = {
        "num_requests": num_requests,
        "num_known": num_requests,
        "num_nodes": num_nodes,
        "num_keys": 100 * num_requests,
        "num_decoding": num_requests,
        "num_decoding_keys": 100 * num_requests,
        "num_tokens": num_requests if num_tokens is None else num_tokens,
    }
    return StepShape(**defaults | values)


def times(pass_s, other_s=0.0, **draft_s):
    return StepTimes(
        draft_s=draft_s, pass_s=pass_s, total_s=pass_s + other_s + sum(draft_s.values())
    )


def curve_s(num_rows):
    return CURVE.pass_ms(num_rows, 0) / 1000


def feed(pace, shape, times, count):
    for _ in range(count):
        plain_s = pace.observe(shape, times)
    return plain_s


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, "plain"),
        ({"num_nodes": 3}, "speculative"),
        ({"num_requests": 2, "num_known": 9}, "prompt"),
        ({"num_requests": 2, "num_decoding": 1, "num_nodes": 4}, "prompt"),
    ],
)
def test_kind_of_a_step(values, kind):
    assert shape(**values).kind == kind


def test_as_many_plain_steps_as_tokens_per_request():
    """3 tokens of one request are 3 plain steps; 6 tokens of two are 3 steps of both."""
    pace = PlainPace(CURVE)
    assert pace.observe(shape(1, 8, 3), times(curve_s(9))) == pytest.approx(3 * curve_s(1))
    pace = PlainPace(CURVE)
    assert pace.observe(shape(2, 8, 6), times(curve_s(10))) == pytest.approx(3 * curve_s(2))


def test_plain_steps_are_what_they_took():
    pace = PlainPace(CURVE)
    assert pace.observe(shape(4), times(0.5)) == 0.5


def test_a_drafter_that_found_nothing_is_not_plain_decodings_cost():
    pace = PlainPace(CURVE)
    assert pace.observe(shape(4), times(0.5, suffix=0.1)) == pytest.approx(0.5)


def test_passes_teach_how_fast_the_machine_is():
    pace = PlainPace(CURVE)
    plain_s = feed(pace, shape(1, 8, 3), times(2 * curve_s(9)), 100)
    assert plain_s == pytest.approx(3 * 2 * curve_s(1), rel=0.15)


def test_what_is_around_a_pass_counts_for_plain_decoding_too():
    """Half a pass of bookkeeping per request, seen in plain steps and in others."""
    pace = PlainPace(CURVE)
    for _ in range(100):
        pace.observe(shape(2), times(curve_s(2), other_s=0.005))
        plain_s = pace.observe(shape(2, 8, 4), times(curve_s(10), other_s=0.005))
    assert plain_s == pytest.approx(2 * (curve_s(2) + 0.005), rel=0.05)


def test_plain_steps_say_how_far_off_the_curve_is_for_few_rows():
    """Passes of many rows follow the curve, those of one row take half as long as it says."""
    pace = PlainPace(CURVE)
    for step in range(1000):
        if step % 10 == 0:
            pace.observe(shape(), times(curve_s(1) / 2))
        plain_s = pace.observe(shape(1, 8, 3), times(curve_s(9)))
    assert pace.num_plain == 100
    assert plain_s == pytest.approx(3 * curve_s(1) / 2, rel=0.1)


def test_one_interrupted_plain_step_changes_little():
    pace = PlainPace(CURVE)
    feed(pace, shape(), times(curve_s(1)), 100)
    before_s = pace.step_s(1, 100)
    pace.observe(shape(), times(100 * curve_s(1)))
    assert before_s < pace.step_s(1, 100) < 1.1 * before_s


def test_reading_a_prompt_is_the_same_work_with_and_without_drafts():
    pace = PlainPace(CURVE)
    reading = shape(num_known=64, num_decoding=0, num_tokens=0)
    assert pace.observe(reading, times(0.3)) == 0.3


def test_beside_a_prompt_drafts_are_taken_out_and_their_tokens_added():
    """A prompt of 50 rows, and one request that gets 3 tokens with 8 draft rows."""
    pace = PlainPace(CURVE)
    step = shape(2, 8, 3, num_known=51, num_decoding=1)
    plain_s = pace.observe(step, times(curve_s(59), other_s=0.002, suffix=0.01))
    assert plain_s == pytest.approx(curve_s(51) + 0.002 + 2 * curve_s(1))


def test_steps_beside_prompts_teach_nothing():
    pace = PlainPace(CURVE)
    before_s = pace.step_s(1, 100)
    feed(pace, shape(2, 8, 3, num_known=51, num_decoding=1), times(9.0), 20)
    assert pace.step_s(1, 100) == before_s
