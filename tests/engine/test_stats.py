"""Counts, and what is derived from them."""

import json

import pytest

from foretoken.engine.stats import RequestStats
from tests.engines import counting_drafter, counting_model, finish, greedy, make_engine


def test_empty_stats_divide_by_nothing():
    stats = RequestStats()
    assert (stats.tokens_per_step, stats.acceptance_rate, stats.tokens_per_s) == (0, 0, 0)


def test_counts_and_ratios():
    stats = RequestStats()
    stats.start()
    stats.add_step(["a"] * 4 + ["b"], ["a", "b", ""])
    stats.add_step(["a"] * 5, ["a", ""])
    stats.add_step([], [""])
    assert (stats.num_steps, stats.num_tokens, stats.num_draft_tokens) == (3, 6, 10)
    assert (stats.num_accepted, stats.accepted_by) == (3, {"a": 2, "b": 1})
    assert stats.drafted_by == {"a": 9, "b": 1}
    assert stats.tokens_per_step == 2
    assert stats.acceptance_rate == pytest.approx(0.3)


def test_a_token_of_several_drafters_counts_once_and_for_each_of_them():
    stats = RequestStats()
    stats.add_step(["a+b", "b", "a+b", "a"], ["a+b", "b", ""])
    assert (stats.num_accepted, stats.accepted_by) == (2, {"a": 1, "b": 2})
    assert (stats.num_draft_tokens, stats.drafted_by) == (4, {"a": 3, "b": 3})


def test_times_start_with_the_first_schedule_and_the_first_token(monkeypatch):
    clock = iter([10.0, 12.0, 15.0, 16.5])
    monkeypatch.setattr("foretoken.engine.stats.time.perf_counter", lambda: next(clock))
    stats = RequestStats()
    stats.start()
    stats.start()  # a request is scheduled many times, and started once
    stats.add_step([], [""])
    assert (stats.prefill_s, stats.decode_s) == (2.0, 0.0)
    stats.add_step([], [""])
    stats.add_step(["a"] * 3, ["a", "a", "a", ""])
    assert (stats.prefill_s, stats.decode_s) == (2.0, 4.5)
    assert stats.tokens_per_s == pytest.approx(6 / 6.5)


def test_json_names():
    stats = RequestStats()
    stats.add_step(["a"] * 4, ["a", ""])
    shown = json.loads(json.dumps(stats.as_dict()))
    assert set(shown) == {
        "num_steps",
        "num_draft_tokens",
        "num_accepted",
        "tokens_per_step",
        "prefill_s",
        "decode_s",
        "tokens_per_s",
    }
    assert (shown["num_steps"], shown["num_draft_tokens"], shown["num_accepted"]) == (1, 4, 1)


def test_engine_counts_passes_that_emit_and_draft_tokens_that_are_scored():
    target = counting_model()
    engine = make_engine(target, {"it": counting_drafter()}, max_nodes=4, prefill_chunk=3)
    request = engine.add_request([0, 1, 2, 3, 4, 5, 6], greedy(12))
    finish(engine)
    stats = request.stats
    # Two passes for the prompt's first six tokens; then 5 + 5 + 2 tokens.
    assert target.num_passes == 5
    assert (stats.num_steps, stats.num_tokens) == (3, 12)
    assert (stats.num_draft_tokens, stats.num_accepted) == (9, 9)
    assert stats.drafted_by == stats.accepted_by == {"scripted": 9}
    assert stats.prefill_s > 0
    assert stats.decode_s > 0
