"""What drafters learn of the target's hidden states: those of every token that stands, once."""

import pytest
import torch

from foretoken.drafters.base import DrafterNeeds
from foretoken.engine import scheduler
from foretoken.models.batch import Segment
from tests.engines import (
    OracleDrafter,
    check_idle,
    finish,
    greedy,
    make_engine,
    micro_model,
    plain_ids,
    sampled,
)

NUM_LAYERS = 2
LAYERS = (0, 1, NUM_LAYERS)


class Watcher(OracleDrafter):
    """Keeps the states that it is told, and notes in which order it is told what."""

    def __init__(self, truths, vocab_size, layers=LAYERS):
        super().__init__(truths, vocab_size)
        self.needs = DrafterNeeds(hidden_layers=layers, draft_cache=False)
        self.told = {}
        self.first = {}
        self.calls = []

    def observe(self, standing):
        for it in standing:
            if it.start == 0:  # new, or thrown back
                self.told[it.request_id] = {}
            told = self.told.setdefault(it.request_id, {})
            first = self.first.setdefault(it.request_id, it.start)
            if it.start != first + len(told):
                raise AssertionError(f"told of {it.start} after {first + len(told)}")
            if set(it.hidden) != set(self.needs.hidden_layers):
                raise AssertionError(f"told of layers {set(it.hidden)}")
            for index in range(len(it.hidden[self.needs.hidden_layers[0]])):
                told[it.start + index] = {
                    layer: states[index] for layer, states in it.hidden.items()
                }
        self.calls.append("observe")

    def commit(self, outcomes):
        super().commit(outcomes)
        self.calls.append("commit")


def states_of(target, token_ids):
    """Return the states of a text from one pass of its own."""
    cache = target.new_cache(len(token_ids) + 16)
    segment = Segment(cache.open(), token_ids, range(-1, len(token_ids) - 1))
    return target.forward(target.batch(cache, [segment]), [], hidden_layers=LAYERS).hidden


def prompts_and_params():
    return [
        ([3, 1, 4, 1, 5], greedy(20)),
        (list(range(40)), sampled(12, seed=1)),
        ([*range(34), 7, 7], greedy(9)),
    ]


def watched(target, *, max_nodes=6, **sizes):
    requests = prompts_and_params()
    truths = [[*ids, *plain_ids(target, ids, params)] for ids, params in requests]
    watcher = Watcher(truths, target.info.vocab_size)
    engine = make_engine(target, {"watcher": watcher}, max_nodes=max_nodes, **sizes)
    made = [engine.add_request(*it) for it in requests]
    finish(engine)
    check_idle(engine)
    return watcher, made


def check_told(watcher, target, request, first=0):
    text = list(request.token_ids)
    told = watcher.told[request.request_id]
    # All tokens but the last one, which was never fed; what ended it may have stood behind others.
    assert sorted(told)[: len(text) - 1 - first] == list(range(first, len(text) - 1))
    expected = states_of(target, text)
    for position in range(first, len(text) - 1):
        for layer in LAYERS:
            torch.testing.assert_close(told[position][layer], expected[layer][position])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_nodes", [0, 6])
def test_every_token_that_stands_is_told_of(family, max_nodes):
    target = micro_model(family)
    watcher, requests = watched(
        target, max_nodes=max_nodes, prefill_chunk=16, mixed_chunk=8, prefix_caching=False
    )
    for request in requests:
        check_told(watcher, target, request)
    assert any(request.stats.num_accepted for request in requests) == (max_nodes > 0)


def test_states_come_before_verdicts():
    watcher, _ = watched(micro_model("llama"))
    assert watcher.calls[0] == "observe"
    assert watcher.calls.count("commit") > 5
    for before, call in zip(watcher.calls, watcher.calls[1:], strict=False):
        assert call == "observe" or before == "observe"


def test_tokens_of_the_prefix_cache_are_not_told_of():
    target = micro_model("llama")
    watcher, requests = watched(target, max_requests=1, prefix_caching=True)
    last = requests[-1]
    assert last.stats.num_cached_prompt_tokens == 32
    check_told(watcher, target, last, first=32)


def test_a_request_thrown_back_is_told_of_again(monkeypatch):
    monkeypatch.setattr(scheduler, "GROWTH_BLOCKS", 0)
    target = micro_model("llama")
    watcher, requests = watched(
        target, kv_tokens=5 * 16, max_requests=3, prefix_caching=False, prefill_chunk=24
    )
    assert sum(request.stats.num_preemptions for request in requests)
    for request in requests:
        check_told(watcher, target, request)


def test_nobody_who_asks_for_nothing_is_told():
    target = micro_model("llama")
    requests = prompts_and_params()
    watcher = Watcher([], target.info.vocab_size, layers=())
    engine = make_engine(target, {"watcher": watcher})
    for it in requests:
        engine.add_request(*it)
    finish(engine)
    assert "observe" not in watcher.calls
