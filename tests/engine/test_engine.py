"""The engine: continuous batching, every way to end, and order after every kind of failure."""

import pytest

from foretoken.core.draft import Draft
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import Exactness
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.engine.engine import EngineConfig
from foretoken.engine.request import FinishReason
from foretoken.errors import ConfigError, DrafterError, RequestError, UnknownNameError
from tests.engines import (
    ScriptedDrafter,
    check_books,
    check_idle,
    counting_drafter,
    counting_model,
    finish,
    greedy,
    make_draft_model,
    make_engine,
    plain_ids,
    random_table,
    sampled,
)

VOCAB_SIZE = 26


def letters(token_ids):
    return "".join(chr(ord("a") + token_id) for token_id in token_ids)


def counted(first, count):
    return [(first + step) % VOCAB_SIZE for step in range(count)]


def counting_engine(drafter=None, *, eos_ids=(), context_limit=256, **options):
    target = counting_model(eos_ids=eos_ids, context_limit=context_limit)
    drafter = drafter or counting_drafter()
    return make_engine(target, {"it": drafter}, decode=letters, **options), drafter


# -- joining and leaving ---------------------------------------------------------------------


def test_requests_join_and_leave_at_any_step():
    target = random_table()
    drafters = {
        "draft-model": make_draft_model(target, random_table(seed=0, spread=1.8)),
        "prompt-lookup": PromptLookupDrafter(PromptLookupOptions()),
    }
    engine = make_engine(target, drafters, max_requests=3, prefill_chunk=5)
    wanted = [
        ([1, 2, 3] * (1 + index % 4), sampled(3 + 5 * (index % 3), seed=index))
        for index in range(12)
    ]
    requests = []
    for index, (prompt_ids, params) in enumerate(wanted):
        labels = [[], ["draft-model"], ["prompt-lookup"], None][index % 4]
        requests.append(engine.add_request(prompt_ids, params, drafters=labels))
        for _ in range(index % 3):
            engine.step()
            check_books(engine)
    finish(engine)
    for request, (prompt_ids, params) in zip(requests, wanted, strict=True):
        assert request.output_ids == plain_ids(target, prompt_ids, params)
        assert request.finish_reason is FinishReason.LENGTH
    check_idle(engine)


def test_emissions_add_up_to_the_output():
    engine, _ = counting_engine(max_nodes=3)
    requests = [engine.add_request([first], greedy(9)) for first in range(3)]
    emissions = finish(engine)
    for first, request in enumerate(requests):
        mine = emissions[request.request_id]
        assert [i for emission in mine for i in emission.token_ids] == counted(first + 1, 9)
        assert "".join(emission.text for emission in mine) == letters(counted(first + 1, 9))
        reasons = [emission.finish_reason for emission in mine]
        assert reasons == [None] * (len(mine) - 1) + [FinishReason.LENGTH]
        # Four tokens a step, three of them drafted.
        assert [emission.sources for emission in mine[:2]] == [("scripted",) * 3 + ("",)] * 2


@pytest.mark.parametrize(("stop", "expected"), [((), "bcdefghij"), (("gh",), "bcdef")])
def test_text_that_is_not_streamed_comes_with_the_last_emission(stop, expected):
    engine, _ = counting_engine(max_nodes=3)
    request = engine.add_request([0], greedy(9, stop=stop))
    request.streams_text = False
    emissions = finish(engine)[request.request_id]
    assert len(emissions) > 1
    assert [it.text for it in emissions] == [""] * (len(emissions) - 1) + [expected]
    assert request.text_stream.text == expected


def test_a_step_without_requests_does_nothing():
    engine, _ = counting_engine()
    assert engine.step() == []
    assert engine.num_unfinished == 0


def test_a_request_is_drafted_for_only_by_the_drafters_that_it_names():
    target, mine, other = counting_model(), counting_drafter(), counting_drafter()
    engine = make_engine(target, {"mine": mine, "other": other})
    request = engine.add_request([1], greedy(12), drafters=["mine"])
    plain = engine.add_request([2], greedy(12), drafters=[])
    finish(engine)
    assert mine.started == mine.stopped == [request.request_id]
    assert list(mine.verdicts) == [request.request_id]
    assert (other.started, other.num_proposed, other.stopped) == ([], 0, [])
    assert (request.stats.num_steps, plain.stats.num_steps) == (2, 12)


def test_a_drafter_named_twice_is_started_once():
    """Two starts used to leave the first one's place in a draft cache behind."""
    engine, drafter = counting_engine()
    request = engine.add_request([1], greedy(5), drafters=["it", "it"])
    finish(engine)
    assert drafter.started == drafter.stopped == [request.request_id]
    assert request.output_ids == counted(2, 5)


def test_drafts_of_several_drafters_are_merged_and_pruned_to_the_plan():
    target = counting_model()
    right = ScriptedDrafter(lambda context: counted(context.token_ids[-1] + 1, 2), "right")
    wrong = ScriptedDrafter(lambda context: [0, 0], "wrong")
    engine = make_engine(target, {"wrong": wrong, "right": right}, max_nodes=4)
    request = engine.add_request([3], greedy(9))
    emissions = finish(engine)[request.request_id]
    assert request.output_ids == counted(4, 9)
    assert emissions[0].sources == ("right", "right", "")
    assert request.stats.accepted_by == {"right": 6}
    assert max(target.rows_per_pass) == 5


# -- the end of a request --------------------------------------------------------------------


def test_end_of_sequence_inside_an_accepted_path_cuts_it_and_the_rest():
    engine, drafter = counting_engine(eos_ids=(7,))
    request = engine.add_request([3], greedy(50))
    [emission] = finish(engine)[request.request_id]
    assert request.output_ids == [4, 5, 6, 7]
    assert (emission.token_ids, emission.sources) == ((4, 5, 6, 7), ("scripted",) * 4)
    assert emission.finish_reason is request.finish_reason is FinishReason.EOS
    assert (request.stats.num_tokens, request.stats.num_accepted) == (4, 4)
    assert drafter.stopped == [request.request_id]
    check_idle(engine)


def test_end_of_sequence_can_be_ignored():
    engine, _ = counting_engine(eos_ids=(7,))
    request = engine.add_request([3], greedy(10, ignore_eos=True))
    finish(engine)
    assert request.output_ids == counted(4, 10)
    assert request.finish_reason is FinishReason.LENGTH


def test_end_of_sequence_in_the_prompt_does_not_end_anything():
    engine, _ = counting_engine(eos_ids=(7,))
    request = engine.add_request([7], greedy(3))
    finish(engine)
    assert request.output_ids == [8, 9, 10]


@pytest.mark.parametrize("num_tokens", range(1, 13))
def test_max_new_tokens_is_met_exactly(num_tokens):
    engine, _ = counting_engine(max_nodes=4)
    request = engine.add_request([3, 4], greedy(num_tokens))
    finish(engine)
    assert request.output_ids == counted(5, num_tokens)
    assert request.finish_reason is FinishReason.LENGTH
    assert request.stats.num_tokens == num_tokens
    check_idle(engine)


@pytest.mark.parametrize("num_prompt_ids", [1, 6, 14, 15])
def test_context_limit_ends_a_request(num_prompt_ids):
    engine, _ = counting_engine(context_limit=16)
    request = engine.add_request(counted(0, num_prompt_ids), greedy(100))
    finish(engine)
    assert len(request.token_ids) == 16
    assert request.output_ids == counted(num_prompt_ids, 16 - num_prompt_ids)
    assert request.finish_reason is FinishReason.LENGTH
    assert engine.parts.target.rows_per_pass  # and no pass saw a position beyond it


def test_stop_text_inside_an_accepted_path_cuts_tokens_and_text():
    engine, _ = counting_engine()
    request = engine.add_request([0], greedy(20, stop=("ef", "zz")))
    [emission] = finish(engine)[request.request_id]
    assert request.output_ids == [1, 2, 3, 4, 5]
    assert emission.text == request.text_stream.text == "bcd"
    assert emission.finish_reason is FinishReason.STOP
    assert request.stats.num_tokens == 5
    check_idle(engine)


def test_stop_text_across_steps():
    engine, _ = counting_engine(max_nodes=1)
    request = engine.add_request([0], greedy(20, stop=("efgh",)))
    emissions = finish(engine)[request.request_id]
    assert "".join(emission.text for emission in emissions) == "bcd"
    assert request.output_ids == [1, 2, 3, 4, 5, 6, 7]


def test_what_comes_first_of_stop_end_of_sequence_and_length_counts():
    for values, eos_ids, expected, reason in [
        ({"stop": ("cd",)}, (4,), [1, 2, 3], FinishReason.STOP),
        ({"stop": ("ef",)}, (4,), [1, 2, 3, 4], FinishReason.EOS),
        ({"stop": ("ef",)}, (3,), [1, 2, 3], FinishReason.EOS),
    ]:
        engine, _ = counting_engine(eos_ids=eos_ids)
        request = engine.add_request([0], greedy(6, **values))
        finish(engine)
        assert (request.output_ids, request.finish_reason) == (expected, reason)
    engine, _ = counting_engine(eos_ids=(6,))
    request = engine.add_request([0], greedy(6))
    finish(engine)
    assert request.finish_reason is FinishReason.EOS  # with the last token that it may take


# -- abort -----------------------------------------------------------------------------------


def test_abort_of_a_running_request_frees_what_it_holds():
    engine, drafter = counting_engine(max_nodes=2)
    first, second = (engine.add_request([start], greedy(30)) for start in (0, 9))
    engine.step()
    engine.abort(first.request_id)
    check_books(engine)
    assert first.finish_reason is FinishReason.ABORT
    assert first.output_ids == [1, 2, 3]
    assert drafter.stopped == [first.request_id]
    finish(engine)
    assert second.output_ids == counted(10, 30)
    check_idle(engine)


def test_abort_of_a_waiting_request_lets_the_next_one_run():
    engine, _ = counting_engine(max_requests=1)
    running, waiting, last = (engine.add_request([start], greedy(20)) for start in (0, 1, 2))
    engine.step()
    engine.abort(waiting.request_id)
    emissions = finish(engine)
    assert waiting.output_ids == []
    assert waiting.request_id not in emissions
    assert (running.output_ids, last.output_ids) == (counted(1, 20), counted(3, 20))
    check_idle(engine)


def test_abort_during_the_prompt():
    engine, _ = counting_engine(prefill_chunk=2)
    request = engine.add_request(counted(0, 9), greedy(5))
    assert engine.step() == []
    engine.abort(request.request_id)
    check_idle(engine)


def test_abort_of_unknown_and_finished_requests_does_nothing():
    engine, _ = counting_engine()
    request = engine.add_request([0], greedy(2))
    finish(engine)
    engine.abort(request.request_id)
    engine.abort("nobody")
    assert request.finish_reason is FinishReason.LENGTH


# -- failures --------------------------------------------------------------------------------


def raising(method):
    """Return a counting drafter one of whose methods raises when it is told to."""
    drafter = counting_drafter()
    drafter.is_broken = False
    working = getattr(drafter, method)

    def broken(*args):
        if drafter.is_broken:
            raise ZeroDivisionError(method)
        return working(*args)

    setattr(drafter, method, broken)
    return drafter


def check_recovery(engine, broken_requests):
    """Abort what failed; everything is free then, and later requests are served."""
    check_books(engine)
    for request in broken_requests:
        engine.abort(request.request_id)
    check_idle(engine)
    later = engine.add_request([4], greedy(10))
    finish(engine)
    assert later.output_ids == counted(5, 10)
    check_idle(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_drafter_that_raises_leaves_the_engine_in_order(num_steps):
    drafter = raising("propose")
    engine, _ = counting_engine(drafter, max_nodes=2, prefill_chunk=3)
    requests = [engine.add_request(counted(0, size), greedy(20)) for size in (2, 5, 1)]
    for _ in range(num_steps):
        engine.step()
    drafter.is_broken = True
    with pytest.raises(ZeroDivisionError, match="propose"):
        engine.step()
    drafter.is_broken = False
    check_recovery(engine, requests)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_target_that_raises_leaves_the_engine_in_order(num_steps):
    engine, _ = counting_engine(max_nodes=2, prefill_chunk=3)
    requests = [engine.add_request(counted(0, size), greedy(20)) for size in (2, 5, 1)]
    for _ in range(num_steps):
        engine.step()
    engine.parts.target.fail_next = True
    with pytest.raises(RuntimeError, match="fell off"):
        engine.step()
    check_recovery(engine, requests)


@pytest.mark.parametrize("where", ["propose", "forward"])
def test_requests_can_go_on_after_a_step_that_failed(where):
    """Nothing of a failed step stands: the next one does the same work again."""
    target = counting_model()
    flaky = raising("propose")
    drafters = {"draft-model": make_draft_model(target, counting_model()), "flaky": flaky}
    engine = make_engine(target, drafters, max_nodes=3, prefill_chunk=4)
    requests = [
        engine.add_request(counted(start, size), greedy(15))
        for start, size in ((0, 1), (3, 6), (9, 2))
    ]
    for step in range(100):
        if not engine.num_unfinished:
            break
        if step % 2:
            flaky.is_broken = where == "propose"
            target.fail_next = where == "forward"
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                engine.step()
            flaky.is_broken = False
        else:
            engine.step()
        check_books(engine)
    for request in requests:
        assert request.output_ids == counted(request.prompt_ids[-1] + 1, 15)
    check_idle(engine)


def test_a_drafter_that_raises_at_commit_loses_no_tokens():
    """The target's cache was ahead of the request's tokens then, and the request beyond help."""
    drafter = raising("commit")
    engine, _ = counting_engine(drafter, max_nodes=2)
    requests = [engine.add_request([start], greedy(20)) for start in (0, 5)]
    engine.step()
    drafter.is_broken = True
    with pytest.raises(ZeroDivisionError, match="commit"):
        engine.step()
    check_books(engine)
    drafter.is_broken = False
    finish(engine)
    assert [request.output_ids for request in requests] == [counted(1, 20), counted(6, 20)]
    check_idle(engine)


def test_a_drafter_that_raises_at_start_leaves_no_request_behind():
    """The request used to stay queued although `add_request` had raised."""
    target, good, bad = counting_model(), counting_drafter(), raising("start")
    engine = make_engine(target, {"good": good, "bad": bad})
    bad.is_broken = True
    with pytest.raises(ZeroDivisionError):
        engine.add_request([1], greedy(5), request_id="mine")
    assert engine.num_unfinished == 0
    assert "mine" in good.stopped
    bad.is_broken = False
    request = engine.add_request([1], greedy(5), request_id="mine")
    finish(engine)
    assert request.output_ids == counted(2, 5)
    check_idle(engine)


VIOLATIONS = {
    "root": (
        lambda context: TokenTree.single((context.token_ids[-1] + 1) % 26),
        "a draft whose root is 4; the pending token is 3",
    ),
    "too many nodes": (
        lambda context: TokenTree((context.token_ids[-1], 1, 2, 3), (-1, 0, 0, 0)),
        "3 nodes and depth 1; the bounds are 2 and 1",
    ),
    "too deep": (lambda context: [1, 2], "2 nodes and depth 2; the bounds are 2 and 1"),
    "negative id": (lambda context: [-1], r"outside \[0, 26\)"),
    "id beyond the vocabulary": (lambda context: [26], r"outside \[0, 26\)"),
}


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_a_draft_that_breaks_the_contract_names_its_drafter(kind):
    draft, message = VIOLATIONS[kind]
    target, bad = counting_model(), ScriptedDrafter(draft)
    engine = make_engine(target, {"it": counting_drafter(), "bad": bad}, max_nodes=2)
    request = engine.add_request([3], greedy(2), drafters=["bad"])
    with pytest.raises(DrafterError, match=message) as caught:
        engine.step()
    assert "'bad'" in str(caught.value)
    assert "leave it out" in caught.value.hint
    engine.abort(request.request_id)
    other = engine.add_request([3], greedy(5), drafters=["it"])
    finish(engine)
    assert other.output_ids == counted(4, 5)
    check_idle(engine)


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_a_wrong_number_of_drafts_names_its_drafter(num_drafts):
    """It used to end in a ValueError about zip."""
    bad = counting_drafter()
    bad.propose = lambda contexts: [Draft.empty(contexts[0].token_ids[-1])] * num_drafts
    engine, _ = counting_engine(bad)
    requests = [engine.add_request([3], greedy(9)) for _ in range(2)]
    with pytest.raises(DrafterError, match=f"'it' returned {num_drafts} drafts for 2 contexts"):
        engine.step()
    for request in requests:
        engine.abort(request.request_id)
    check_idle(engine)


# -- bad requests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_ids", "params", "message"),
    [
        ([], greedy(1), "the prompt is empty"),
        ([1] * 16, greedy(1), "16 tokens; the model's context holds 16"),
        ([1, 26], greedy(1), r"token id 26 in the prompt is outside .* \[0, 26\)"),
        ([-1], greedy(1), "token id -1 in the prompt is outside"),
        # A number of another kind would fail the step of everybody.
        ([1, 1.5], greedy(1), "token id 1.5 in the prompt is outside"),
        (["a"], greedy(1), "token id 'a' in the prompt is outside"),
        ([1], greedy(1, logit_bias={99: 1.0}), "token id 99 in logit_bias is outside"),
        ([1], greedy(1, stop=("x",)), "stop texts need a tokenizer"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(prompt_ids, params, message):
    engine = make_engine(counting_model(context_limit=16), {"it": counting_drafter()})
    with pytest.raises(RequestError, match=message) as caught:
        engine.add_request(prompt_ids, params)
    assert caught.value.hint
    with pytest.raises(RequestError, match=message):
        engine.new_request(prompt_ids, params)
    check_idle(engine)


def test_request_that_can_never_fit_is_refused_and_leaves_nothing():
    engine, drafter = counting_engine(kv_tokens=32)
    with pytest.raises(RequestError, match="positions of KV cache"):
        engine.add_request([1], greedy(100))
    assert drafter.started == []
    check_idle(engine)


def test_unknown_drafters_are_refused_with_the_nearest_name():
    engine, _ = counting_engine()
    with pytest.raises(UnknownNameError, match="'itt'") as caught:
        engine.add_request([1], greedy(1), drafters=["itt"])
    assert "'it'" in caught.value.hint
    check_idle(engine)


def test_request_ids_are_unique_among_unfinished_requests():
    engine, _ = counting_engine()
    engine.add_request([1], greedy(3), request_id="mine")
    with pytest.raises(RequestError, match="'mine' is in use"):
        engine.add_request([2], greedy(3), request_id="mine")
    assert engine.num_unfinished == 1
    finish(engine)
    again = engine.add_request([2], greedy(3), request_id="mine")
    finish(engine)
    assert again.output_ids == [3, 4, 5]


@pytest.mark.parametrize(
    "values",
    [
        {"max_requests": 0},
        {"prefill_chunk": 0},
        {"max_requests": 1.5},
        {"prefill_chunk": True},
        {"mixed_chunk": 0},
        {"prefix_caching": 1},
    ],
)
def test_impossible_sizes_are_refused(values):
    with pytest.raises(ConfigError, match=r"is an integer >= 1|is true or false"):
        EngineConfig(**values)


# -- seeds and exactness ---------------------------------------------------------------------


def test_a_fresh_seed_is_reported_and_gives_the_same_tokens_again():
    engine = make_engine(random_table(spread=0.5), {"it": counting_drafter(20)})
    requests = [engine.add_request([1], sampled(30, seed=None)) for _ in range(3)]
    finish(engine)
    assert len({request.seed for request in requests}) == 3
    assert len({tuple(request.output_ids) for request in requests}) == 3
    for request in requests:
        again = engine.add_request([1], sampled(30, seed=request.seed), drafters=[])
        finish(engine)
        assert again.output_ids == request.output_ids


def test_nothing_stronger_than_numerical_is_claimed():
    engine, _ = counting_engine()
    assert engine.exactness is Exactness.NUMERICAL
