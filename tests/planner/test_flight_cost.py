"""Times of ticks and passes that follow one machine, and their measured curves."""

import math

import pytest

from foretoken.errors import UnsupportedModelError
from foretoken.models.loading import load_model
from foretoken.planner import cost_ticks
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_ticks import load_or_measure_ticks, measure_ticks, spread_over
from foretoken.planner.flight_cost import FlightCosts
from foretoken.planner.in_flight import TickReport
from tests.fakes import tiny_language_model
from tests.looped import make_looped

TICKS = CostCurve(rows=(1, 4), base_ms=(1.0, 1.6), context_ms=(0.01,))
PASSES = CostCurve(rows=(1, 4), base_ms=(4.0, 5.5), request_ms=0.5)


def tick(num_rows, ms, num_requests=1):
    return TickReport(num_requests, num_rows, 0, ms / 1000)


def ordinary_pass(num_requests, ms):
    return TickReport(num_requests, num_requests, 0, ms / 1000, is_pass=True)


def test_curves_count_before_anything_was_seen():
    costs = FlightCosts(TICKS, PASSES)
    assert costs.pass_ms(0, 1) == pytest.approx(4.0)
    assert costs.pass_ms(0, 4) == pytest.approx(5.5 + 3 * 0.5)
    assert costs.tick_ms(1, 100, 1) == pytest.approx(1.0 + 1.0)
    assert costs.tick_ms(2.5, 0, 1) == pytest.approx(1.3)
    assert costs.tick_ms(8, 0, 1) == pytest.approx(TICKS.pass_ms(8, 0))


def test_what_sets_ticks_apart_is_learned_and_stays_when_the_machine_slows_down():
    costs = FlightCosts(TICKS, PASSES)
    for _ in range(50):
        costs.observe(ordinary_pass(1, 4.0))
        costs.observe(tick(1, 1.5))
        costs.observe(tick(4, 2.4))
    assert costs.tick_ms(4, 0, 1) == pytest.approx(2.4, rel=0.02)
    for _ in range(100):
        costs.observe(ordinary_pass(1, 8.0))
    assert costs.pass_ms(0, 1) == pytest.approx(8.0, rel=0.02)
    # Some of it is put down to ticks being another thing than they were.
    assert costs.tick_ms(4, 0, 1) == pytest.approx(4.8, rel=0.15)
    for _ in range(300):
        costs.observe(tick(1, 1.5))
        costs.observe(tick(4, 2.4))
    assert costs.tick_ms(4, 0, 1) == pytest.approx(2.4, rel=0.02)
    assert costs.pass_ms(0, 1) == pytest.approx(4.0, rel=0.2)


def test_rows_may_cost_more_while_serving_than_measured():
    costs = FlightCosts(TICKS, PASSES)
    for _ in range(300):
        for rows in (1, 2, 4):
            costs.observe(tick(rows, TICKS.pass_ms(rows, 0) * rows**0.3))
    assert costs.tick_ms(4, 0, 1) == pytest.approx(1.6 * 4**0.3, rel=0.03)
    assert costs.tick_ms(1, 0, 1) == pytest.approx(1.0, rel=0.03)


def test_one_interrupted_step_says_little():
    costs = FlightCosts(TICKS, PASSES)
    for _ in range(100):
        costs.observe(tick(1, 1.0))
    costs.observe(tick(1, 50.0))
    assert costs.tick_ms(1, 0, 1) < 1.1


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 11])
def test_rows_are_spread_from_the_last_loop_up(num_rows):
    spread = spread_over(num_rows, 4)
    depths = [depth for depth, _ in spread]
    assert sum(count for _, count in spread) == num_rows
    assert depths == sorted(set(depths), reverse=True)
    assert depths[0] == 3
    assert max(count for _, count in spread) - min(count for _, count in spread) <= 1


@pytest.mark.parametrize("shape", [{"loops": 3}, {"loops": 2, "prelude": 1, "coda": 1}])
def test_ticks_of_a_model_are_measured(tmp_path, shape):
    model = load_model(make_looped(tmp_path / "model", **shape))
    curve = measure_ticks(model, budget_s=0.05)
    assert curve.rows[0] == 1
    assert curve.max_rows >= 4
    assert all(0 < ms < math.inf for ms in curve.base_ms)


def test_they_are_kept_apart_from_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOKEN_CACHE_DIR", str(tmp_path / "cache"))
    made = []

    def measure(model, **_):
        made.append(model)
        return TICKS

    monkeypatch.setattr(cost_ticks, "measure_ticks", measure)
    model = load_model(make_looped(tmp_path / "model"))
    assert load_or_measure_ticks(model) == load_or_measure_ticks(model) == TICKS
    assert len(made) == 1
    from foretoken.planner.cost_cache import load_or_measure

    assert load_or_measure(model, budget_s=0.05) != TICKS


def test_models_without_shared_layers_have_no_ticks():
    with pytest.raises(UnsupportedModelError, match="no layers share their weights"):
        measure_ticks(tiny_language_model())
