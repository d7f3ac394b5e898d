"""What goes wrong in one request ends that request, and no other."""

import pytest

from foretoken.core.draft import SiblingDraw
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import Exactness
from foretoken.drafters.base import DrafterNeeds
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.fit import agree_on_draws, most_sharing, observed_layers
from foretoken.engine.request import FinishReason
from foretoken.errors import ConfigError, DrafterError, RequestError
from foretoken.planner.plan import Plan
from foretoken.verifiers.coupled import CoupledVerifier
from tests.engines import (
    ScriptedDrafter,
    check_books,
    check_idle,
    counting_drafter,
    counting_model,
    finish,
    greedy,
    sampled,
)


class RefusingVerifier(CoupledVerifier):
    """Refuses every draft that contains a certain token."""

    def __init__(self, refused_id):
        self._refused_id = refused_id

    def verify(self, draft, rows, sampler, token_ids):
        if self._refused_id in draft.tree.token_ids:
            raise RequestError("this rule does not take the draft", hint="draft otherwise")
        return super().verify(draft, rows, sampler, token_ids)


class ChainVerifier(CoupledVerifier):
    exactness = Exactness.DISTRIBUTION
    draws = (SiblingDraw.IID, SiblingDraw.DETERMINISTIC)
    max_width = 1
    max_drafters = 1


class SampledVerifier(CoupledVerifier):
    draws = (SiblingDraw.IID,)


def make(verifier, drafters, **sizes):
    target = counting_model()
    cache = target.new_cache(4096)
    return Engine(
        target, cache, drafters, verifier, Plan(max_nodes=8), config=EngineConfig(**sizes)
    )


def test_an_error_ends_its_own_request_with_what_it_has():
    drafter = counting_drafter()
    engine = make(RefusingVerifier(20), {"it": drafter})
    first, second, third = (engine.add_request([start], greedy(23)) for start in (1, 21, 5))
    emissions = []
    while engine.num_unfinished:
        emissions += engine.step()
        check_books(engine)
    assert third.finish_reason is first.finish_reason is FinishReason.ERROR
    assert second.finish_reason is FinishReason.LENGTH
    assert 0 < len(first.output_ids) < len(second.output_ids)
    alone = make(CoupledVerifier(), {"it": counting_drafter()})
    expected = [alone.add_request([start], greedy(23)) for start in (1, 21, 5)]
    finish(alone)
    for request, full in zip((first, second, third), expected, strict=True):
        assert request.output_ids == full.output_ids[: len(request.output_ids)]
    failed = [item for item in emissions if item.finish_reason is FinishReason.ERROR]
    assert {item.request_id for item in failed} == {first.request_id, third.request_id}
    assert all(item.token_ids == () for item in failed)
    assert "does not take the draft" in str(first.error)
    check_idle(engine)
    assert set(drafter.stopped) == {first.request_id, second.request_id, third.request_id}


def test_a_request_that_never_meets_the_error_is_whole():
    engine = make(RefusingVerifier(20), {"it": counting_drafter()})
    failing = engine.add_request([19], greedy(8))
    whole = engine.add_request([1], greedy(8))
    finish(engine)
    assert (failing.output_ids, failing.finish_reason) == ([], FinishReason.ERROR)
    assert (whole.finish_reason, whole.error) == (FinishReason.LENGTH, None)
    assert whole.output_ids == list(range(2, 10))


def test_the_way_that_the_verifier_prefers_is_agreed_on():
    class Both(ScriptedDrafter):
        draws = frozenset({SiblingDraw.DETERMINISTIC, SiblingDraw.IID})

    drafters = {"copies": counting_drafter(), "samples": Both(lambda context: [])}
    assert agree_on_draws("chain", ChainVerifier, drafters) == {
        "copies": SiblingDraw.DETERMINISTIC,
        "samples": SiblingDraw.IID,
    }


def test_what_drafters_ask_of_every_step_is_known_at_the_start():
    drafters = {label: counting_drafter() for label in ("none", "some", "most", "states")}
    drafters["some"].needs = DrafterNeeds(shared_layers=1)
    drafters["most"].needs = DrafterNeeds(shared_layers=2, hidden_layers=(2,))
    drafters["states"].needs = DrafterNeeds(hidden_layers=(0, 1))
    assert observed_layers(drafters) == {"most": (2,), "states": (0, 1)}
    assert most_sharing(drafters) == "most"
    assert (observed_layers({}), most_sharing({})) == ({}, None)
    assert most_sharing({"none": drafters["none"]}) is None


def test_a_drafter_that_cannot_draw_as_needed_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="takes siblings drawn as iid; drafter 'it' draws them"):
        make(SampledVerifier(), {"it": counting_drafter()})


def test_chain_rules_take_one_drafter_per_request():
    drafters = {"a": counting_drafter(), "b": counting_drafter()}
    engine = make(ChainVerifier(), drafters)
    sampling = sampled(4, seed=1)
    with pytest.raises(RequestError, match="at most 1 drafter when sampling; got a, b"):
        engine.new_request([1], sampling)
    engine.add_request([1], sampling, drafters=["b"])
    engine.add_request([1], greedy(4))
    finish(engine)


def test_a_draft_wider_than_the_rule_takes_names_its_drafter():
    wide = ScriptedDrafter(lambda context: TokenTree((context.token_ids[-1], 5, 6), (-1, 0, 0)))
    engine = make(ChainVerifier(), {"wide": wide})
    request = engine.add_request([1], greedy(4))
    with pytest.raises(DrafterError, match="'wide' returned a draft of width 2; at most 1"):
        engine.step()
    engine.abort(request.request_id)
    check_idle(engine)


def test_drafters_of_one_kind_are_told_apart():
    drafters = {"scripted": counting_drafter(), "scripted#2": counting_drafter()}
    engine = make(CoupledVerifier(), drafters)
    both = engine.add_request([1], greedy(9))
    second = engine.add_request([1], greedy(9), drafters=["scripted#2"])
    finish(engine)
    assert both.stats.accepted_by == {"scripted": 8, "scripted#2": 8}
    assert second.stats.accepted_by == {"scripted#2": 8}
    assert both.stats.num_accepted == 8


def test_drafters_learn_how_to_draw_and_how_wide():
    seen = []

    class Both(ScriptedDrafter):
        draws = frozenset({SiblingDraw.DETERMINISTIC, SiblingDraw.IID})

    def note(context):
        seen.append((context.siblings, context.budget.max_width, context.drafter_index))
        return []

    engine = make(ChainVerifier(), {"first": counting_drafter(), "noted": Both(note)})
    params = [greedy(3), greedy(3, temperature=1.0, seed=1)]
    for wanted in params:
        engine.add_request([1], wanted, drafters=["noted"])
        finish(engine)
    # Whatever the rule, the likeliest tokens are the best guesses when the target is greedy.
    assert set(seen) == {(SiblingDraw.DETERMINISTIC, 1, 1), (SiblingDraw.IID, 1, 1)}


def test_every_drafter_and_step_has_randomness_of_its_own():
    draws = {}

    def note(context):
        key = (context.request_id, len(context.token_ids), context.drafter_index)
        draws[key] = context.generator().random(4).tobytes()
        return []

    for _ in range(2):
        before = dict(draws)
        engine = make(CoupledVerifier(), {name: ScriptedDrafter(note) for name in "ab"})
        for name, seed in (("x", 1), ("y", 2)):
            params = greedy(6, temperature=1.0, seed=seed)
            engine.add_request([1], params, request_id=name)
        finish(engine)
        assert before in ({}, draws)
    assert len(set(draws.values())) == len(draws) == 2 * 2 * 5
