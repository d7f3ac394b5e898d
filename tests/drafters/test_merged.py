"""Merged: the union of drafts, behind one drafter."""

import json

import pytest

from foretoken import LLM, SamplingParams
from foretoken.core.draft import Draft, DraftBudget, SiblingDraw, merge_drafts
from foretoken.core.options import ComponentSpec
from foretoken.core.sampling import Sampler
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters import prepare_drafter
from foretoken.drafters.base import DraftContext, DrafterNeeds, RequestView
from foretoken.drafters.composite import CompositeDrafter
from foretoken.drafters.merged import MergedDrafter
from foretoken.errors import ConfigError, UnknownNameError
from foretoken.planner.plan import Plan
from tests.engines import (
    OracleDrafter,
    ScriptedDrafter,
    check_idle,
    finish,
    greedy,
    make_draft_model,
    make_engine,
    make_host,
    micro_model,
    outcome_of,
    plain_ids,
    random_table,
    sampled,
)

TEXT = [3, 1, 4, 1, 5]


def context_of(text=TEXT, params=None, *, siblings=None, place=0, **budget):
    params = params or greedy(50)
    siblings = siblings or (SiblingDraw.DETERMINISTIC if params.is_greedy else SiblingDraw.COUPLED)
    return DraftContext(
        request_id="r",
        token_ids=list(text),
        sampler=Sampler(params, params.seed or 0, len(text)),
        budget=DraftBudget(**{"max_nodes": 8, "max_depth": 8, **budget}),
        siblings=siblings,
        drafter_index=place,
    )


def chain(tokens, logprob, name="scripted"):
    """Return a drafter of one chain whose tokens are all as sure."""

    def draft(context):
        room = min(len(tokens), context.budget.max_depth, context.budget.max_nodes)
        tree = TokenTree.chain([context.token_ids[-1], *tokens[:room]])
        return Draft.from_drafter(name, tree, draft_logprobs=(0.0, *[logprob] * room))

    return ScriptedDrafter(draft)


def test_the_draft_is_the_union_with_every_name():
    drafter = MergedDrafter({"a": chain([1, 2], -0.1, "a"), "b": chain([1, 3], -0.7, "b")})
    [draft] = drafter.propose([context_of()])
    assert draft.tree == TokenTree.from_sequences(5, [[1, 2], [1, 3]])
    names = {draft.tree.sequence(node)[1:]: draft.source[node] for node in range(len(draft.tree))}
    assert names == {(): "", (1,): "a+b", (1, 2): "a", (1, 3): "b"}
    assert sorted(draft.draft_logprobs) == [-0.7, -0.1, -0.1, 0.0]


def test_drafters_of_one_kind_can_be_told_apart():
    spec = ComponentSpec.parse("merged:of=prompt-lookup(max_ngram=1)+prompt-lookup(min_ngram=2)")
    drafter = prepare_drafter(spec)(make_host(random_table()))
    text = [7, 2, 9, 7, 3, 8, 7, 2]  # 2 was followed by 9; as was (7, 2)
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    [draft] = drafter.propose([context_of(text, max_depth=1)])
    assert draft.source == ("", "prompt-lookup+prompt-lookup#2")


def test_the_likeliest_nodes_of_all_stay_within_the_budget():
    drafter = MergedDrafter({"a": chain([1, 2, 3], -0.9, "a"), "b": chain([4, 5, 6], -0.1, "b")})
    [draft] = drafter.propose([context_of(max_nodes=4)])
    assert draft.tree == TokenTree.from_sequences(5, [[1], [4, 5, 6]])


def test_a_bound_on_children_leaves_the_draft_that_promises_most():
    drafter = MergedDrafter({"a": chain([1, 2, 3], -0.9, "a"), "b": chain([4, 5], -0.1, "b")})
    [draft] = drafter.propose([context_of(max_width=1)])
    assert draft.tree == TokenTree.chain([5, 4, 5])


def test_requests_and_needs_go_to_all():
    first, second = chain([1], -0.1), chain([2], -0.1)
    first.needs = DrafterNeeds(hidden_layers=(4, 1), top_logits=2, shared_layers=3)
    second.needs = DrafterNeeds(hidden_layers=(2, 4), draft_cache=True)
    first.serves = lambda params, *, has_reference: params.is_greedy
    second.serves = lambda params, *, has_reference: params.temperature > 1
    closed = []
    first.close, second.close = (lambda: closed.append(1)), (lambda: closed.append(2))
    first.row_states = lambda *asked: asked
    drafter = MergedDrafter({"a": MergedDrafter({"a": first}), "b": second})
    assert drafter.needs == DrafterNeeds(
        hidden_layers=(1, 2, 4), top_logits=2, draft_cache=True, shared_layers=3
    )
    served = [
        drafter.serves(sampled(3, temperature=it), has_reference=False) for it in (0.0, 1.0, 2.0)
    ]
    assert served == [True, False, True]
    drafter.start(RequestView(request_id="r", prompt_ids=TEXT))
    verdict = Verdict((), (3,), FinalKind.BONUS)
    drafter.commit([outcome_of(verdict)])
    drafter.stop("r")
    drafter.close()
    for member in (first, second):
        assert (member.started, member.stopped) == (["r"], ["r"])
        assert member.verdicts == {"r": [verdict]}
    assert closed == [1, 2]
    assert drafter.row_states("r", range(2), None) == ("r", range(2), None)


def test_members_draw_apart_from_each_other_at_any_depth():
    """Two samplers with one stream of randomness would draw the same tokens."""
    seen = []

    def note(context):
        seen.append(context.drafter_index)
        return []

    def nest(depth):
        members = {str(place): ScriptedDrafter(note) for place in range(3)}
        return MergedDrafter({**members, "inner": nest(depth - 1)} if depth else members)

    for place in range(4):
        nest(2).propose([context_of(place=place)])
    assert len(seen) == 4 * 9
    assert len({*seen, *range(4)}) == 4 * 9 + 4
    params = sampled(5, seed=1)
    draws = {context_of(params=params, place=it).generator().random() for it in seen}
    assert len(draws) == len(seen)


def test_a_model_ranks_by_the_race_beside_drafters_that_copy():
    table = random_table(seed=4, spread=0.4)
    target = random_table(seed=4, spread=0.4)
    alone = make_draft_model(target, table, width=3)
    drafter = MergedDrafter(
        {"draft-model": make_draft_model(target, table, width=3), "copy": chain([9, 9], -1.0)}
    )
    assert drafter.draws == {SiblingDraw.DETERMINISTIC, SiblingDraw.COUPLED}
    context = context_of(params=sampled(50, seed=6), max_nodes=6)
    for it in (alone, drafter):
        it.start(RequestView(request_id="r", prompt_ids=TEXT))
    [expected], [draft] = alone.propose([context]), drafter.propose([context])
    copied = chain([9, 9], -1.0).propose([context])
    assert draft.tree == merge_drafts([expected, *copied]).prune(6).tree
    assert draft.siblings is SiblingDraw.COUPLED
    likeliest = table.table[TEXT[-1]].topk(3).indices.tolist()
    firsts = {draft.tree.token_ids[child] for child in draft.tree.children[0]} - {9}
    assert not firsts <= set(likeliest)  # noise decides, with this seed


def test_only_drafters_that_race_make_it_coupled():
    assert MergedDrafter({"a": chain([1], -0.1)}).draws == {SiblingDraw.DETERMINISTIC}


@pytest.mark.parametrize("params", [greedy(14), sampled(14, seed=2)], ids=["greedy", "sampled"])
def test_a_batch_with_drafts_near_the_truth_gives_plain_tokens(params):
    target, draft = micro_model(), micro_model(blur=0.3)
    prompts = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5]]
    truths = [prompt + plain_ids(target, prompt, params) for prompt in prompts]
    members = {
        "oracle": OracleDrafter(truths, target.info.vocab_size),
        "draft-model": make_draft_model(target, draft, max_depth=3),
    }
    engine = make_engine(target, {"it": MergedDrafter(members)}, max_nodes=7)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    for prompt, request, truth in zip(prompts, requests, truths, strict=True):
        assert prompt + request.output_ids == truth
    assert sum(request.stats.num_accepted for request in requests) > 0
    check_idle(engine)


# -- from text -------------------------------------------------------------------------------

SPEC = "merged:of=suffix+prompt-lookup(max_depth=3)"


def test_specs_come_through_lists_and_plan_files(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"drafters": [SPEC]}), encoding="utf-8")
    assert Plan.load(path).drafters == (SPEC,)
    prompt, params = "the cat sat and the cat", SamplingParams(max_new_tokens=24, seed=1)
    plain = LLM("stories", drafters="none").generate(prompt, params)[0]
    llm = LLM("stories", drafters=list(Plan.load(path).drafters))
    assert isinstance(llm.engine.drafters["merged"], CompositeDrafter)
    out = llm.generate(prompt, params)[0]
    assert out.token_ids == plain.token_ids
    assert out.stats.num_accepted > 0
    assert set(out.stats.accepted_by) <= {"suffix", "prompt-lookup"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("merged", ConfigError, "merged needs the option 'of'"),
        ("merged:of=", ConfigError, "no name stands"),
        ("merged:of=sufix", UnknownNameError, "unknown drafter 'sufix'"),
        ("merged:of=suffix(max_mach=3)", UnknownNameError, "option of suffix 'max_mach'"),
        ("merged:of=suffix(max_match=0)", ConfigError, "suffix:max_match is from 1"),
        ("merged:of=suffix+draft-model", ConfigError, "draft-model needs the option 'path'"),
        ("merged:of=merged(of=rest)", ConfigError, "rest needs the option 'path'"),
        ("merged:of=" + "+".join(["suffix"] * 65), ConfigError, "from 1 to 64 drafters; got 65"),
    ],
)
def test_mistakes_inside_are_found_before_anything_is_loaded(text, error, message):
    with pytest.raises(error, match=message) as caught:
        prepare_drafter(ComponentSpec.parse(text))
    assert caught.value.hint


def test_rules_that_compare_probabilities_refuse_mixtures():
    with pytest.raises(ConfigError, match="takes siblings drawn as iid"):
        LLM("stories", drafters=SPEC, verifier="mss")
