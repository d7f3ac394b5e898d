"""A long run ends as small as it began."""

import gc
import sys
from itertools import pairwise

from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from tests.engines import (
    check_books,
    check_idle,
    greedy,
    make_draft_model,
    make_engine,
    random_table,
    sampled,
)

NUM_REQUESTS = 2000
WINDOW = 100


def serve(engine, first, last):
    """Serve requests of many kinds, some of them aborted; keep nothing."""
    number = first
    while number < last or engine.num_unfinished:
        for _ in range(8):
            if number < last:
                prompt_ids = [(number + step) % 9 for step in range(1 + number % 23)]
                is_greedy = number % 2
                values = (
                    {"max_new_tokens": 1 + number % 4} if number % 5 else {"max_new_tokens": 40}
                )
                num_tokens = values["max_new_tokens"]
                params = greedy(num_tokens) if is_greedy else sampled(num_tokens, seed=number)
                engine.add_request(prompt_ids, params, request_id=f"r{number}")
                if number % 5 == 0:  # it would go on for long
                    engine.step()
                    engine.abort(f"r{number}")
                number += 1
        engine.step()
        check_books(engine)


def test_two_thousand_requests_leave_nothing_behind():
    target = random_table(12, spread=1.5)
    drafters = {
        "prompt-lookup": PromptLookupDrafter(PromptLookupOptions(max_depth=3)),
        "draft-model": make_draft_model(target, random_table(12), max_depth=2, width=2),
    }
    engine = make_engine(target, drafters, max_nodes=4, max_requests=24, kv_tokens=3000)
    counts = []
    for first in range(0, NUM_REQUESTS, WINDOW):
        serve(engine, first, first + WINDOW)
        check_idle(engine)
        gc.collect()
        counts.append((sys.getallocatedblocks(), len(gc.get_objects())))
    assert engine._requests == {}
    # What one request in ten leaves behind shows in each of the windows; the caches of the
    # interpreter, of torch and of earlier tests grow in some of them and then no more.
    for kind in zip(*counts, strict=True):
        growth = [after - before for before, after in pairwise(kind)]
        assert min(growth) < WINDOW / 10, growth
