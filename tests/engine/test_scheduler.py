"""Who runs when: admission, preemption, order, shared prefill and shared prefixes."""

import random

import pytest

from foretoken.engine.request import Request
from foretoken.engine.scheduler import GROWTH_BLOCKS, Scheduler, share_chunk
from foretoken.errors import RequestError
from foretoken.models.cache import BLOCK_SIZE
from foretoken.planner.plan import Plan
from tests.engines import counting_model, greedy

MODEL = counting_model(context_limit=512)


def request(name, num_prompt_ids=4, num_new=8, *, prompt_ids=None, max_nodes=None):
    return Request(
        name,
        prompt_ids or [1] * num_prompt_ids,
        greedy(num_new),
        seed=0,
        drafters=(),
        info=MODEL.info,
        decode=None,
        max_nodes=max_nodes,
    )


def make(num_blocks=40, *, max_nodes=3, max_requests=8, prefill_chunk=100, **options):
    cache = MODEL.new_cache(num_blocks * BLOCK_SIZE)
    sizes = {"max_requests": max_requests, "prefill_chunk": prefill_chunk, **options}
    return cache, Scheduler(cache, Plan(max_nodes=max_nodes), **sizes)


def advance(scheduler):
    """Do what the engine does before and in a step; return the works."""
    scheduler.preempt()
    scheduler.admit()
    return scheduler.schedule()


def feed(cache, works):
    """Do what a step does to the cache: stage what is known and the largest draft, keep the first.

    A request that decodes takes a token.
    """
    for work in works:
        budget = work.budget
        num_drafted = 0 if budget is None or budget.is_empty else budget.max_nodes
        cache.stage(work.sequence, list(range(-1, work.num_known + num_drafted - 1)))
    for work in works:
        cache.commit([(work.sequence, range(work.num_known))])
        if work.budget is not None:
            work.request.token_ids.append(2)
    cache.check_integrity()


def names(works):
    return [work.request_id for work in works]


def shares(works):
    return [(work.request.request_id, work.num_known, work.budget is not None) for work in works]


def test_requests_are_admitted_in_order_up_to_the_limit():
    _, scheduler = make(max_requests=2)
    for name in "abc":
        scheduler.add(request(name))
    assert shares(advance(scheduler)) == [("a", 4, True), ("b", 4, True)]
    assert scheduler.num_unfinished == 3
    scheduler.remove("a")
    assert names(advance(scheduler)) == ["b", "c"]


# -- admission and preemption ----------------------------------------------------------------


def test_a_request_is_admitted_while_its_tokens_and_some_growth_fit():
    # Each has one block and may come to need five more; two of them are kept free for each.
    cache, scheduler = make(num_blocks=3 * (1 + GROWTH_BLOCKS))
    for name in "abcd":
        scheduler.add(request(name, num_new=80))
    assert names(advance(scheduler)) == ["a", "b", "c"]
    assert cache.num_free_blocks == cache.num_blocks  # reserved, not taken
    scheduler.remove("b")
    assert names(advance(scheduler)) == ["a", "c", "d"]


def test_nothing_is_kept_free_that_nobody_can_come_to_need():
    _, scheduler = make(num_blocks=4)
    for name in "abcde":
        scheduler.add(request(name, num_new=12))  # one block is all that each will ever fill
    assert names(advance(scheduler)) == ["a", "b", "c", "d"]
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 1)


def test_prompts_that_are_still_being_fed_have_their_blocks():
    _, scheduler = make(num_blocks=10, prefill_chunk=16)
    scheduler.add(request("a", num_prompt_ids=96, num_new=1))  # 7 blocks, one fed per step
    scheduler.add(request("b", num_prompt_ids=60, num_new=1))  # 4 more
    assert names(advance(scheduler)) == ["a"]
    scheduler.remove("a")
    assert names(advance(scheduler)) == ["b"]


def test_a_small_request_does_not_overtake_a_large_one():
    _, scheduler = make(num_blocks=6)
    scheduler.add(request("a", num_new=40))
    scheduler.add(request("large", num_prompt_ids=70, num_new=10))
    scheduler.add(request("small", num_new=1))
    assert names(advance(scheduler)) == ["a"]
    scheduler.remove("a")
    assert names(advance(scheduler)) == ["large", "small"]


def test_a_request_that_can_never_fit_is_refused():
    _, scheduler = make(num_blocks=2)
    scheduler.check(request("fits", num_new=28))
    with pytest.raises(RequestError, match="up to 48 positions of KV cache; there are 32") as info:
        scheduler.check(request("too large", num_new=29))
    assert "kv_cache_tokens" in info.value.hint


def test_context_limit_bounds_what_a_request_needs():
    _, scheduler = make(num_blocks=512 // BLOCK_SIZE)
    scheduler.check(request("all of it", num_new=10**9))


def test_drafts_shrink_before_anybody_is_thrown_back():
    cache, scheduler = make(num_blocks=6, max_nodes=50)
    for name in "ab":
        scheduler.add(request(name, num_prompt_ids=15, num_new=20))
    bounds = []
    for _ in range(20):
        works = advance(scheduler)
        bounds.append(tuple(work.budget.max_nodes for work in works))
        feed(cache, works)
    # Four blocks are left beside those of the prompts; a draft takes four, and both of them none.
    assert bounds[:3] == [(50, 1), (50, 0), (47, 15)]
    assert scheduler.num_running == 2


def test_the_request_admitted_last_goes_back_to_the_head_with_its_tokens():
    cache, scheduler = make(num_blocks=6, max_nodes=0)
    requests = [request(name, num_prompt_ids=15, num_new=60) for name in "ab"]
    for it in requests:
        scheduler.add(it)
    while True:
        preempted = scheduler.preempt()
        if preempted:
            break
        scheduler.admit()
        feed(cache, scheduler.schedule())
    scheduler.add(request("c"))
    [last] = preempted
    assert (last, last.stats.num_preemptions) == (requests[1], 1)
    assert len(requests[0].token_ids) == len(last.token_ids) == 49  # three blocks each
    assert cache.num_free_blocks == 3
    assert (scheduler.admit(), scheduler.num_waiting) == ([], 2)
    scheduler.remove("a")
    assert scheduler.admit()[0] is last
    [work, _] = scheduler.schedule()
    assert (work.start, work.num_known, work.budget is not None) == (0, 49, True)


def test_several_are_thrown_back_in_order():
    cache, scheduler = make(num_blocks=8, max_nodes=0)
    for name in "abcd":
        scheduler.add(request(name, num_prompt_ids=4, num_new=20))
    feed(cache, advance(scheduler))
    for _, work in zip(range(2), scheduler.schedule(), strict=False):
        work.request.token_ids += [3] * 60  # as no step would: more than one has to go
    assert [it.request_id for it in scheduler.preempt()] == ["d", "c", "b"]
    scheduler.remove("a")
    assert [it.request_id for it in scheduler.admit()] == ["b", "c", "d"]


def test_one_request_alone_is_never_thrown_back():
    cache, scheduler = make(num_blocks=3, max_nodes=30)
    scheduler.add(request("a", num_new=44))
    for _ in range(44):
        feed(cache, advance(scheduler))
        assert scheduler.num_running == 1
    assert cache.num_free_blocks == 0


def run_to_the_end(cache, scheduler):
    """Run all requests; return the number of steps and the rows that were fed."""
    num_steps = num_rows = 0
    while scheduler.num_unfinished:
        works = advance(scheduler)
        assert works
        num_steps += 1
        num_rows += sum(work.num_known for work in works)
        feed(cache, works)
        for work in works:
            if work.request.num_wanted == 0:
                scheduler.remove(work.request_id)
    return num_steps, num_rows


@pytest.mark.parametrize("seed", range(20))
def test_admission_does_not_thrash(seed):
    """Nobody is thrown back more often than the doubling of the room that he waits for allows."""
    rng = random.Random(seed)
    cache, scheduler = make(
        num_blocks=24, max_nodes=rng.choice([0, 3, 20]), max_requests=16, prefill_chunk=64
    )
    requests = [
        request(f"r{index}", rng.randint(1, 120), rng.randint(1, 200)) for index in range(40)
    ]
    for it in requests:
        scheduler.check(it)
        scheduler.add(it)
    _, num_rows = run_to_the_end(cache, scheduler)
    counts = [it.stats.num_preemptions for it in requests]
    assert max(counts) <= 4  # 2 blocks, 4, 8, 16: then it waits for all that the others may need
    assert sum(counts) > 0
    # Being fed again costs less than what was there to be fed.
    assert num_rows < 2 * sum(len(it.token_ids) for it in requests)
    assert cache.num_free_blocks == cache.num_blocks


def test_a_request_that_was_just_admitted_takes_a_token_before_it_is_thrown_back():
    cache, scheduler = make(num_blocks=12, max_nodes=0, max_requests=16, prefill_chunk=16)
    for index in range(12):
        scheduler.add(request(f"r{index}", num_prompt_ids=8, num_new=100))
    length_at = {}
    while scheduler.num_unfinished:
        for it in scheduler.preempt():
            assert len(it.token_ids) > length_at[it.request_id]
        length_at |= {it.request_id: len(it.token_ids) for it in scheduler.admit()}
        works = scheduler.schedule()
        feed(cache, works)
        for work in works:
            if work.request.num_wanted == 0:
                scheduler.remove(work.request_id)


# -- prompts ---------------------------------------------------------------------------------


def test_half_of_the_chunk_is_for_the_oldest_prompt_and_the_rest_for_the_shortest():
    cache, scheduler = make(prefill_chunk=10)
    for name, size in (("a", 9), ("b", 30), ("c", 3)):
        scheduler.add(request(name, num_prompt_ids=size))
    works = advance(scheduler)
    # Five for the oldest; what is left is for `c`, whose rest is the shortest, then `a` again.
    assert shares(works) == [("a", 7, False), ("c", 3, True)]
    feed(cache, works)
    works = advance(scheduler)
    # `c` decodes now; decoding takes nothing from the chunk and comes first.
    assert shares(works) == [("c", 1, True), ("a", 2, True), ("b", 8, False)]


@pytest.mark.parametrize(
    ("num_unseen", "chunk", "expected"),
    [
        ([], 10, []),
        ([3], 10, [3]),
        ([30], 10, [10]),
        ([30, 2], 10, [8, 2]),
        ([30, 20, 4], 10, [5, 1, 4]),
        ([4, 4, 4], 6, [4, 2, 0]),  # prompts of one length one after the other
        ([2, 50, 40], 10, [2, 0, 8]),
        ([9, 1], 1, [1, 0]),
    ],
)
def test_shares_of_a_chunk(num_unseen, chunk, expected):
    assert share_chunk(num_unseen, chunk) == expected


def test_no_chunk_is_wasted_and_no_prompt_is_overfed():
    rng = random.Random(1)
    for _ in range(300):
        num_unseen = [rng.randint(1, 60) for _ in range(rng.randint(1, 8))]
        chunk = rng.randint(1, 100)
        fed = share_chunk(num_unseen, chunk)
        assert sum(fed) == min(chunk, sum(num_unseen))
        assert all(0 <= it <= most for it, most in zip(fed, num_unseen, strict=True))
        assert fed[0] >= min(num_unseen[0], chunk // 2)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    cache, scheduler = make(num_blocks=40, prefill_chunk=16)
    scheduler.add(request("long", num_prompt_ids=400))
    feed(cache, advance(scheduler))
    scheduler.add(request("short", num_prompt_ids=20))
    fed = []
    for _ in range(3):
        works = advance(scheduler)
        feed(cache, works)
        fed += [work.num_known for work in works if work.request_id == "short"]
    assert fed == [8, 8, 4]


def test_a_long_prompt_goes_on_however_many_short_ones_come():
    cache, scheduler = make(num_blocks=60, prefill_chunk=16)
    scheduler.add(request("long", num_prompt_ids=160))
    num_steps = 0
    while True:
        scheduler.add(request(f"short-{num_steps}", num_prompt_ids=16, num_new=1))
        works = advance(scheduler)
        feed(cache, works)
        num_steps += 1
        for work in works:
            if work.request.num_wanted == 0:
                scheduler.remove(work.request_id)
        if any(work.request_id == "long" and work.budget is not None for work in works):
            break
    assert num_steps <= 160 // 8


def test_prompts_that_are_fed_while_others_decode_have_a_smaller_chunk():
    cache, scheduler = make(prefill_chunk=100, mixed_chunk=6)
    scheduler.add(request("a", num_prompt_ids=50))
    works = advance(scheduler)
    assert shares(works) == [("a", 50, True)]  # nobody waits for it
    feed(cache, works)
    scheduler.add(request("b", num_prompt_ids=40))
    for _ in range(2):
        works = advance(scheduler)
        assert shares(works) == [("a", 1, True), ("b", 6, False)]
        feed(cache, works)
    scheduler.remove("a")
    assert shares(advance(scheduler)) == [("b", 28, True)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_a_prompt_is_fed_once_whatever_the_chunk(chunk):
    cache, scheduler = make(prefill_chunk=chunk)
    scheduler.add(request("a", num_prompt_ids=11))
    fed, is_last = [], False
    while not is_last:
        [work] = advance(scheduler)
        feed(cache, [work])
        fed.append(work.num_known)
        is_last = work.budget is not None
    assert sum(fed) == 11
    assert max(fed) <= chunk
    assert len(fed) == -(-11 // chunk)


# -- drafts ----------------------------------------------------------------------------------


def test_budget_follows_what_the_request_still_wants():
    cache, scheduler = make(max_nodes=3)
    scheduler.add(request("a", num_new=3))
    depths = []
    for _ in range(3):
        works = advance(scheduler)
        depths.append(works[0].budget.max_depth)
        assert works[0].budget.max_nodes == 3
        feed(cache, works)
    assert depths == [2, 1, 0]


@pytest.mark.parametrize(("own", "expected"), [(None, 5), (0, 0), (2, 2), (9, 5)])
def test_a_request_may_want_smaller_drafts_than_the_plan(own, expected):
    _, scheduler = make(max_nodes=5)
    scheduler.add(request("a", num_new=40, max_nodes=own))
    assert [work.budget.max_nodes for work in advance(scheduler)] == [expected]


# -- leaving ---------------------------------------------------------------------------------


def test_removed_requests_free_their_blocks():
    cache, scheduler = make(num_blocks=3)
    scheduler.add(request("a", num_new=40))
    scheduler.add(request("b", num_new=40))
    feed(cache, advance(scheduler))
    assert cache.num_free_blocks < 3
    scheduler.remove("a")
    assert cache.num_free_blocks == 3
    scheduler.remove("unknown")
    assert shares(advance(scheduler)) == [("b", 4, True)]
    scheduler.remove("b")
    assert (scheduler.num_unfinished, advance(scheduler), cache.num_sequences) == (0, [], 0)


def test_a_waiting_request_can_be_removed():
    _, scheduler = make(max_requests=1)
    for name in "abc":
        scheduler.add(request(name))
    advance(scheduler)
    scheduler.remove("b")
    scheduler.remove("a")
    assert names(advance(scheduler)) == ["c"]


# -- shared prefixes -------------------------------------------------------------------------


def test_a_prefix_that_others_have_had_is_not_fed_again():
    cache, scheduler = make(prefix_caching=True)
    text = list(range(20)) * 2
    first, second = request("a", prompt_ids=text), request("b", prompt_ids=[*text[:35], 1, 1])
    scheduler.add(first)
    feed(cache, advance(scheduler))
    scheduler.add(second)
    works = advance(scheduler)
    assert [(work.start, work.num_known) for work in works] == [(40, 1), (32, 5)]
    assert first.stats.num_cached_prompt_tokens == 0
    assert second.stats.num_cached_prompt_tokens == 32
    feed(cache, works)
    for name in "ab":
        scheduler.remove(name)
    assert cache.num_free_blocks == cache.num_blocks
    cache.check_integrity()


def test_prompts_that_wait_to_be_fed_take_over_what_comes_to_be_known():
    cache, scheduler = make(prefix_caching=True, prefill_chunk=40)
    text = list(range(20)) * 2
    requests = [request(name, prompt_ids=[*text, index]) for index, name in enumerate("abc")]
    for it in requests:
        scheduler.add(it)
    num_fed = 0
    while any(len(it.token_ids) == 41 for it in requests):
        works = advance(scheduler)
        num_fed += sum(work.num_known for work in works)
        feed(cache, works)
    assert [it.stats.num_cached_prompt_tokens for it in requests] == [0, 32, 32]
    assert num_fed < 3 * 41 - 2 * 30


def test_requests_that_begin_alike_are_admitted_together_where_their_blocks_are_one():
    text = list(range(96))
    admitted = {}
    for prefix_caching in (False, True):
        cache, scheduler = make(num_blocks=14, prefix_caching=prefix_caching)
        for name in "abc":
            scheduler.add(request(name, prompt_ids=[*text, 1], num_new=2))
        for _ in range(3):
            feed(cache, advance(scheduler))
        admitted[prefix_caching] = scheduler.num_running
    assert admitted == {False: 2, True: 3}


def test_what_a_preempted_request_had_is_found_again():
    cache, scheduler = make(num_blocks=6, max_nodes=0, prefix_caching=True)
    for index, name in enumerate("ab"):
        scheduler.add(request(name, prompt_ids=[index] * 15, num_new=60))
    while not (preempted := scheduler.preempt()):
        scheduler.admit()
        feed(cache, scheduler.schedule())
    scheduler.remove("a")
    assert scheduler.admit() == preempted
    [work] = scheduler.schedule()
    assert (work.start, work.num_known) == (48, 1)


@pytest.mark.parametrize(("num_prompt_ids", "num_blocks"), [(14, 0), (31, 2), (40, 2), (47, 3)])
def test_of_a_draft_that_went_on_behind_the_end_the_output_is_shared(num_prompt_ids, num_blocks):
    cache, scheduler = make(prefix_caching=True)
    it = request("a", prompt_ids=list(range(num_prompt_ids)), num_new=30)
    scheduler.add(it)
    [work] = advance(scheduler)
    cache.stage(work.sequence, list(range(-1, num_prompt_ids + 10)))
    cache.commit([(work.sequence, range(num_prompt_ids + 11))])
    it.token_ids.append(5)  # and no more: the output ended in the middle of the draft
    scheduler.remove("a")
    assert cache.num_cached_blocks == num_blocks
    assert cache.num_free_blocks == cache.num_blocks
    cache.check_integrity()
