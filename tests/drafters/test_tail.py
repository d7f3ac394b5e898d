"""Tail: retrieval goes on where a draft ends."""

import math

import pytest

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.options import ComponentSpec
from foretoken.core.tree import TokenTree
from foretoken.drafters import prepare_drafter
from foretoken.drafters.base import Follower, RequestView
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.drafters.tail import TailDrafter
from foretoken.errors import ConfigError, UnknownNameError
from tests.drafters.test_merged import chain, context_of
from tests.engines import (
    ScriptedDrafter,
    check_idle,
    counting_drafter,
    counting_model,
    finish,
    greedy,
    make_draft_model,
    make_engine,
    make_host,
    micro_model,
    plain_ids,
    sampled,
)


class ScriptedFollower(ScriptedDrafter):
    """Follows with a chain that a function of the last token gives, all tokens as sure."""

    def __init__(self, rest_of, logprob=-0.5, name="follower"):
        super().__init__(lambda context: [], name=name)
        self._rest_of, self._logprob = rest_of, logprob
        self.paths = []

    def follow(self, context, path):
        self.paths.append(tuple(path))
        root_id = path[-1] if path else context.token_ids[-1]
        return chain(self._rest_of(root_id), self._logprob, self.name)._draft(
            context_at(context, root_id)
        )


def context_at(context, root_id):
    return context_of(
        [root_id], max_depth=context.budget.max_depth, max_nodes=context.budget.max_nodes
    )


def tree_drafter(tokens, parents, logprobs):
    """Return a drafter of one tree below the pending token."""
    tree = TokenTree((5, *tokens), (-1, *parents))
    return ScriptedDrafter(
        lambda context: Draft.from_drafter("head", tree, draft_logprobs=(0.0, *logprobs))
    )


def named(draft):
    """Return each node's source and path probability, by its tokens below the root."""
    totals = draft.path_logprobs()
    return {
        draft.tree.sequence(node)[1:]: (draft.source[node], pytest.approx(totals[node]))
        for node in range(1, len(draft.tree))
    }


def tail_of(head, *followers, max_leaves=2):
    return TailDrafter({"head": head, **{it.name: it for it in followers}}, max_leaves)


def test_a_tail_goes_on_at_the_leaf_and_multiplies_its_estimate():
    drafter = tail_of(chain([1, 2], -0.2, "head"), ScriptedFollower(lambda last: [last + 1]))
    [draft] = drafter.propose([context_of()])
    assert named(draft) == {
        (1,): ("head", -0.2),
        (1, 2): ("head", -0.4),
        (1, 2, 3): ("follower", -0.9),
    }
    assert drafter._followers[0][1].paths == [(1, 2)]


def test_the_likeliest_leaves_are_continued():
    head = tree_drafter([1, 2, 3, 4], [0, 0, 0, 1], [-0.3, -0.9, -1.0, -0.5])
    follower = ScriptedFollower(lambda last: [9])
    [draft] = tail_of(head, follower).propose([context_of()])
    assert follower.paths == [(1, 4), (2,)]
    assert {(1, 4, 9), (2, 9)} <= set(named(draft))
    assert (3, 9) not in named(draft)


def test_a_sure_tail_takes_the_place_of_unlikely_nodes():
    head = tree_drafter([1, 2, 3], [0, 0, 0], [-0.1, -2.0, -3.0])
    follower = ScriptedFollower(lambda last: [7, 8] if last == 1 else [], logprob=-0.1)
    [draft] = tail_of(head, follower).propose([context_of(max_nodes=3)])
    assert set(named(draft)) == {(1,), (1, 7), (1, 7, 8)}


def test_where_the_first_has_nothing_the_others_draft():
    follower = ScriptedFollower(lambda last: [last + 1])
    [draft] = tail_of(ScriptedDrafter(lambda context: []), follower).propose([context_of()])
    assert follower.paths == [()]
    assert draft.tree == TokenTree.chain([5, 6])


def test_several_tails_are_merged_unless_a_node_may_have_one_child():
    followers = (
        ScriptedFollower(lambda last: [7], -0.5, "a"),
        ScriptedFollower(lambda last: [8, 9], -0.4, "b"),
    )
    drafter = tail_of(chain([1], -0.2, "head"), *followers)
    [draft] = drafter.propose([context_of()])
    assert draft.tree == TokenTree.from_sequences(5, [[1, 7], [1, 8, 9]])
    [draft] = drafter.propose([context_of(max_width=1)])
    assert draft.tree == TokenTree.chain([5, 1, 8, 9])


@pytest.mark.parametrize("max_depth", [1, 2, 3, 4])
def test_paths_are_no_deeper_than_the_budget(max_depth):
    drafter = tail_of(chain([1, 2], -0.2, "head"), ScriptedFollower(lambda last: [7] * 9))
    [draft] = drafter.propose([context_of(max_depth=max_depth, max_nodes=20)])
    assert max(draft.tree.depths) == max_depth


def test_prompt_lookup_continues_a_draft_that_copies_nothing():
    """The model's first token is what tells which of two earlier places to copy from."""
    lookup = PromptLookupDrafter(PromptLookupOptions(max_ngram=2, max_depth=2))
    text = [5, 1, 11, 12, 5, 2, 13, 14, 5]
    for first, copied in ((1, [11, 12]), (2, [13, 14])):
        drafter = TailDrafter({"head": chain([first], -0.2, "head"), "prompt-lookup": lookup}, 1)
        drafter.start(RequestView(request_id="r", prompt_ids=text))
        [draft] = drafter.propose([context_of(text)])
        assert draft.tree == TokenTree.chain([5, first, *copied])
        assert draft.draft_logprobs[2:] == (math.log(3 / 4),) * 2
        drafter.stop("r")


def test_a_counted_tail_saves_steps():
    """A model that may draft two tokens, and a follower that knows the rest."""
    target = counting_model()
    follower = ScriptedFollower(lambda last: [(last + step) % 26 for step in range(1, 7)], -0.01)
    head = counting_drafter()
    params = greedy(24)
    steps = []
    for drafter in (head, tail_of(head, follower)):
        engine = make_engine(target, {"it": drafter}, max_nodes=8)
        head._draft = lambda context: [(context.token_ids[-1] + step) % 26 for step in (1, 2)][
            : context.budget.max_depth
        ]
        request = engine.add_request([3], params)
        finish(engine)
        assert request.output_ids == plain_ids(target, [3], params)
        steps.append(request.stats.num_steps)
    assert steps == [8, 3]


@pytest.mark.parametrize("params", [greedy(20), sampled(20, seed=2)], ids=["greedy", "sampled"])
def test_a_batch_gives_plain_tokens(params):
    target, draft = micro_model(), micro_model(blur=0.2)
    prompts = [[1, 2, 3, 1, 2, 3, 1], [4], [5, 6, 5, 6, 5]]
    members = {
        "draft-model": make_draft_model(target, draft, max_depth=2),
        "prompt-lookup": PromptLookupDrafter(PromptLookupOptions()),
    }
    drafter = TailDrafter(members, 2)
    assert drafter.draws == {SiblingDraw.COUPLED, SiblingDraw.DETERMINISTIC}
    engine = make_engine(target, {"it": drafter}, max_nodes=7)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_ids == plain_ids(target, prompt, params)
    check_idle(engine)


# -- from text -------------------------------------------------------------------------------


def test_spec_builds_the_drafters_and_says_what_they_are():
    spec = ComponentSpec.parse("tail:of=merged(of=suffix+suffix),then=suffix,max_leaves=3")
    drafter = prepare_drafter(spec)(make_host(counting_model()))
    assert [label for label, _ in drafter.members] == ["merged", "suffix"]
    assert not isinstance(drafter, Follower)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tail:of=suffix", ConfigError, "tail needs the option 'then'"),
        ("tail:of=suffix+suffix,then=suffix", ConfigError, "tail:of is one drafter; got 2"),
        ("tail:of=suffix,then=draft-model(path=x)", ConfigError, "draft-model does not"),
        ("tail:of=suffix,then=merged(of=suffix)", ConfigError, "merged does not"),
        ("tail:of=suffix,then=suffx", UnknownNameError, "unknown drafter 'suffx'"),
        ("tail:of=suffix,then=suffix,max_leaves=0", ConfigError, "max_leaves is at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(text, error, message):
    with pytest.raises(error, match=message) as caught:
        prepare_drafter(ComponentSpec.parse(text))
    assert caught.value.hint
