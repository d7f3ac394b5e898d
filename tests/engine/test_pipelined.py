"""The loop with tokens in flight: what it runs, what it counts, and who may take part.

That nothing of it changes what is said is in `tests/properties/test_pipelined_tokens.py`.
"""

import pytest
import torch

from foretoken import LLM
from foretoken.core.params import SamplingParams
from foretoken.core.verdict import Exactness
from foretoken.drafters.composite import CompositeDrafter
from foretoken.drafters.in_flight import Growth, Guess
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.drafters.speed import SpeedDrafter, SpeedOptions
from foretoken.engine.build import EngineBuilder
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.in_flight import Node
from foretoken.engine.pipelined import Pipelined
from foretoken.engine.replay import is_replayable
from foretoken.engine.request import FinishReason
from foretoken.engine.step import WholePasses
from foretoken.engine.walks import right_since
from foretoken.errors import ConfigError, DrafterError, RequestError, UnsupportedModelError
from foretoken.models.modules import adapt_module
from foretoken.planner.in_flight import FixedFlightPlanner, FlightPlan
from foretoken.planner.plan import Plan
from foretoken.verifiers import VERIFIERS
from foretoken.verifiers.coupled import CoupledVerifier
from tests.engines import (
    ScriptedDrafter,
    check_books,
    check_idle,
    finish,
    greedy,
    make_engine,
    micro_model,
    plain_ids,
    sampled,
)
from tests.looped import looped_module, make_looped
from tests.properties.test_pipelined_tokens import looped_model

G = 4


def target_of_four():
    return looped_model(0, 2, G, 0)


def speed(**options):
    return SpeedDrafter(SpeedOptions(**options), target_of_four().info.loops)


class SureDrafter(SpeedDrafter):
    """Knows the output: guesses it at the exit loop, right or shifted by one.

    Args:
        truth: Prompt and output of the only request.
        is_right: Whether a guess made for a position is right.
    """

    def __init__(self, truth, is_right=lambda position: True, **options):
        super().__init__(SpeedOptions(**options), target_of_four().info.loops)
        self._truth, self._is_right = truth, is_right
        self.shown = []

    def grow(self, nodes, logits, exit_loop):
        self.shown += [(node.request_id, node.depth, len(node.path)) for node in nodes]
        return [self._grow_one(node) for node in nodes]

    def _grow_one(self, node):
        position = len(node.token_ids) + len(node.path)
        if position >= len(self._truth):
            return Growth([])
        token_id = self._truth[position] + (not self._is_right(position))
        return Growth([Guess(token_id % 61)], token_id)


def truth_of(prompt_ids, params):
    return [*prompt_ids, *plain_ids(target_of_four(), prompt_ids, params)]


def run_alone(drafter, prompt_ids, params, **options):
    engine = make_engine(target_of_four(), {"speed": drafter}, **options)
    request = engine.add_request(prompt_ids, params)
    emissions = finish(engine)[request.request_id]
    check_idle(engine)
    return request, emissions


# -- how long it takes -----------------------------------------------------------------------


@pytest.mark.parametrize("exit_loop", [1, 2, 3])
@pytest.mark.parametrize("check", ["eager", "lazy"])
def test_right_guesses_give_a_token_every_exit_loop_ticks(exit_loop, check):
    params = greedy(20)
    truth = truth_of([1, 2, 3], params)
    drafter = SureDrafter(truth, exit_loop=exit_loop, check=check)
    request, _ = run_alone(drafter, [1, 2, 3], params, max_nodes=8)
    assert request.token_ids == truth
    # The pass over the prompt gives the first token, the pipeline fills once.
    assert request.stats.num_ticks == G + (20 - 2) * exit_loop
    assert request.stats.num_accepted == 18
    assert request.stats.num_draft_tokens == 18


@pytest.mark.parametrize("check", ["eager", "lazy"])
def test_wrong_guesses_cost_no_tick_beside_plain_decoding(check):
    params = greedy(12)
    truth = truth_of([1, 2, 3], params)
    request, _ = run_alone(
        SureDrafter(truth, lambda position: False, check=check), [1, 2, 3], params
    )
    assert request.token_ids == truth
    assert request.stats.num_ticks == 11 * G
    assert request.stats.num_steps == 12
    assert request.stats.tokens_per_step == 1
    assert request.stats.num_accepted == 0
    assert request.stats.num_draft_tokens > 0


def test_a_row_that_changes_its_mind_restarts_what_hangs_on_it_when_it_does():
    """Guesses of depth 1 are wrong and those of depth 2 right: two ticks to a token."""
    params = greedy(12)
    truth = truth_of([1, 2, 3], params)

    class Hesitant(SureDrafter):
        def grow(self, nodes, logits, exit_loop):
            self._is_right = None
            return [self._hesitate(node) for node in nodes]

        def _hesitate(self, node):
            self._is_right = lambda position: node.depth >= 2
            return self._grow_one(node)

    request, _ = run_alone(Hesitant(truth), [1, 2, 3], params)
    assert request.token_ids == truth
    assert request.stats.num_ticks == G + (12 - 2) * 2
    assert request.stats.num_accepted == 10


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_rows_in_flight_are_bounded(in_flight):
    params = greedy(20)
    truth = truth_of([1, 2, 3], params)
    drafter = SureDrafter(truth, in_flight=in_flight)
    engine = make_engine(target_of_four(), {"speed": drafter})
    request = engine.add_request([1, 2, 3], params)
    most = 0
    while engine.num_unfinished:
        engine.step()
        check_books(engine)
        most = max(most, engine.loop.num_in_flight(request.request_id))
    assert request.token_ids == truth
    assert most == (in_flight if in_flight > 1 else 0)  # one at once is ordinary decoding
    assert (request.stats.num_ticks == 0) == (in_flight == 1)


def test_a_tick_takes_the_rows_of_all_requests_at_once(monkeypatch):
    target, sizes = target_of_four(), []
    tick = type(target).tick

    def counting(self, batch, states, rows):
        sizes.append((len({id(it.sequence) for it in batch.in_flight}), batch.num_rows))
        return tick(self, batch, states, rows)

    monkeypatch.setattr(type(target), "tick", counting)
    engine = make_engine(target, {"speed": speed()})
    cases = [([1, 2], greedy(20)), ([5, 6, 7], sampled(20, 3)), ([9], greedy(20))]
    requests = [
        engine.add_request(*case, drafters=labels)
        for case, labels in zip(cases, (None, None, ()), strict=True)
    ]
    finish(engine)
    assert [it.output_ids for it in requests] == [plain_ids(target, *case) for case in cases]
    assert max(sizes)[0] == 3
    assert max(num_rows for _, num_rows in sizes) > 5
    assert requests[2].stats.num_draft_tokens == 0


# -- what comes out --------------------------------------------------------------------------


def test_tokens_that_were_in_flight_say_whose_they_were():
    params = greedy(10)
    truth = truth_of([1, 2, 3], params)
    drafter = SureDrafter(truth, lambda position: position % 4 != 0)
    request, emissions = run_alone(drafter, [1, 2, 3], params)
    sources = [source for it in emissions for source in it.sources]
    # The first comes from the prompt's pass, and nothing is drafted for the one after it.
    assert sources == ["speed" if place > 0 and (place + 3) % 4 else "" for place in range(10)]
    assert request.stats.accepted_by == {"speed": sources.count("speed")}


@pytest.mark.parametrize("kind", [greedy, sampled])
def test_stop_texts_logprobs_and_streams_are_those_of_plain_decoding(kind):
    def decode(token_ids):
        return "".join(chr(97 + token_id % 26) for token_id in token_ids)

    target = target_of_four()
    text = decode(plain_ids(target, [3, 4], kind(30, ignore_eos=True, top_k=9)))
    values = {"ignore_eos": True, "top_k": 9, "logprobs": 2, "logprobs_mode": "processed"}
    params = kind(30, stop=(text[11:13],), **values)
    found, logprobs = [], []
    for drafters in ({}, {"speed": speed()}):
        engine = make_engine(target, drafters, decode=decode)
        request = engine.add_request([3, 4], params)
        emissions = finish(engine)[request.request_id]
        assert "".join(it.text for it in emissions) == request.text_stream.text
        found.append((request.output_ids, request.finish_reason, request.text_stream.text))
        logprobs.append([it.logprob for it in request.logprobs])
        assert len(request.logprobs) == len(request.output_ids) < 30
    assert found[0] == found[1]
    assert logprobs[0] == pytest.approx(logprobs[1])


def test_a_failing_control_ends_its_request_alone():
    def fail_at_nine(input_ids, scores):
        if input_ids.shape[1] == 9:
            raise ValueError("nine")
        return scores

    target = target_of_four()
    engine = make_engine(target, {"speed": speed()})
    bad = engine.add_request([1, 2, 3], greedy(20, logits_processors=(fail_at_nine,)))
    good = engine.add_request([4, 5], greedy(20))
    finish(engine)
    assert bad.finish_reason is FinishReason.ERROR
    assert isinstance(bad.error, RequestError)
    assert bad.output_ids == plain_ids(target, [1, 2, 3], greedy(6))
    assert good.output_ids == plain_ids(target, [4, 5], greedy(20))
    check_idle(engine)


def test_aborting_leaves_nothing_behind_and_the_others_alone():
    target = target_of_four()
    engine = make_engine(target, {"speed": speed()})
    params = greedy(30, ignore_eos=True)
    requests = [engine.add_request([7, index], params) for index in range(3)]
    for _ in range(9):
        engine.step()
    assert engine.loop.num_in_flight(requests[1].request_id) > 0
    engine.abort(requests[1].request_id)
    assert engine.loop.num_in_flight(requests[1].request_id) == 0
    check_books(engine)
    finish(engine)
    assert requests[0].output_ids == plain_ids(target, [7, 0], params)
    assert requests[2].output_ids == plain_ids(target, [7, 2], params)
    check_idle(engine)


# -- failures --------------------------------------------------------------------------------


def test_after_a_failed_tick_requests_go_on_with_the_same_tokens(monkeypatch):
    target, num_left = target_of_four(), [7]
    tick = type(target).tick

    def failing(self, batch, states, rows):
        num_left[0] -= 1
        if not num_left[0]:
            raise RuntimeError("the device fell off")
        return tick(self, batch, states, rows)

    monkeypatch.setattr(type(target), "tick", failing)
    engine = make_engine(target, {"speed": speed()})
    requests = [engine.add_request([1, index], sampled(20, index)) for index in range(2)]
    with pytest.raises(RuntimeError, match="fell off"):
        finish(engine)
    check_books(engine)
    assert all(engine.loop.num_in_flight(it.request_id) == 0 for it in requests)
    finish(engine)
    expected = [plain_ids(target, [1, index], sampled(20, index)) for index in range(2)]
    assert [it.output_ids for it in requests] == expected


@pytest.mark.parametrize(
    ("growths", "message"),
    [
        (lambda nodes: [], "0 growths for 1 rows"),
        (lambda nodes: [Growth([Guess(61)])], r"guesses outside \[0, 61\): \[61\]"),
        (lambda nodes: [Growth([Guess(1), Guess(2)])], "2 guesses of one row; its width: 1"),
    ],
)
def test_a_drafter_that_breaks_the_contract_is_named(growths, message):
    drafter = speed()
    drafter.grow = lambda nodes, logits, exit_loop: growths(nodes)
    engine = make_engine(target_of_four(), {"speed": drafter})
    engine.add_request([1, 2], greedy(9))
    with pytest.raises(DrafterError, match=f"drafter 'speed' returned {message}"):
        finish(engine)
    check_books(engine)


# -- other drafters --------------------------------------------------------------------------


def test_others_fill_the_places_below_a_root_that_begins_alone_and_learn_what_came_of_it():
    params = greedy(24)
    truth = truth_of([1, 2, 3], params)
    copier = ScriptedDrafter(
        lambda context: truth[len(context.token_ids) :][: context.budget.max_depth], name="copier"
    )
    late = SureDrafter(truth, lambda position: False, exit_loop=3, in_flight=4)
    late.looks = lambda exit_loop: frozenset()  # leaves it to the other
    engine = make_engine(target_of_four(), {"speed": late, "copier": copier})
    request = engine.add_request([1, 2, 3], params)
    finish(engine)
    assert request.token_ids == truth
    assert request.stats.accepted_by["copier"] > 3
    verdicts = copier.verdicts[request.request_id]
    assert len(verdicts) == copier.num_proposed
    # The prompt's pass takes all that it drafts, later there is room for three beside the root.
    assert verdicts[0].num_accepted == 8
    assert {verdict.num_accepted for verdict in verdicts[1:-1]} == {3}


def test_requests_without_the_drafter_have_whole_passes_and_whole_drafts():
    target = target_of_four()
    drafters = {
        "speed": speed(),
        "prompt-lookup": PromptLookupDrafter(PromptLookupOptions(min_ngram=1)),
    }
    engine = make_engine(target, drafters)
    request = engine.add_request([1, 2, 1, 2, 1], greedy(20), drafters=["prompt-lookup"])
    finish(engine)
    assert request.output_ids == plain_ids(target, [1, 2, 1, 2, 1], greedy(20))
    assert request.stats.num_ticks == 0


# -- what the planner is told ----------------------------------------------------------------


class Listening(FixedFlightPlanner):
    """Plans the same, and keeps what it is told."""

    def __init__(self, plan):
        super().__init__(plan)
        self.reports = []

    def observe(self, report):
        self.reports.append(report)


def listened(plan, drafter, params=None):
    params = params or greedy(16)
    planner, target = Listening(plan), target_of_four()
    engine = Engine(
        target,
        target.new_cache(320),
        {"speed": drafter},
        CoupledVerifier(),
        Plan(),
        flight_planner=planner,
        config=EngineConfig(),
    )
    request = engine.add_request([1, 2, 3], params)
    finish(engine)
    return request, planner.reports


def test_reports_say_since_when_guesses_were_right():
    truth = truth_of([1, 2, 3], greedy(16))
    plan = FlightPlan(exit_loop=1, max_in_flight=4)
    _, reports = listened(plan, SureDrafter(truth))
    settled = [since for report in reports for since in report.settled]
    assert settled == [(1, 1)] * 15  # but the last, about which there is nothing to be known
    _, reports = listened(plan, SureDrafter(truth, lambda position: False))
    assert {since for report in reports for since in report.settled} == {(4, 4)}
    assert all(not report.is_pass for report in reports)


def test_sequential_plans_are_ordinary_passes_and_reported_as_such():
    request, reports = listened(FlightPlan(exit_loop=1, max_in_flight=1), speed())
    assert request.stats.num_ticks == 0
    assert request.stats.num_steps == 16
    assert [report.is_pass for report in reports] == [True] * 15
    assert {report.num_rows for report in reports} == {1}


def test_rows_are_looked_at_early_if_the_planner_wants_to_know():
    plan = FlightPlan(exit_loop=3, max_in_flight=2, scores_early=True)
    truth = truth_of([1, 2, 3], greedy(16))
    drafter = SureDrafter(truth)
    request, _ = listened(plan, drafter)
    assert {depth for _, depth, _ in drafter.shown} == {1, 2, 3}
    assert request.token_ids == truth


@pytest.mark.parametrize(
    ("looks", "since"),
    [
        ([], None),
        ([(1, 5)], (1, 1)),
        ([(1, 6)], (2, 4)),
        ([(1, 6), (2, 5)], (2, 2)),
        ([(1, 5), (2, 6), (3, 5)], (3, 3)),
        ([(1, 5), (2, 5), (3, 6)], (4, 4)),
        ([(1, 6), (3, 5)], (2, 3)),
        ([(2, None)], (3, 4)),
    ],
)
def test_bounds_on_the_depth_from_which_a_row_was_right(looks, since):
    node = Node(1)
    node.looks = looks
    assert right_since(node, 5, G) == since


# -- who goes together -----------------------------------------------------------------------


def test_the_loop_follows_from_what_drafters_need():
    assert isinstance(make_engine(target_of_four(), {"speed": speed()}).loop, Pipelined)
    assert isinstance(make_engine(target_of_four(), {}).loop, WholePasses)


def test_two_drafters_in_flight_are_refused():
    with pytest.raises(ConfigError, match="run for one drafter; got speed, speed#2"):
        make_engine(target_of_four(), {"speed": speed(), "speed#2": speed()})


@pytest.mark.parametrize("need", ["hidden_layers", "shared_layers", "target_past"])
def test_drafters_that_work_with_whole_passes_are_refused_beside_one_in_flight(need):
    other = ScriptedDrafter(lambda context: [])
    other.needs = type(other.needs)(**{need: (1,) if need == "hidden_layers" else 1})
    with pytest.raises(ConfigError, match="what whole passes of the target leave behind"):
        make_engine(target_of_four(), {"speed": speed(), "other": other})


def test_a_target_without_loops_is_refused():
    with pytest.raises(UnsupportedModelError, match="runs each layer once"):
        make_engine(micro_model("llama"), {"speed": speed()})


@pytest.mark.parametrize("name", ["block", "traversal", "typical"])
def test_rules_that_judge_whole_paths_are_refused(name):
    target, verifier = target_of_four(), VERIFIERS.load(name)()
    drafter = speed()
    drafter.draws = frozenset(verifier.draws)
    with pytest.raises(ConfigError, match="judges whole paths"):
        Engine(target, target.new_cache(320), {"speed": drafter}, verifier, Plan(verifier=name))


def test_rules_that_take_one_sample_refuse_drafters_that_make_more():
    target, verifier = target_of_four(), VERIFIERS.load("rejection")()
    drafter = speed()
    drafter.draws, drafter.width = frozenset(verifier.draws), 2
    with pytest.raises(ConfigError, match="takes one sample per token"):
        Engine(
            target, target.new_cache(320), {"speed": drafter}, verifier, Plan(verifier="rejection")
        )


def test_auto_is_speed_where_the_target_shares_its_layers():
    target = adapt_module(
        looped_module(dtype=torch.float64, attn_implementation="foretoken", loops=3), name="x"
    )
    builder = EngineBuilder("x", Plan(), EngineConfig(), 320)
    engine = builder.build(target, None, device="cpu", dtype="float64")
    assert "speed" in engine.drafters
    assert "token-recycling" not in engine.drafters
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3)
    request = engine.add_request([1, 2, 3], params)
    finish(engine)
    assert request.output_ids == plain_ids(target, [1, 2, 3], params)


def test_a_drafter_in_flight_is_no_part_of_another():
    with pytest.raises(ConfigError, match="'speed' drafts inside the target's pass"):
        CompositeDrafter({"speed": speed()})


# -- compiled --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drafter", ["speed", "speed:check=lazy", "speed:exit_loop=2"])
def test_compiled_ticks_give_the_bits_of_plain_decoding(tmp_path, dtype, drafter):
    path = make_looped(tmp_path, loops=4, prelude=1, coda=1)
    params = [
        SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=3, seed=4, temperature=heat)
        for heat in (0.0, 0.9)
    ]
    found = []
    for drafters in ("none", drafter):
        llm = LLM(path, drafters=drafters, dtype=dtype)
        outputs = llm.generate([[1, 2, 3, 4], [9, 8, 7]], params)
        assert {output.exactness for output in outputs} == {Exactness.BITWISE}
        found.append([(output.token_ids, output.logprobs) for output in outputs])
        llm.close()
    assert found[0] == found[1]
    assert sum(output.stats.num_accepted for output in outputs) > 5


def test_what_the_target_thinks_before_it_is_done_cannot_be_replayed():
    assert not is_replayable(speed().needs, has_target=True)
