"""/stats and its window: what happened in the last seconds, by a clock of the test's own."""

import json
import threading

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from foretoken.planner.base import StepTimes
from foretoken.planner.cost import CostCurve
from foretoken.server.meter import BATCH_STEPS
from foretoken.server.metrics import ServerMetrics
from foretoken.server.stats_api import metrics_router, recent_stats
from foretoken.server.windows import WINDOW_S, Totals, Window
from tests.engines import counting_drafter, counting_model, finish, greedy, make_engine

CURVE = CostCurve(rows=(1, 64), base_ms=(10.0, 20.0))
KEYS = {
    "window_s",
    "tokens_per_step",
    "speedup",
    "acceptance_by_depth",
    "drafter_share",
    "wasted_row_share",
    "accepted_by",
    "num_running",
    "num_waiting",
    "kv_used_share",
    "num_tokens",
    "tokens_per_s",
}


class Load:
    num_running, num_waiting, kv_used_share = 1, 4, 0.123456


class Clock:
    now_s = 50.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    """Metrics of an engine with a drafter that is always right."""
    return ServerMetrics("m", measure=lambda _: CURVE, clock=clock)


def decode(metrics, num_tokens=10):
    engine = make_engine(counting_model(), {"count": counting_drafter()}, max_nodes=4)
    metrics.watch(engine)
    engine.add_request([0], greedy(num_tokens))
    finish(engine)


# -- the window ----------------------------------------------------------------------------------


def note(window, totals, at_s, num_tokens=1):
    """Add a step as the meter does: say so first, then add."""
    window.note(totals, at_s)
    totals.tokens_per_step[num_tokens] += 1


def test_nothing_has_happened():
    assert Window().recent(Totals(), 5.0) == (Totals(), 0.0)


def test_steps_of_the_last_seconds_count():
    """A step each half second for a minute; 9 to 10 seconds of them are in the window."""
    window, totals = Window(window_s=10.0, every_s=1.0), Totals()
    for half_s in range(120):
        note(window, totals, half_s / 2)
        recent, seconds = window.recent(totals, half_s / 2)
        if half_s > 20:
            assert 9.0 <= seconds <= 10.0
            assert recent.num_tokens == 2 * seconds + 1
    assert totals.num_tokens == 120


def test_what_came_before_a_pause_is_forgotten():
    window, totals = Window(), Totals()
    for at_s in (0.0, 0.4, 0.8):
        note(window, totals, at_s)
    assert window.recent(totals, 1.0)[0].num_tokens == 3
    assert window.recent(totals, 60.0) == (Totals(), 0.0)
    note(window, totals, 60.0, num_tokens=5)
    recent, seconds = window.recent(totals, 62.0)
    assert (recent.num_tokens, seconds) == (5, 2.0)


def test_a_window_keeps_few_moments():
    window, totals = Window(window_s=10.0, every_s=1.0), Totals()
    for step in range(10_000):
        note(window, totals, step / 100)
    assert len(window._moments) <= 12


def test_a_copy_is_not_changed_by_what_comes_later():
    totals = Totals()
    totals.accepted[0, "a"] += 2
    totals.step_s["plain"] = 1.0
    before = totals.copy()
    totals.accepted[0, "a"] += 3
    totals.step_s["plain"] += 0.5
    assert before.accepted[0, "a"] == 2
    added = totals.since(before)
    assert added.accepted == {(0, "a"): 3}
    assert added.step_s == {"plain": 0.5}


# -- what is derived -----------------------------------------------------------------------------


def test_rates_of_counts():
    totals = Totals(
        step_s={"plain": 1.0, "speculative": 3.0},
        plain_s={"plain": 1.0, "speculative": 7.0},
        phase_s={("draft", "a"): 0.5, ("draft", "b"): 0.3, ("pass", ""): 3.0, ("other", ""): 0.2},
    )
    totals.rows.update({"prompt": 100, "root": 4, "accepted": 6, "wasted": 10})
    totals.tokens_per_step.update({1: 2, 4: 2})
    totals.accepted.update({(0, "a"): 3, (0, "a+b"): 1, (1, "a"): 1})
    totals.reached.update({1: 6, 2: 2})
    assert totals.speedup == 2.0
    assert totals.drafter_share == pytest.approx(0.2)
    assert totals.wasted_row_share == 0.5
    assert totals.tokens_per_request_step == 2.5
    assert totals.acceptance_by_depth == [4 / 8, 1 / 2]
    assert totals.accepted_by == {"a": 5, "b": 1}


def test_speedup_of_a_known_step(clock, metrics):
    """A pass over 3 rows gives 3 tokens in 15 ms; 3 plain passes of 10 ms would have as well."""
    decode(metrics)
    pace, meter = metrics.meter.pace, metrics.meter
    clock.now_s += 100.0  # the decoding above is forgotten
    meter.totals()  # steps are counted some at a time, and now
    draft_rows, works = 2, [FakeWork()]
    expected_s = 3 * pace.step_s(1, FakeWork.num_keys)
    meter.add_step(works, [fake_draft(draft_rows)], [fake_verdict()], StepTimes({}, 0.015, 0.015))
    assert meter.recent()[0].speedup == pytest.approx(expected_s / 0.015)


def add_steps(meter, clock, count, every_s):
    for _ in range(count):
        clock.now_s += every_s
        times = StepTimes({}, 0.001, 0.001)
        meter.add_step([FakeWork()], [fake_draft(2)], [fake_verdict()], times)


def test_steps_are_counted_some_at_a_time_and_told_at_once(clock, metrics):
    """What is read has all steps, and most of them were counted before."""
    meter = metrics.meter
    add_steps(meter, clock, 1000, 0.001)
    assert 0 < len(meter._steps) <= BATCH_STEPS
    totals = meter.totals()
    assert not meter._steps
    assert (totals.steps, totals.num_tokens) == ({"speculative": 1000}, 3000)
    assert totals.rows == {"prompt": 0, "root": 1000, "accepted": 2000, "wasted": 0}
    assert totals.accepted == {(0, "a"): 1000, (1, "a"): 1000}
    assert totals.reached == {2: 1000}


@pytest.mark.parametrize("idle_s", [3.0, 100.0])
def test_steps_before_a_pause_are_not_those_of_now(clock, metrics, idle_s):
    """Some are still to be counted when a server falls idle; they keep their time."""
    add_steps(metrics.meter, clock, 5, 0.001)
    clock.now_s += idle_s
    add_steps(metrics.meter, clock, 7, 0.001)
    recent, seconds = metrics.meter.recent()
    assert recent.steps["speculative"] == (12 if idle_s < WINDOW_S else 7)
    assert seconds == pytest.approx(0.012 + idle_s if idle_s < WINDOW_S else 0.007, abs=0.002)


def test_readers_and_the_engine_lose_no_step(clock, metrics):
    """Both take from the steps that wait; sums stay whole."""
    stop = threading.Event()

    def read():
        while not stop.is_set():
            metrics.meter.totals()

    reader = threading.Thread(target=read)
    reader.start()
    add_steps(metrics.meter, clock, 20_000, 0.001)
    stop.set()
    reader.join()
    totals = metrics.meter.totals()
    assert (totals.steps["speculative"], totals.num_tokens) == (20_000, 60_000)


class FakeWork:
    num_keys, num_known = 10, 1

    class request:  # noqa: N801 - an attribute
        token_ids = range(13)


def fake_draft(num_nodes):
    from foretoken.core.draft import Draft
    from foretoken.core.tree import TokenTree

    return Draft.from_drafter("a", TokenTree.chain(range(num_nodes + 1)))


def fake_verdict():
    from foretoken.core.verdict import FinalKind, Verdict

    return Verdict((1, 2), (1, 2, 3), FinalKind.BONUS)


# -- the routes ----------------------------------------------------------------------------------


@pytest.fixture
def client(metrics):
    app = FastAPI()
    app.include_router(metrics_router(metrics, Load()))
    with TestClient(app) as client:
        yield client


def test_stats_before_anything(client):
    stats = client.get("/stats").json()
    assert set(stats) == KEYS
    assert stats["num_tokens"] == 0
    assert stats["tokens_per_s"] is stats["speedup"] is stats["tokens_per_step"] is None
    assert stats["acceptance_by_depth"] == []


def test_stats_of_a_request(client, metrics, clock):
    """10 tokens, 4 drafted right in each step: 5 and 5."""
    decode(metrics)
    clock.now_s += 2.0
    stats = client.get("/stats").json()
    assert set(stats) == KEYS
    assert stats["num_tokens"] == 10
    assert stats["tokens_per_step"] == 5.0
    assert stats["tokens_per_s"] == pytest.approx(5.0, rel=0.01)
    assert stats["accepted_by"] == {"scripted": 8}
    assert stats["acceptance_by_depth"] == [1.0] * 4
    assert stats["wasted_row_share"] == 0.0
    assert 0 <= stats["drafter_share"] < 1
    assert stats["speedup"] > 0
    assert (stats["num_running"], stats["num_waiting"], stats["kv_used_share"]) == (1, 4, 0.1235)
    clock.now_s += 60.0
    assert client.get("/stats").json()["num_tokens"] == 0


def test_stats_are_plain_json(metrics):
    decode(metrics)
    text = json.dumps(recent_stats(metrics, Load()), allow_nan=False)
    assert json.loads(text)["num_tokens"] == 10


def test_metrics_in_both_formats(client):
    text = client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert "foretoken:num_requests_waiting 4.0" in text.text
    accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    modern = client.get("/metrics", headers={"Accept": accept})
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")
