"""What every registered verifier must do, for every kind of draft."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import Draft, DraftBudget, Draws, SiblingDraw
from foretoken.core.drawing import draw_iid, draw_without_replacement
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT, TokenTree
from foretoken.core.verdict import Exactness, FinalKind, Verdict
from foretoken.drafters.growth import DrawnTree, StaticExpansion
from foretoken.errors import ConfigError, ForetokenError, RequestError
from foretoken.verifiers import VERIFIERS
from foretoken.verifiers.base import NextToken, NodeRule, TargetRows, as_node_rule
from tests.engines import random_table
from tests.fakes import token_trees

VOCAB_SIZE = 9
TARGET = random_table(VOCAB_SIZE, seed=5, spread=1.0).table
DRAFT = random_table(VOCAB_SIZE, seed=6, spread=1.0).table
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.9)
CUT = SamplingParams(temperature=1.2, top_k=3, repetition_penalty=1.3)
DRAWS = {SiblingDraw.IID: draw_iid, SiblingDraw.WITHOUT_REPLACEMENT: draw_without_replacement}
NAMES = sorted(VERIFIERS)


@pytest.fixture(params=NAMES)
def rule(request):
    return VERIFIERS.load(request.param)()


def sample_draft(siblings, widths, seed, params=SAMPLED, before=(2,)):
    """Return a draft whose children are samples of the draft table's rows, controls applied."""
    text = [*before, seed % VOCAB_SIZE]
    sampler, generator = Sampler(params, seed, 1), np.random.default_rng(seed)
    budget = DraftBudget(max_nodes=30, max_depth=len(widths))
    tree = DrawnTree(text[-1], budget, StaticExpansion(widths), len(widths))
    while tree.frontier:
        drawn = []
        for node, count in zip(tree.frontier, tree.num_draws, strict=True):
            row = DRAFT[tree.token_ids[node]]
            probs = sampler.draft_distribution(row, text, tree.paths[node])
            drawn.append((DRAWS[siblings](probs, count, generator), probs))
        tree.grow_drawn(drawn)
    return tree.finish("test", siblings)


def fixed_draft(siblings, widths, seed):
    """Return a draft of the first few tokens at each node, no matter how likely."""
    sequences = [()]
    for width in widths:
        sequences = [
            (*path, (seed + rank) % VOCAB_SIZE) for path in sequences for rank in range(width)
        ]
    tree = TokenTree.from_sequences(seed % VOCAB_SIZE, sequences)
    return Draft.from_drafter("test", tree, siblings=siblings)


def make_draft(siblings, widths, seed, params=SAMPLED):
    if siblings in DRAWS:
        return sample_draft(siblings, widths, seed, params)
    return fixed_draft(siblings, widths, seed)


def widths_for(rule):
    return (1, 1, 1) if rule.max_width == 1 else (2, 1, 2)


def verify(rule, draft, params=SAMPLED, *, seed=0, before=(2,), table=TARGET):
    text = [*before, draft.tree.token_ids[ROOT]]
    logits = table[torch.tensor(draft.tree.token_ids)]
    rows = TargetRows(logits, logits.argmax(dim=-1).tolist())
    return rule.verify(draft, rows, Sampler(params, seed, len(text)), text)


def assert_well_formed(verdict, draft):
    """Check that a verdict is a path of the draft, what it spells, and one token more."""
    tree = draft.tree
    last = verdict.path[-1] if verdict.path else ROOT
    assert isinstance(verdict, Verdict)
    assert tuple(tree.path(last)[1:]) == verdict.path
    assert tuple(tree.token_ids[node] for node in verdict.path) == verdict.token_ids[:-1]
    assert 0 <= verdict.final_id < VOCAB_SIZE
    assert type(verdict.final_id) is int
    assert (verdict.final_kind is FinalKind.RECOVERED) == bool(tree.children[last])


# -- declarations ----------------------------------------------------------------------------


def test_verifier_says_what_it_is(rule):
    assert isinstance(rule.exactness, Exactness)
    assert rule.draws
    assert set(rule.draws) <= set(SiblingDraw)
    assert len(set(rule.draws)) == len(rule.draws)
    assert rule.max_width is None or rule.max_width >= 1
    assert rule.max_drafters is None or rule.max_drafters >= 1
    assert rule.max_width is None or rule.max_drafters == 1, "two chains make a tree"
    assert type(rule).__doc__


@pytest.mark.parametrize("name", [name for name in NAMES if name != "coupled"])
def test_verifier_knows_its_name(name):
    assert VERIFIERS.load(name).name == name


# -- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, CUT], ids=["greedy", "sampled", "cut"])
def test_empty_drafts_emit_one_token(rule, params):
    for seed in range(5):
        draft = Draft.empty(seed)
        verdict = verify(rule, draft, params, seed=seed)
        assert (len(verdict.token_ids), verdict.final_kind) == (1, FinalKind.BONUS)
        assert_well_formed(verdict, draft)


@pytest.mark.parametrize("params", [SAMPLED, CUT], ids=["sampled", "cut"])
def test_verdicts_are_paths_of_the_draft(rule, params):
    for siblings in rule.draws:
        lengths = []
        for seed in range(40):
            draft = make_draft(siblings, widths_for(rule), seed, params)
            verdict = verify(rule, draft, params, seed=seed)
            assert_well_formed(verdict, draft)
            lengths.append(verdict.num_accepted)
        assert max(lengths) > 0
        if rule.exactness is not Exactness.LOSSY:
            assert min(lengths) < 3


def test_the_same_seed_gives_the_same_verdict_and_others_differ(rule):
    siblings = rule.draws[0]
    draft = make_draft(siblings, widths_for(rule), 3)
    verdicts = [verify(rule, draft, seed=seed) for seed in range(20)]
    assert verdicts == [verify(rule, draft, seed=seed) for seed in range(20)]
    assert len({verdict.token_ids for verdict in verdicts}) > 3


def test_dice_differ_from_step_to_step(rule):
    """The same draft with more tokens before it is decided anew."""
    draft = make_draft(rule.draws[0], widths_for(rule), 3)
    verdicts = {verify(rule, draft, before=(2,) * count).token_ids for count in range(1, 20)}
    assert len(verdicts) > 1


@given(token_trees(max_nodes=10, vocab=VOCAB_SIZE), st.sampled_from(sorted(SiblingDraw, key=str)))
def test_greedy_requests_take_the_targets_own_path_in_any_tree(tree, siblings):
    draft = Draft.from_drafter("any", tree, siblings=siblings)  # samples without their draws, too
    expected = verify(VERIFIERS.load("coupled")(), draft, GREEDY)
    for name in NAMES:
        assert verify(VERIFIERS.load(name)(), draft, GREEDY) == expected


# -- refusals --------------------------------------------------------------------------------


def assert_refused(rule, draft, message):
    with pytest.raises(RequestError, match=message) as caught:
        verify(rule, draft)
    assert f"verifier {rule.name!r}" in str(caught.value)
    assert isinstance(caught.value, ForetokenError)
    assert "coupled" in caught.value.hint


def test_siblings_drawn_otherwise_are_refused(rule):
    for siblings in set(SiblingDraw) - set(rule.draws):
        draft = make_draft(siblings, widths_for(rule), 1)
        assert_refused(rule, draft, f"takes siblings drawn as .*; got {siblings.value} ones")


def test_trees_are_refused_where_only_chains_are_taken(rule):
    if rule.max_width is None:
        pytest.skip("takes trees")
    for siblings in rule.draws:
        draft = fixed_draft(SiblingDraw.DETERMINISTIC, (1, 2), 1)
        if siblings in DRAWS:
            draft = sample_draft(SiblingDraw.WITHOUT_REPLACEMENT, (1, 2), 1)
            object.__setattr__(draft, "siblings", siblings)
        assert_refused(rule, draft, "at most 1 child per node; got a node with 2 children")


def compares_probabilities(rule):
    """Whether a rule takes samples only with the distribution that they were drawn from."""
    return rule.exactness is Exactness.DISTRIBUTION and SiblingDraw.COUPLED not in rule.draws


SAMPLE_RULES = [name for name in NAMES if compares_probabilities(VERIFIERS.load(name))]


@pytest.mark.parametrize("name", SAMPLE_RULES)
def test_samples_without_their_draws_are_refused(name):
    rule = VERIFIERS.load(name)()
    for siblings in set(rule.draws) & set(DRAWS):
        draft = sample_draft(siblings, widths_for(rule), 1)
        for node in draft.draws:
            rest = {other: kept for other, kept in draft.draws.items() if other != node}
            incomplete = Draft.from_drafter("it", draft.tree, siblings=siblings, draws=rest)
            assert_refused(rule, incomplete, f"with the draws that made them; got .*node {node}")


@pytest.mark.parametrize("name", SAMPLE_RULES)
def test_draws_that_cannot_have_been_are_refused(name):
    rule = VERIFIERS.load(name)()
    probs = np.array([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0])
    for siblings in set(rule.draws) & set(DRAWS):
        draws = {ROOT: (Draws(nodes=(1,), probs=probs),)}
        draft = Draft.from_drafter("it", TokenTree.chain([0, 2]), siblings=siblings, draws=draws)
        assert_refused(rule, draft, "some of probability 0")


def test_a_token_drawn_twice_without_replacement_is_refused():
    probs = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)
    draws = {ROOT: (Draws(nodes=(1, 1), probs=probs),)}
    way = SiblingDraw.WITHOUT_REPLACEMENT
    draft = Draft.from_drafter("it", TokenTree.chain([0, 2]), siblings=way, draws=draws)
    for name in ("rrs", "traversal"):
        assert_refused(VERIFIERS.load(name)(), draft, "different tokens without replacement")
    # A chain rule is asked for one draw per node, and equal ones are as many as they are.
    object.__setattr__(draft, "siblings", SiblingDraw.IID)
    for name in ("rejection", "block"):
        assert_refused(VERIFIERS.load(name)(), draft, "at most 1 draw per node; got 2 at node 0")


def test_samples_of_several_drafters_are_refused_by_rules_for_one():
    probs = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)
    groups = (Draws(nodes=(1,), probs=probs), Draws(nodes=(2,), probs=probs))
    tree = TokenTree((0, 3, 4), (-1, 0, 0))
    for name, siblings in [("k-seq", SiblingDraw.IID), ("traversal", SiblingDraw.IID)]:
        draft = Draft.from_drafter("it", tree, siblings=siblings, draws={ROOT: groups})
        message = "siblings sampled by 1 drafter; got those of 2 at node 0"
        assert_refused(VERIFIERS.load(name)(), draft, message)
    for name, siblings in [("mss", SiblingDraw.IID), ("rrs", SiblingDraw.WITHOUT_REPLACEMENT)]:
        draft = Draft.from_drafter("it", tree, siblings=siblings, draws={ROOT: groups})
        assert_well_formed(verify(VERIFIERS.load(name)(), draft), draft)


# -- one node at a time ----------------------------------------------------------------------

WHOLE_PATHS = {"block", "traversal", "typical"}
NODE_RULES = [name for name in NAMES if name not in WHOLE_PATHS]


def decide_next(rule, draft, params=SAMPLED, *, seed=0, before=(2,), table=TARGET):
    """Settle the root of a draft of one level, told of the root's row alone."""
    text = [*before, draft.tree.token_ids[ROOT]]
    logits = table[torch.tensor(text[-1:])]
    rows = TargetRows(logits, logits.argmax(dim=-1).tolist())
    return rule.decide_next(draft, rows, Sampler(params, seed, len(text)), text)


def as_next(verdict):
    return NextToken(verdict.token_ids[0], verdict.path[0] if verdict.path else None)


@pytest.mark.parametrize("name", NAMES)
def test_rules_settle_single_nodes_or_are_refused(name):
    rule = VERIFIERS.load(name)()
    if name not in WHOLE_PATHS:
        assert as_node_rule(name, rule) is rule
        return
    assert not isinstance(rule, NodeRule)
    with pytest.raises(ConfigError, match=f"verifier '{name}' judges whole paths") as caught:
        as_node_rule(name, rule)
    assert "coupled" in caught.value.hint


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, CUT], ids=["greedy", "sampled", "cut"])
@pytest.mark.parametrize("name", NODE_RULES)
def test_settling_the_root_is_what_verifying_begins_with(name, params):
    """The same dice in the same order: the first token and child of the verdict, to the bit."""
    rule = VERIFIERS.load(name)()
    for siblings in rule.draws:
        num_accepted = 0
        for seed in range(30):
            draft = make_draft(siblings, widths_for(rule)[:1], seed, params)
            found = decide_next(rule, draft, params, seed=seed)
            assert found == as_next(verify(rule, draft, params, seed=seed))
            num_accepted += found.child is not None
        assert 0 < num_accepted < 30


@pytest.mark.parametrize("name", NODE_RULES)
def test_without_children_the_next_token_is_plain(name):
    rule = VERIFIERS.load(name)()
    for params in (GREEDY, SAMPLED, CUT):
        draft = Draft.empty(4)
        assert decide_next(rule, draft, params) == as_next(verify(rule, draft, params))


@pytest.mark.parametrize("name", NODE_RULES)
def test_what_is_refused_whole_is_refused_at_one_node(name):
    rule = VERIFIERS.load(name)()
    for siblings in set(SiblingDraw) - set(rule.draws):
        draft = make_draft(siblings, (1,), 1)
        assert decide_next(rule, draft, GREEDY).token_id >= 0  # greedy takes every tree
        with pytest.raises(RequestError, match="takes siblings drawn as"):
            decide_next(rule, draft)


@pytest.mark.parametrize("name", NODE_RULES)
def test_the_dice_of_a_node_follow_seed_and_position_alone(name):
    """The same node is settled alike whatever was settled before, and anew one token later."""
    rule = VERIFIERS.load(name)()
    drafts = [make_draft(rule.draws[0], (1,), seed) for seed in range(5)]
    sampler = Sampler(SAMPLED, 5, 2)

    def settle(num_before):
        text = [2] * num_before
        return [
            rule.decide_next(draft, TargetRows(TARGET[seed : seed + 1], []), sampler, [*text, seed])
            for seed, draft in enumerate(drafts)
        ]

    first = settle(1)
    later = [settle(count) for count in range(2, 20)]
    assert settle(1) == first
    assert any(found != first for found in later)
