"""Promises P1 and P2 loop by loop: tokens in flight change nothing that is said.

Tokens, log-probabilities, reasons to end and errors are compared with those of plain decoding.
The plans, exits and checks of every tick are drawn at random, so that rows are issued, taken
back, left behind and restarted in every way. Everything is float64 on the reference path, as in
`test_same_tokens`.
"""

import random
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.core.params import SamplingParams
from foretoken.drafters.speed import SpeedDrafter, SpeedOptions
from foretoken.engine import scheduler
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.models.attention import IMPLEMENTATION
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.modules import adapt_module
from foretoken.planner.in_flight import FlightPlan, FlightPlanner
from foretoken.planner.plan import Plan
from foretoken.verifiers.coupled import CoupledVerifier
from tests.engines import OracleDrafter, check_books, check_idle
from tests.looped import looped_module
from tests.properties.test_controls import (
    ALWAYS,
    HEAT,
    HISTORY,
    PROMPTS,
    SHAPES,
    compile_grammar,
    ending,
    lookup,
    params_of,
    plain,
)
from tests.properties.test_same_tokens import Case, run

VOCAB_SIZE = 61
EOS_IDS = (7, 19)
MAX_REQUESTS = 3
# Layers before, in and after the loops, and how many of these there are.
MODEL_SHAPES = ((0, 1, 2, 0), (1, 1, 3, 1), (0, 2, 4, 0), (0, 1, 6, 1))


@lru_cache
def looped_model(prelude, group, loops, coda):
    module = looped_module(
        dtype=torch.float64,
        attn_implementation=IMPLEMENTATION,
        prelude=prelude,
        group=group,
        loops=loops,
        coda=coda,
        eos_token_id=list(EOS_IDS),
    )
    return adapt_module(module, name="micro-looped")


class MoodyPlanner(FlightPlanner):
    """Says something else before every tick."""

    def __init__(self, seed, num_loops):
        self._rng, self._num_loops = random.Random(seed), num_loops
        self.reports = []

    def plan(self, num_requests, num_keys):
        rng = self._rng
        return FlightPlan(
            exit_loop=rng.randint(1, self._num_loops),
            max_in_flight=rng.choice((1, 2, self._num_loops, self._num_loops + 3)),
            scores_early=rng.random() < 0.3,
        )

    def observe(self, report):
        self.reports.append(report)


def check_reports(reports, num_loops):
    for report in reports:
        assert report.num_requests <= report.num_rows
        assert report.tick_s > 0
        assert all(1 <= least <= most <= num_loops for least, most in report.settled)


def in_flight_engine(target, drafters, planner, *, max_nodes, kv_tokens, **sizes):
    return Engine(
        target,
        target.new_cache(kv_tokens),
        drafters,
        CoupledVerifier(),
        Plan(max_nodes=max_nodes),
        flight_planner=planner,
        compile_grammar=compile_grammar,
        config=EngineConfig(**sizes),
    )


def said(request):
    """Return all that a request has to show, its log-probabilities to 9 digits."""
    logprobs = [
        (it.token_id, round(it.logprob, 9), [token_id for token_id, _ in it.top])
        for it in request.logprobs
    ]
    return *ending(request), request.text_stream.text, logprobs


@st.composite
def cases(draw):
    """Return requests, each with one to three controls, some of them without drafts."""
    wanted = []
    for _ in range(draw(st.integers(1, MAX_REQUESTS))):
        controls = {**HISTORY, **SHAPES}
        names = draw(st.lists(st.sampled_from(sorted(controls)), unique=True, max_size=3))
        values = {name: draw(controls[name]) for name in names}
        values |= draw(st.fixed_dictionaries(ALWAYS))
        if draw(st.booleans()):
            values["temperature"] = draw(HEAT)
        else:
            values = {key: value for key, value in values.items() if key not in SHAPES}
        values["max_new_tokens"] = draw(st.integers(1, 24))
        if draw(st.booleans()):
            values["logprobs"] = 2
        if draw(st.booleans()):
            values["stop_token_ids"] = (3, 4)
        labels = draw(st.lists(st.sampled_from(["oracle", "prompt-lookup"]), unique=True))
        labels += ["speed"] * draw(st.sampled_from([0, 1, 1, 1]))
        joins_at = draw(st.integers(0, 9))
        wanted.append(Case(draw(PROMPTS), params_of(values), labels, joins_at))
    return wanted


SIZES = st.fixed_dictionaries(
    {
        "max_nodes": st.sampled_from([0, 1, 2, 5, 8, 13]),
        "kv_tokens": st.sampled_from([5 * BLOCK_SIZE, 7 * BLOCK_SIZE, 40 * BLOCK_SIZE]),
        "prefill_chunk": st.integers(1, 24),
        "max_requests": st.integers(1, MAX_REQUESTS),
        "prefix_caching": st.booleans(),
    }
)


@settings(max_examples=200)
@given(
    st.sampled_from(MODEL_SHAPES),
    cases(),
    st.sampled_from(["eager", "lazy"]),
    st.integers(0, 2**32) | st.none(),
    SIZES,
)
def test_what_is_said_is_what_plain_decoding_says(shape, wanted, check, mood, sizes):
    target = looped_model(*shape)
    expected = [plain(target, case) for case in wanted]
    truths = [request.token_ids for request in expected]
    drafters = {
        "speed": SpeedDrafter(SpeedOptions(check=check), target.info.loops),
        "prompt-lookup": lookup(),
        "oracle": OracleDrafter(truths, VOCAB_SIZE),
    }
    planner = None if mood is None else MoodyPlanner(mood, shape[2])
    engine = in_flight_engine(target, drafters, planner, **sizes)
    requests = run(engine, wanted)
    assert list(map(said, requests)) == list(map(said, expected))
    check_idle(engine)
    if planner is not None:
        check_reports(planner.reports, shape[2])
    for request in requests:
        assert request.stats.num_accepted <= request.stats.num_draft_tokens
        assert request.stats.num_accepted < request.stats.num_tokens + 1


@pytest.mark.parametrize("check", ["eager", "lazy"])
@pytest.mark.parametrize("mood", [None, 5])
def test_requests_that_do_not_fit_together_go_on_with_the_same_tokens(monkeypatch, check, mood):
    monkeypatch.setattr(scheduler, "GROWTH_BLOCKS", 0)
    target, rng = looped_model(0, 2, 4, 0), random.Random(3)
    wanted = []
    for index in range(8):
        prompt_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
        values = {"max_new_tokens": 40, "ignore_eos": True, "logprobs": 1, "seed": index}
        params = SamplingParams(**values, temperature=index % 2)
        wanted.append(Case(prompt_ids, params, ["speed"], index))
    drafters = {"speed": SpeedDrafter(SpeedOptions(check=check), target.info.loops)}
    planner = None if mood is None else MoodyPlanner(mood, 4)
    engine = in_flight_engine(
        target, drafters, planner, max_nodes=6, kv_tokens=8 * BLOCK_SIZE, max_requests=5
    )
    requests = run(engine, wanted)
    assert [said(it) for it in requests] == [said(plain(target, case)) for case in wanted]
    assert sum(request.stats.num_preemptions for request in requests) > 3
    check_books(engine)
    check_idle(engine)


def test_enough_is_in_flight_for_these_tests_to_mean_something():
    target = looped_model(0, 2, 4, 0)
    drafters = {"speed": SpeedDrafter(SpeedOptions(), target.info.loops)}
    engine = in_flight_engine(target, drafters, None, max_nodes=8, kv_tokens=40 * BLOCK_SIZE)
    shares = []
    for seed in range(6):
        params = SamplingParams(max_new_tokens=30, temperature=0.7, seed=seed)
        [request] = run(engine, [Case([1, 2, 3 + seed], params, ["speed"], 0)])
        shares.append(request.stats.num_accepted / request.stats.num_tokens)
    assert 0.2 < sum(shares) / len(shares) < 0.98
