"""The drafter `lookahead`: its window in the tree, its Jacobi iteration and its n-grams."""

import random

import numpy as np
import pytest

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.lookahead import LookaheadDrafter, LookaheadOptions, NgramPool
from foretoken.errors import ConfigError
from tests.engines import (
    ScriptedDrafter,
    check_idle,
    counting_model,
    finish,
    greedy,
    make_engine,
    make_host,
    micro_model,
    outcome_of,
    plain_ids,
    random_table,
    sampled,
)

SAMPLER = Sampler(SamplingParams(), 0, 1)


def drafter_of(**options):
    drafter = LookaheadDrafter.create(LookaheadOptions(**options), make_host(counting_model()))
    drafter.start(RequestView(request_id="r", prompt_ids=[0]))
    return drafter


def search_of(drafter):
    return drafter._searches["r"]


def pool_of(drafter):
    rests = search_of(drafter).pool._rests
    return {(first, *rest) for first, some in rests.items() for rest in some}


def propose(drafter, token_ids, max_nodes=40, max_depth=40, max_width=None):
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_depth, max_width=max_width)
    context = DraftContext(request_id="r", token_ids=token_ids, sampler=SAMPLER, budget=budget)
    [draft] = drafter.propose([context])
    return draft


def sequences(draft):
    return {sequence[1:] for sequence in draft.tree.sequences if len(sequence) > 1}


def score(drafter, draft, follower, path=()):
    """Tell a drafter what a target says whose next token depends on the last one alone."""
    top_ids = [[follower(token_id)] for token_id in draft.tree.token_ids]
    node = path[-1] if path else 0
    token_ids = (*(draft.tree.token_ids[step] for step in path), top_ids[node][0])
    verdict = Verdict(tuple(path), token_ids, FinalKind.BONUS)
    drafter.commit([outcome_of(verdict, draft=draft, top_ids=np.array(top_ids))])
    return list(token_ids)


def set_columns(drafter, columns, ngram):
    search = search_of(drafter)
    search.columns, search.ngram = [list(column) for column in columns], ngram


# -- the window ------------------------------------------------------------------------------


def test_first_guesses_are_a_chain_of_tokens_of_the_text():
    text = [3, 1, 4, 1, 5]
    draft = propose(drafter_of(window=4), text)
    assert draft.tree.is_chain
    assert len(draft.tree) == 4
    assert set(draft.tree.token_ids) <= set(text)


def test_a_guess_attends_to_the_first_guesses_before_it_and_to_its_own_column():
    drafter = drafter_of(window=3, ngram=4)
    set_columns(drafter, [[0, 11, 12], [20, 21, 22], [30, 31, 32]], 4)
    draft = propose(drafter, [9])
    assert sequences(draft) == {
        (11,), (11, 12),
        (20,), (20, 21), (20, 21, 22),
        (20, 30), (20, 30, 31), (20, 30, 31, 32),
    }  # fmt: skip
    assert {draft.tree.sequence(node)[1:] for node in draft.scouts} == {
        (11, 12),
        (20, 21, 22),
        (20, 30, 31, 32),
    }


def test_levels_fill_up_and_then_every_column_gives_an_ngram():
    drafter, text = drafter_of(window=3, ngram=3), [50]
    set_columns(drafter, [[50], [10], [20]], 3)
    draft = propose(drafter, text)
    assert sequences(draft) == {(10,), (10, 20)}
    text += score(drafter, draft, lambda token_id: token_id + 1)
    assert text == [50, 51]
    assert pool_of(drafter) == set()  # two tokens make no trigram yet
    # What stood one place behind the root is the root's column now, and says what comes after it.
    assert search_of(drafter).columns == [[10, 11], [20, 21]]
    draft = propose(drafter, text)
    assert {(11,), (20,), (20, 21)} <= sequences(draft)
    text += score(drafter, draft, lambda token_id: token_id + 1)
    assert {(51, 11, 12), (20, 21, 22)} <= pool_of(drafter)
    assert search_of(drafter).columns[:2] == [[11, 12], [21, 22]]


@pytest.mark.parametrize("num_accepted", [0, 1, 2, 3, 4])
def test_the_window_moves_on_with_the_output(num_accepted):
    """Column i stands i places behind the root, so the output passes those that it reaches."""
    drafter = drafter_of(window=4, ngram=3)
    columns = [[0, 11], [20, 21], [30, 31], [40, 41]]
    set_columns(drafter, columns, 3)
    draft = propose(drafter, [9])
    top_ids = np.array([[60 + node] for node in range(len(draft.tree))])
    nexts = [top_ids[draft.tree.match(path)[-1], 0] for path in ([11], [20, 21], [20, 30, 31])]
    nexts.append(top_ids[draft.tree.match([20, 30, 40, 41])[-1], 0])
    path = tuple(range(1, num_accepted + 1))
    verdict = Verdict(path, (*path, 5), FinalKind.RECOVERED)
    drafter.commit([outcome_of(verdict, draft=draft, top_ids=top_ids)])
    expected = [[column[1], next_id] for column, next_id in zip(columns, nexts, strict=True)]
    assert search_of(drafter).columns == expected[num_accepted:]


def test_a_window_that_was_cut_goes_on_up_to_the_cut():
    drafter = drafter_of(window=3, ngram=3)
    set_columns(drafter, [[0, 11], [20, 21], [30, 31]], 3)
    draft = propose(drafter, [9])
    kept = [node for node in range(len(draft.tree)) if draft.tree.token_ids[node] != 31]
    cut = Draft.from_drafter("lookahead", draft.tree.keep(kept))
    score(drafter, cut, lambda token_id: token_id + 50)
    assert search_of(drafter).columns == [[11, 61], [21, 71]]
    assert pool_of(drafter) == {(9, 11, 61), (20, 21, 71)}


def test_steps_that_did_not_score_the_window_move_it():
    drafter = drafter_of(window=3, ngram=3)
    set_columns(drafter, [[0, 11], [20, 21], [30, 31]], 3)
    drafter.commit([outcome_of(Verdict((), (5,), FinalKind.RECOVERED))])
    assert search_of(drafter).columns == [[20, 21], [30, 31]]
    # A draft that the step then did without must not count for a later one.
    propose(drafter, [9])
    rows = np.array([[1], [2]])
    plain = Draft.from_drafter("other", TokenTree.chain([9, 8]))
    drafter.commit([outcome_of(Verdict((), (5,), FinalKind.BONUS), draft=plain, top_ids=rows)])
    assert search_of(drafter).columns == [[30, 31]]
    assert pool_of(drafter) == set()


def test_rows_are_found_in_the_tree_of_all_drafters():
    target = counting_model()
    lookahead = LookaheadDrafter.create(LookaheadOptions(ngram=3), make_host(target))
    other = ScriptedDrafter(lambda context: [7, (context.token_ids[-1] + 2) % 26, 9])
    engine = make_engine(target, {"other": other, "lookahead": lookahead}, max_nodes=20)
    request = engine.add_request([3, 9, 20], greedy(40))
    for _ in range(6):
        engine.step()
    ngrams = {
        (first, *rest)
        for first, rests in lookahead._searches[request.request_id].pool._rests.items()
        for rest in rests
    }
    # A model whose next token depends on the last alone gives true n-grams from the first on.
    true = {ngram for ngram in ngrams if (ngram[1] + 1) % 26 == ngram[2]}
    assert len(true) >= 6
    assert true == ngrams
    engine.close()


# -- n-grams ---------------------------------------------------------------------------------


def test_ngrams_of_the_pending_token_are_drafted_the_newest_first():
    drafter = drafter_of(window=1, ngram=3)
    for ngram in ([5, 1, 2], [6, 7, 8], [5, 3, 4], [5, 1, 9]):
        search_of(drafter).pool.add(ngram)
    assert sequences(propose(drafter, [5])) == {(1,), (1, 9), (1, 2), (3,), (3, 4)}
    assert sequences(propose(drafter, [5], max_nodes=4)) == {(1,), (1, 9), (3,), (3, 4)}
    assert sequences(propose(drafter, [5], max_depth=1)) == {(1,), (3,)}
    assert sequences(propose(drafter, [5], max_width=1)) == {(1,), (1, 9)}


def test_the_pool_keeps_the_latest():
    pool = NgramPool(2)
    for rest in ([1], [2], [1], [3]):
        pool.add([0, *rest])
    assert pool.after(0) == [(3,), (1,)]
    for first in range(1, 5000):
        pool.add([first, 0])
    assert pool.after(0) == []
    assert pool.after(4999) == [(0,)]
    assert len(pool._rests) == 4096


def test_ngrams_and_columns_share_a_small_budget():
    drafter = drafter_of(ngram=3)
    set_columns(drafter, [[0, 11], [20, 21], [30, 31], [40, 41]], 3)
    for rest in ([1, 2], [3, 4], [5, 6]):
        search_of(drafter).pool.add([9, *rest])
    draft = propose(drafter, [9], max_nodes=8)
    assert sequences(draft) == {(5,), (5, 6), (11,), (3,), (3, 4), (20,), (20, 21)}
    # Without n-grams the window has all of it.
    assert len(propose(drafter, [8], max_nodes=8).scouts) == 4


@pytest.mark.parametrize(("max_nodes", "ngram"), [(4, 2), (15, 2), (16, 3), (32, 3)])
def test_small_budgets_make_bigrams(max_nodes, ngram):
    drafter = drafter_of()
    propose(drafter, [1, 2, 3], max_nodes=max_nodes)
    assert search_of(drafter).ngram == ngram
    propose(drafter, [1, 2, 3], max_nodes=40)
    assert search_of(drafter).ngram == ngram  # for as long as the request runs


# -- through the engine ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ngram": 4, "window": 5}, {"ngram": 2, "window": 1}])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_tokens_are_those_of_plain_decoding(options, kind):
    target = micro_model()
    params = greedy(40) if kind == "greedy" else sampled(40, seed=2, temperature=0.7)
    prompts = [[1, 2, 3], [4], [5, 5, 5, 5]]
    drafter = LookaheadDrafter.create(LookaheadOptions(**options), make_host(target))
    engine = make_engine(target, {"it": drafter}, max_nodes=20)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, params)
    check_idle(engine)


def test_steps_become_fewer_once_ngrams_are_known():
    target = random_table(12, seed=1)
    prompt = [random.Random(0).randrange(12) for _ in range(8)]
    drafter = LookaheadDrafter.create(LookaheadOptions(), make_host(target))
    engine = make_engine(target, {"it": drafter}, max_nodes=20)
    request = engine.add_request(prompt, greedy(60))
    finish(engine)
    assert request.output_ids == plain_ids(target, prompt, greedy(60))
    assert request.stats.num_steps < 40


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, "lookahead:window is from 1 to 64; got 0"),
        ({"ngram": 1}, "lookahead:ngram is from 2 to 64; got 1"),
        ({"candidates": 65}, "lookahead:candidates is from 1 to 64; got 65"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LookaheadOptions(**values)
