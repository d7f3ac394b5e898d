"""Cascade: the draft is the models' own, whatever is guessed; guesses save passes."""

import random
from dataclasses import replace

import pytest
import torch

from foretoken.core.draft import SiblingDraw
from foretoken.core.options import ComponentSpec
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import prepare_drafter
from foretoken.drafters.base import RequestView
from foretoken.drafters.cascade import CascadeDrafter
from foretoken.drafters.cascade_stage import CascadeStage, StageOptions
from foretoken.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.drafters.suffix import SuffixDrafter, SuffixOptions
from foretoken.errors import ConfigError, UnknownNameError
from tests.drafters.test_merged import context_of
from tests.drafters.test_tail import ScriptedFollower
from tests.engines import (
    TableModel,
    check_idle,
    counting_model,
    draft_caches,
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

VOCAB_SIZE = 20


def options_of(**values):
    return DraftModelOptions(path="unused", **values)


def make_cascade(target, stages, guessers=(), max_guess=4):
    """Return a cascade over models that are built already, each with its options."""
    models = tuple(options for _, options in stages)
    host = make_host(target)
    built = {
        f"m{index}": CascadeStage(model, StageOptions.of(models, index), host)
        for index, (model, _) in enumerate(stages)
    }
    guessers = {f"g{index}": it for index, it in enumerate(guessers)}
    return CascadeDrafter(built, guessers, max_guess)


def lookup():
    return PromptLookupDrafter(PromptLookupOptions(max_ngram=1))


def started(drafter, text, request_id="r"):
    drafter.start(RequestView(request_id=request_id, prompt_ids=list(text)))
    return drafter


def assert_same(draft, expected):
    assert draft.tree.token_ids == expected.tree.token_ids
    assert draft.tree.parents == expected.tree.parents
    assert draft.siblings is expected.siblings
    assert draft.draft_logprobs == pytest.approx(expected.draft_logprobs, rel=1e-9, abs=1e-9)
    assert {node: [group.nodes for group in groups] for node, groups in draft.draws.items()} == {
        node: [group.nodes for group in groups] for node, groups in expected.draws.items()
    }


# -- guesses ---------------------------------------------------------------------------------

GUESSERS = {
    "copies": lookup,
    "counts": lambda: SuffixDrafter(SuffixOptions(max_tokens=0)),
    "noise": lambda: ScriptedFollower(lambda last: [(last * 7 + step) % 20 for step in range(4)]),
}
GROWTHS = {
    "chain": {"expansion": (1,) * 6},
    "static": {"expansion": (2, 1, 2, 1)},
    "best first": {"width": 3, "min_gain": 0.0, "max_depth": 5},
    "small": {"width": 2, "max_nodes": 3},
}


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("guesser", GUESSERS)
@pytest.mark.parametrize(
    "way", [None, *SiblingDraw], ids=lambda way: way.value if way else "greedy"
)
def test_the_draft_is_that_of_the_model_alone_in_no_more_passes(way, guesser, growth):
    """Over many steps, with commits that take all, some and nothing of a draft."""
    target, params = random_table(seed=1), greedy(99)
    if way is not None:
        params = sampled(99, seed=3, temperature=0.7)
    table, own_table = random_table(seed=1), random_table(seed=1)
    options = options_of(**GROWTHS[growth])
    alone = started(DraftModelDrafter(table, options, make_host(target)), [3, 1])
    cascade = make_cascade(target, [(own_table, options)], [GUESSERS[guesser]()])
    started(cascade, [3, 1])
    text, rng = [3, 1], random.Random(4)
    for _ in range(12):
        context = context_of(text, params, siblings=way, max_nodes=7)
        [expected], [draft] = alone.propose([context]), cascade.propose([context])
        assert_same(draft, expected)
        path = draft.tree.path(rng.randrange(len(draft.tree)))[1:]
        tokens = [*(draft.tree.token_ids[node] for node in path), rng.randrange(VOCAB_SIZE)]
        outcome = outcome_of(Verdict(tuple(path), tuple(tokens), FinalKind.RECOVERED))
        for drafter in (alone, cascade):
            drafter.commit([outcome])
        text += tokens
    assert own_table.num_passes <= table.num_passes
    for cache in draft_caches(cascade):
        cache.check_integrity()


def test_levels_that_were_guessed_need_no_pass():
    model = counting_model()
    text = [*range(12), 0]  # after 0 came 1, 2, 3, ...
    options = options_of(expansion=(1,) * 7)
    for guessers, max_guess, rows in (
        ([], 4, [13, 1, 1, 1, 1, 1, 1]),  # a pass per level
        ([lookup()], 6, [19]),  # the root's pass has all
        ([lookup()], 2, [15, 3, 1]),  # three levels at a time
        ([ScriptedFollower(lambda last: [9])], 4, [14, 2, 2, 2, 2, 2, 1]),  # wrong: rows, no more
    ):
        model.rows_per_pass.clear()
        drafter = started(make_cascade(model, [(model, options)], guessers, max_guess), text)
        [draft] = drafter.propose([context_of(text, max_nodes=7)])
        assert draft.tree == TokenTree.chain(range(8))
        assert set(draft.source[1:]) == {"m0"}
        assert model.rows_per_pass == rows


def test_guessed_rows_that_came_true_stay_in_the_cache():
    model = counting_model()
    text = [*range(12), 0]
    options = options_of(expansion=(1,) * 7)
    drafter = started(make_cascade(model, [(model, options)], [lookup()], 6), text)
    drafter.propose([context_of(text, max_nodes=7)])
    verdict = Verdict((1, 2, 3, 4), (1, 2, 3, 4, 9), FinalKind.RECOVERED)
    drafter.commit([outcome_of(verdict)])
    [(_, stage)] = drafter.members[:1]
    assert stage._states["r"].sequence.num_cached == len(text) + 4
    model.rows_per_pass.clear()
    text += verdict.token_ids
    drafter.propose([context_of(text, max_nodes=7)])
    assert model.rows_per_pass[0] == 1 + 6  # the new root and the guesses below it


def test_requests_that_know_their_rows_do_not_wait_for_others_passes():
    """One is all guessed, the other not at all: as many passes as the other needs alone."""
    model = counting_model()
    texts = {"known": [*range(12), 0], "new": [7]}
    options = options_of(expansion=(1,) * 4)
    drafter = make_cascade(model, [(model, options)], [lookup()], 6)
    contexts = []
    for request_id, text in texts.items():
        started(drafter, text, request_id)
        contexts.append(replace(context_of(text), request_id=request_id))
    drafts = drafter.propose(contexts)
    assert [draft.tree for draft in drafts] == [
        TokenTree.chain(range(5)),
        TokenTree.chain(range(7, 12)),
    ]
    assert model.rows_per_pass == [13 + 3 + 1, 1, 1, 1]


def test_a_pass_that_fails_leaves_the_next_draft_whole():
    model = random_table(seed=2)
    options = options_of(width=2, max_depth=4)
    drafter = started(make_cascade(model, [(model, options)], [lookup()]), [1, 2, 1])
    context = context_of([1, 2, 1])
    model.fail_next = True
    with pytest.raises(RuntimeError, match="fell off"):
        drafter.propose([context])
    alone = started(DraftModelDrafter(model, options, make_host(model)), [1, 2, 1])
    assert_same(drafter.propose([context])[0], alone.propose([context])[0])


# -- several models --------------------------------------------------------------------------


def shifting_model(shift):
    """Return a model that adds a number to the last token."""
    table = torch.zeros(26, 26, dtype=torch.float64)
    for token_id in range(26):
        table[token_id, (token_id + shift) % 26] = 50.0
    return TableModel(table)


@pytest.mark.parametrize("growth", ["expansion", "best first"])
def test_each_model_drafts_its_levels_below_those_before_it(growth):
    def levels(count):
        if growth == "expansion":
            return options_of(expansion=(1,) * count)
        return options_of(max_depth=count, width=1)

    models = [shifting_model(1), shifting_model(5), shifting_model(2)]
    stages = list(zip(models, map(levels, (2, 3, 1)), strict=True))
    drafter = started(make_cascade(models[0], stages), [4, 3])
    [draft] = drafter.propose([context_of([4, 3], max_nodes=6)])
    assert draft.tree == TokenTree.chain([3, 4, 5, 10, 15, 20, 22])
    assert draft.source == ("", "m0", "m0", "m1", "m1", "m1", "m2")
    # A model that comes later is first fed what stands and the levels before its own.
    assert [model.rows_per_pass for model in models] == [[2, 1], [2 + 2, 1, 1], [2 + 5]]


def test_a_later_model_catches_up_with_the_steps_that_it_missed():
    models = [random_table(seed=1), random_table(seed=2)]
    stages = [(models[0], options_of(max_depth=1)), (models[1], options_of(max_depth=3))]
    cascade = started(make_cascade(models[0], stages, [lookup()]), [3])
    text, rng = [3], random.Random(1)
    for step in range(8):
        bounds = {"max_depth": 1 if step % 3 else 4}  # the second often has nothing to do
        [draft] = cascade.propose([context_of(text, **bounds)])
        fresh = started(make_cascade(models[0], stages), text, "r")
        assert_same(draft, fresh.propose([context_of(text, **bounds)])[0])
        path = draft.tree.path(rng.randrange(len(draft.tree)))[1:]
        tokens = [*(draft.tree.token_ids[node] for node in path), rng.randrange(VOCAB_SIZE)]
        cascade.commit([outcome_of(Verdict(tuple(path), tuple(tokens), FinalKind.RECOVERED))])
        text += tokens


def test_one_model_in_two_stages_drafts_what_it_does_in_one():
    model = random_table(seed=5, spread=0.7)
    whole = options_of(width=3, max_depth=5, min_gain=0.2)
    halves = [options_of(width=3, max_depth=count, min_gain=0.2) for count in (2, 3)]
    for params in (greedy(9), sampled(9, seed=8)):
        context = context_of([1, 2], params)
        alone = started(DraftModelDrafter(model, whole, make_host(model)), [1, 2])
        cascade = started(make_cascade(model, [(model, it) for it in halves]), [1, 2])
        assert_same(cascade.propose([context])[0], alone.propose([context])[0])


def test_the_second_model_may_ask_more_of_a_level():
    """Every model decides whether one of its own levels is worth a pass."""
    model = random_table(seed=5, spread=0.7)
    eager, picky = (options_of(max_depth=3, width=1, min_gain=gain) for gain in (0, 2))
    for options, depth in (((eager, eager), 6), ((eager, picky), 3)):
        drafter = started(make_cascade(model, [(model, it) for it in options]), [1])
        [draft] = drafter.propose([context_of([1], max_nodes=60)])
        assert max(draft.tree.depths) == depth


def test_the_smallest_bound_on_nodes_is_that_of_the_tree():
    stages = [(counting_model(), options_of(max_depth=2, max_nodes=count)) for count in (9, 3)]
    drafter = started(make_cascade(stages[0][0], stages), [1])
    [draft] = drafter.propose([context_of([1])])
    assert draft.tree.num_draft_tokens == 3


def test_trees_are_no_deeper_than_the_model_of_fewest_positions():
    models = [counting_model(), counting_model(context_limit=16)]
    stages = [(model, options_of(expansion=(1, 1, 1))) for model in models]
    for length, depth in ((10, 6), (12, 4), (15, 1), (16, 0), (20, 0)):
        text = list(range(length))
        drafter = started(make_cascade(models[0], stages, [lookup()]), text)
        [draft] = drafter.propose([context_of(text)])
        assert draft.tree.num_draft_tokens == depth


# -- in the engine ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [greedy(20), sampled(20, seed=2, top_k=30)], ids=["greedy", "sampled"]
)
def test_a_batch_gives_plain_tokens(params):
    target = micro_model()
    near, far = micro_model(blur=0.1), micro_model(blur=0.4)
    prompts = [[1, 2, 3, 1, 2, 3, 1], [4], [5, 6, 5, 6, 5]]
    stages = [(near, options_of(max_depth=2)), (far, options_of(max_depth=3))]
    drafter = make_cascade(target, stages, [lookup()])
    engine = make_engine(target, {"it": drafter}, max_nodes=7, prefill_chunk=4)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, params)
    assert sum(request.stats.num_accepted for request in requests) > 10
    check_idle(engine)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("cascade", ConfigError, "cascade needs the option 'of'"),
        ("cascade:of=suffix", ConfigError, "cascade:of is for drafters draft-model; got suffix"),
        ("cascade:of=draft-model", ConfigError, "draft-model needs the option 'path'"),
        (
            "cascade:of=draft-model(path=x,depth=3)",
            UnknownNameError,
            "option of draft-model 'depth'",
        ),
        ("cascade:of=draft-model(path=x),guess=none", ConfigError, "none does not"),
        ("cascade:of=draft-model(path=x),max_guess=0", ConfigError, "max_guess is at least 1"),
        (
            "cascade:of=draft-model(path=x)+draft-model(path=y,expansion=1-1)",
            ConfigError,
            "got 1 of 2 with an expansion",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(text, error, message):
    with pytest.raises(error, match=message) as caught:
        prepare_drafter(ComponentSpec.parse(text))
    assert caught.value.hint
