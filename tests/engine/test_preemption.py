"""Requests that do not fit together: what is thrown back goes on with the same tokens."""

import random
from functools import lru_cache

import pytest

from foretoken import LLM
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.drafters.suffix import SuffixDrafter, SuffixOptions
from foretoken.engine import scheduler
from foretoken.engine.request import FinishReason
from tests.engines import (
    ScriptedDrafter,
    check_books,
    check_idle,
    counting_model,
    finish,
    greedy,
    make_draft_model,
    make_engine,
    make_host,
    micro_model,
    plain_ids,
    random_table,
    sampled,
)

BLOCK = 16


@pytest.fixture(autouse=True)
def crowded(monkeypatch):
    """Admit whoever fits for the moment, so that many are thrown back."""
    monkeypatch.setattr(scheduler, "GROWTH_BLOCKS", 0)


def some_drafters(target, draft, *, kv_tokens, max_requests):
    host = make_host(target, max_requests=max_requests, kv_cache_tokens=kv_tokens)
    return {
        "prompt-lookup": PromptLookupDrafter(PromptLookupOptions(min_ngram=1)),
        "suffix": SuffixDrafter(SuffixOptions()),
        "draft-model": make_draft_model(target, draft, host=host, max_depth=3),
    }


def some_requests(count, seed=0, vocab_size=61):
    """Return prompts, half of which begin alike, and what is asked of each."""
    rng = random.Random(seed)
    common = [rng.randrange(9) for _ in range(40)]
    for index in range(count):
        own = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))]
        prompt_ids = common[: rng.randint(17, 40)] + own if index % 2 else own
        values = {"ignore_eos": True, "logprobs": 2}
        if index % 3 == 0:
            values["prompt_logprobs"] = 1
        num_new = rng.randint(10, 60)
        yield (
            prompt_ids,
            (
                greedy(num_new, **values)
                if index % 4 < 2
                else sampled(num_new, seed=index, **values)
            ),
        )


@lru_cache
def some_outputs(count):
    """Return the same requests, each finished alone by plain decoding."""
    finished = []
    for prompt_ids, params in some_requests(count):
        engine = make_engine(
            micro_model("llama"), max_nodes=0, max_requests=1, prefix_caching=False
        )
        finished.append(engine.add_request(prompt_ids, params))
        finish(engine)
    return finished


def values_of(entries):
    return [value for entry in entries for value in (entry.logprob, *(it for _, it in entry.top))]


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("labels", [[], ["prompt-lookup"], ["suffix"], ["draft-model"], None])
def test_tokens_and_logprobs_are_those_of_the_request_alone(labels, prefix_caching):
    target = micro_model("llama")
    sizes = {"kv_tokens": 10 * BLOCK, "max_requests": 6}
    drafters = some_drafters(target, micro_model("llama", blur=0.15), **sizes)
    engine = make_engine(
        target,
        drafters,
        max_nodes=6,
        prefill_chunk=24,
        mixed_chunk=8,
        prefix_caching=prefix_caching,
        **sizes,
    )
    requests = [engine.add_request(*it, drafters=labels) for it in some_requests(12)]
    finish(engine)
    for request, expected in zip(requests, some_outputs(12), strict=True):
        assert request.output_ids == expected.output_ids
        assert values_of(request.logprobs) == pytest.approx(values_of(expected.logprobs))
        assert len(request.prompt_logprobs) == len(expected.prompt_logprobs)
        scored, alike = values_of(request.prompt_logprobs), values_of(expected.prompt_logprobs)
        assert scored == pytest.approx(alike)
    check_idle(engine)
    assert sum(request.stats.num_preemptions for request in requests) > 5
    num_cached = sum(request.stats.num_cached_prompt_tokens for request in requests)
    assert (num_cached > 0) is prefix_caching
    if labels != []:
        assert sum(request.stats.num_accepted for request in requests) > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafters", ["none", "prompt-lookup", "suffix", "auto"])
def test_the_compiled_pair_says_the_same_to_the_bit(drafters, temperature):
    """The embedded pair, in the arithmetic that users run."""
    rng = random.Random(1)
    common = [rng.randrange(300) for _ in range(48)]
    prompts = [[*common[: 16 * (1 + index % 3)], 7 + index] for index in range(8)]
    params = greedy(70, temperature=temperature, seed=5, ignore_eos=True, logprobs=3)

    def outputs(prompt_groups, **options):
        llm = LLM("stories", max_nodes=6, threads=1, **options)
        made = [it for group in prompt_groups for it in llm.generate(group, params)]
        check_idle(llm.engine)
        return made

    expected = outputs([[it] for it in prompts], drafters="none", prefix_caching=False)
    for prefix_caching in (False, True):
        tight = outputs(
            [prompts, prompts[:2]],
            drafters=drafters,
            prefix_caching=prefix_caching,
            kv_cache_tokens=20 * BLOCK,
            prefill_chunk=40,
            mixed_chunk=7,
        )
        assert sum(it.stats.num_preemptions for it in tight) > 1
        for got, want in zip(tight, expected + expected[:2], strict=True):
            assert (got.token_ids, got.text) == (want.token_ids, want.text)
            assert got.logprobs == want.logprobs


def test_a_resumed_request_emits_what_it_would_have():
    target = random_table()
    engine = make_engine(target, kv_tokens=5 * BLOCK, max_requests=3)
    requests = [engine.add_request([1, 2, seed], sampled(60, seed=seed)) for seed in range(3)]
    emissions = finish(engine)
    assert sum(request.stats.num_preemptions for request in requests) > 0
    for seed, request in enumerate(requests):
        mine = emissions[request.request_id]
        ids = [token_id for emission in mine for token_id in emission.token_ids]
        assert ids == request.output_ids == plain_ids(target, [1, 2, seed], sampled(60, seed=seed))
        assert request.stats.num_tokens == 60
        assert [it.finish_reason for it in mine if it.finish_reason] == [FinishReason.LENGTH]


def test_drafters_that_hold_keys_and_values_begin_anew_and_others_go_on():
    target = counting_model()
    model = make_draft_model(target, counting_model(), host=make_host(target, max_requests=2))
    model.log = []
    start, stop = model.start, model.stop
    model.start = lambda view: (model.log.append(("start", view.request_id)), start(view))
    model.stop = lambda name: (model.log.append(("stop", name)), stop(name))
    other = ScriptedDrafter(lambda context: [])
    drafters = {"draft-model": model, "other": other}
    engine = make_engine(target, drafters, max_nodes=2, kv_tokens=5 * BLOCK, max_requests=2)
    for name in "ab":
        engine.add_request([1], greedy(60), request_id=name)
    finish(engine)
    assert model.log == [
        ("start", "a"),
        ("start", "b"),
        ("stop", "b"),
        ("stop", "a"),
        ("start", "b"),
        ("stop", "b"),
    ]
    assert (other.started, other.stopped) == (["a", "b"], ["a", "b"])
    check_idle(engine)


def test_a_drafter_that_cannot_begin_anew_ends_its_request():
    target = counting_model()
    model = make_draft_model(target, counting_model(), host=make_host(target, max_requests=2))
    engine = make_engine(
        target, {"draft-model": model}, max_nodes=2, kv_tokens=5 * BLOCK, max_requests=2
    )
    first, second = (engine.add_request([1], greedy(60)) for _ in range(2))
    model.start = lambda view: 1 / 0
    with pytest.raises(ZeroDivisionError):
        finish(engine)
    assert second.finish_reason is FinishReason.ABORT
    assert (first.finish_reason, len(first.output_ids)) == (FinishReason.LENGTH, 60)
    check_idle(engine)


def until_preempted(engine, requests):
    """Step until one is waiting to be resumed; return it."""
    while engine.num_unfinished:
        engine.step()
        check_books(engine)
        for request in requests:
            if request.stats.num_preemptions and engine.num_waiting:
                return request
    raise AssertionError("nobody was thrown back")


def test_abort_of_a_preempted_request():
    target = counting_model()
    drafters = some_drafters(target, counting_model(), kv_tokens=5 * BLOCK, max_requests=2)
    engine = make_engine(target, drafters, max_nodes=2, kv_tokens=5 * BLOCK, max_requests=2)
    requests = [engine.add_request([1], greedy(60)) for _ in range(2)]
    preempted = until_preempted(engine, requests)
    engine.abort(preempted.request_id)
    assert (engine.num_running, engine.num_waiting) == (1, 0)
    check_books(engine)
    finish(engine)
    assert len(requests[0].output_ids) == 60
    check_idle(engine)


@pytest.mark.parametrize("seed", [0, 1])
def test_five_hundred_clients_that_go_away_leave_nothing(seed):
    """They go at any time: waiting, fed in part, running, thrown back, just finished."""
    rng = random.Random(seed)
    target = random_table(12, seed=seed)
    sizes = {"kv_tokens": 16 * BLOCK, "max_requests": 6}
    drafters = some_drafters(target, random_table(12, seed=seed, spread=1.7), **sizes)
    engine = make_engine(target, drafters, max_nodes=5, prefill_chunk=20, mixed_chunk=6, **sizes)
    alive, gone, states = [], 0, set()
    while gone < 500:
        while len(alive) < 12:
            prompt_ids = [rng.randrange(3) for _ in range(rng.randint(1, 60))]
            labels = rng.choice([None, [], ["draft-model"], ["suffix", "prompt-lookup"]])
            params = sampled(rng.randint(1, 90), seed=rng.randrange(99), ignore_eos=True)
            alive.append(engine.add_request(prompt_ids, params, drafters=labels))
        for request in rng.sample(alive, rng.choice([0] * 6 + [1, 4])):
            running = request.request_id in engine.parts.scheduler._running
            states.add((running, bool(request.output_ids), request.stats.num_preemptions > 0))
            engine.abort(request.request_id)
            alive.remove(request)
            gone += 1
            check_books(engine)
        engine.step()
        check_books(engine)
        alive = [request for request in alive if request.finish_reason is None]
    assert {(False, False, False), (False, True, True), (True, True, False)} <= states
    last = engine.add_request([1, 2, 1], sampled(20, seed=3))
    for request in alive:
        engine.abort(request.request_id)
    finish(engine)
    assert last.output_ids == plain_ids(target, [1, 2, 1], sampled(20, seed=3))
    check_idle(engine)


def test_an_exception_in_a_processor_ends_its_own_request_only():
    target = random_table()

    def moody(input_ids, scores):
        if input_ids.shape[1] > 40:
            raise KeyError("no such history")
        return scores

    engine = make_engine(target, kv_tokens=6 * BLOCK, max_requests=3)
    wanted = [sampled(60, seed=seed) for seed in range(3)]
    wanted[1] = sampled(60, seed=1, logits_processors=(moody,))
    requests = [engine.add_request([seed], it) for seed, it in enumerate(wanted)]
    finish(engine)
    assert sum(request.stats.num_preemptions for request in requests) > 0
    assert [request.finish_reason for request in requests] == [
        FinishReason.LENGTH,
        FinishReason.ERROR,
        FinishReason.LENGTH,
    ]
    assert "raised KeyError: 'no such history'" in str(requests[1].error)
    for seed, request in enumerate(requests):
        plain = plain_ids(target, [seed], sampled(60, seed=seed))
        assert request.output_ids == plain[: 40 if seed == 1 else 60]
    check_idle(engine)


def test_a_draft_cache_without_room_means_no_draft():
    """Requests that begin alike share blocks of the target's cache, and none of the draft's."""
    target = counting_model()
    host = make_host(target, max_requests=1, kv_cache_tokens=6 * BLOCK)
    drafter = make_draft_model(target, counting_model(), host=host, max_depth=1)
    assert drafter._cache.num_blocks == 10
    sizes = {"kv_tokens": 16 * BLOCK, "max_requests": 6}
    engine = make_engine(target, {"it": drafter}, max_nodes=2, **sizes)
    text = [index % 26 for index in range(5 * BLOCK)]
    first = engine.add_request([*text, 3], greedy(9))
    engine.step()
    requests = [engine.add_request([*text, start], greedy(9)) for start in range(4)]
    finish(engine)
    assert [it.stats.num_preemptions for it in requests] == [0] * 4
    assert [it.stats.num_cached_prompt_tokens for it in requests] == [5 * BLOCK] * 4
    assert first.stats.num_accepted > 0
    assert min(it.stats.num_accepted for it in requests) == 0
    for start, request in enumerate(requests):
        assert request.output_ids == [(start + step) % 26 for step in range(1, 10)]
    check_idle(engine)


def test_max_nodes_bounds_the_drafts_of_one_request():
    target = random_table()
    sizes = []

    def guess(context):
        sizes.append(context.budget.max_nodes)
        return [1] * min(context.budget.max_nodes, context.budget.max_depth)

    drafter = ScriptedDrafter(guess)
    engine = make_engine(target, {"it": drafter}, max_nodes=5)
    requests = [engine.add_request([1], greedy(12), max_nodes=it) for it in (None, 2, 0, 99)]
    finish(engine)
    assert requests[2].stats.num_draft_tokens == 0
    assert requests[2].drafters == ()
    assert set(sizes) == {2, 5}
    assert len({tuple(it.output_ids) for it in requests}) == 1
    assert max(requests[1].stats.num_draft_tokens / requests[1].stats.num_steps, 0) <= 2
