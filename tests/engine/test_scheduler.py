"""Who runs when: admission by promised blocks, order, and shared prefill."""

import pytest

from foretoken.engine.request import Request
from foretoken.engine.scheduler import Scheduler
from foretoken.errors import RequestError
from foretoken.models.cache import BLOCK_SIZE
from foretoken.planner.plan import Plan
from tests.engines import counting_model, greedy

MODEL = counting_model(context_limit=512)


def request(name, num_prompt_ids=4, num_new=8):
    return Request(
        name,
        [1] * num_prompt_ids,
        greedy(num_new),
        seed=0,
        drafters=(),
        info=MODEL.info,
        decode=None,
    )


def make(num_blocks=40, *, max_nodes=3, max_requests=8, prefill_chunk=100):
    cache = MODEL.new_cache(num_blocks * BLOCK_SIZE)
    plan = Plan(max_nodes=max_nodes)
    return cache, Scheduler(cache, plan, max_requests=max_requests, prefill_chunk=prefill_chunk)


def feed(cache, works):
    """Do what a step does to the cache: stage and keep what is known."""
    for work in works:
        cache.stage(work.sequence, list(range(-1, work.num_known - 1)))
        cache.commit([(work.sequence, range(work.num_known))])
        if work.budget is not None:
            work.request.token_ids.append(2)


def shares(works):
    return [(work.request.request_id, work.num_known, work.budget is not None) for work in works]


def test_requests_are_admitted_in_order_up_to_the_limit():
    _, scheduler = make(max_requests=2)
    for name in "abc":
        scheduler.add(request(name))
    assert shares(scheduler.schedule()) == [("a", 4, True), ("b", 4, True)]
    assert scheduler.num_unfinished == 3
    scheduler.remove("a")
    assert [work.request.request_id for work in scheduler.schedule()] == ["b", "c"]


def test_admission_counts_the_blocks_that_requests_may_come_to_need():
    # 4 + 24 + 3 + 1 positions are exactly two blocks; four blocks hold two of them.
    cache, scheduler = make(num_blocks=5)
    for name in "abc":
        scheduler.add(request(name, num_new=24))
    assert [work.request.request_id for work in scheduler.schedule()] == ["a", "b"]
    assert cache.num_free_blocks == 5  # promised, not taken
    scheduler.remove("b")
    assert [work.request.request_id for work in scheduler.schedule()] == ["a", "c"]


@pytest.mark.parametrize(("num_new", "num_admitted"), [(24, 2), (25, 1)])
def test_one_position_more_is_one_block_more(num_new, num_admitted):
    _, scheduler = make(num_blocks=5)
    scheduler.add(request("a", num_new=num_new))
    scheduler.add(request("b", num_new=num_new))
    scheduler.add(request("c", num_new=num_new))
    assert len(scheduler.schedule()) == num_admitted


def test_a_small_request_does_not_overtake_a_large_one():
    _, scheduler = make(num_blocks=6)
    scheduler.add(request("a", num_new=40))
    scheduler.add(request("large", num_new=80))
    scheduler.add(request("small", num_new=1))
    assert [work.request.request_id for work in scheduler.schedule()] == ["a"]
    scheduler.remove("a")
    assert [work.request.request_id for work in scheduler.schedule()] == ["large"]


def test_a_request_that_can_never_fit_is_refused():
    _, scheduler = make(num_blocks=2)
    scheduler.check(request("fits", num_new=24))
    with pytest.raises(RequestError, match="up to 48 positions of KV cache; there are 32") as info:
        scheduler.check(request("too large", num_new=25))
    assert "kv_cache_tokens" in info.value.hint


def test_context_limit_bounds_what_a_request_is_promised():
    cache = MODEL.new_cache(512 + 16)
    scheduler = Scheduler(cache, Plan(max_nodes=3), max_requests=2, prefill_chunk=10)
    scheduler.check(request("all of it", num_new=10**9))


def test_prompts_share_the_chunk_in_order():
    cache, scheduler = make(prefill_chunk=10)
    for name, size in (("a", 7), ("b", 9), ("c", 5)):
        scheduler.add(request(name, num_prompt_ids=size))
    works = scheduler.schedule()
    assert shares(works) == [("a", 7, True), ("b", 3, False)]
    feed(cache, works)
    works = scheduler.schedule()
    # `a` decodes now; decoding takes nothing from the chunk and comes first.
    assert shares(works) == [("a", 1, True), ("b", 6, True), ("c", 4, False)]
    feed(cache, works)
    works = scheduler.schedule()
    assert shares(works) == [("a", 1, True), ("b", 1, True), ("c", 1, True)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_a_prompt_is_fed_once_whatever_the_chunk(chunk):
    cache, scheduler = make(prefill_chunk=chunk)
    scheduler.add(request("a", num_prompt_ids=11))
    fed, is_last = [], False
    while not is_last:
        [work] = scheduler.schedule()
        feed(cache, [work])
        fed.append(work.num_known)
        is_last = work.budget is not None
    assert sum(fed) == 11
    assert max(fed) <= chunk
    assert len(fed) == -(-11 // chunk)


def test_budget_follows_what_the_request_still_wants():
    cache, scheduler = make(max_nodes=3)
    scheduler.add(request("a", num_new=3))
    depths = []
    for _ in range(3):
        works = scheduler.schedule()
        depths.append(works[0].budget.max_depth)
        assert works[0].budget.max_nodes == 3
        feed(cache, works)
    assert depths == [2, 1, 0]


def test_removed_requests_free_their_promise_and_their_blocks():
    cache, scheduler = make(num_blocks=2)
    scheduler.add(request("a", num_new=24))
    scheduler.add(request("b", num_new=24))
    feed(cache, scheduler.schedule())
    assert cache.num_free_blocks < 2
    scheduler.remove("a")
    assert cache.num_free_blocks == 2
    scheduler.remove("unknown")
    assert shares(scheduler.schedule()) == [("b", 4, True)]
    scheduler.remove("b")
    assert (scheduler.num_unfinished, scheduler.schedule(), cache.num_sequences) == (0, [], 0)


def test_a_waiting_request_can_be_removed():
    _, scheduler = make(max_requests=1)
    for name in "abc":
        scheduler.add(request(name))
    scheduler.schedule()
    scheduler.remove("b")
    scheduler.remove("a")
    assert [work.request.request_id for work in scheduler.schedule()] == ["c"]
