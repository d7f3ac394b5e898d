"""Drafts: estimates, sources, pruning and the union of several drafters' trees."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw, merge_drafts
from foretoken.core.tree import TokenTree
from tests.fakes import token_trees


@st.composite
def drafts(draw, name="drafter", siblings=SiblingDraw.COUPLED):
    """Draw drafts with one root token and few others, so that several overlap."""
    tree = draw(token_trees(max_nodes=8, vocab=3, root_ids=st.just(5)))
    estimates = [-draw(st.integers(0, 5)) / 4 for _ in range(tree.num_draft_tokens)]
    return Draft.from_drafter(name, tree, siblings=siblings, draft_logprobs=(0.0, *estimates))


def by_sequence(draft, values):
    """Return each node's value under its sequence."""
    return {draft.tree.sequence(node): value for node, value in enumerate(values)}


def test_empty_draft_is_the_root_alone():
    draft = Draft.empty(9)
    assert draft.tree == TokenTree.single(9)
    assert (draft.source, draft.draft_logprobs) == (("",), (0.0,))
    assert draft.path_logprobs() == [0.0]


def test_nodes_without_estimates_count_as_certain():
    draft = Draft.from_drafter("copier", TokenTree.chain([1, 2, 3]))
    assert draft.source == ("", "copier", "copier")
    assert draft.path_logprobs() == [0.0, 0.0, 0.0]
    assert draft.siblings is SiblingDraw.DETERMINISTIC


@pytest.mark.parametrize(("num_sources", "num_logprobs"), [(1, 2), (2, 1), (3, 2)])
def test_every_node_needs_a_source_and_an_estimate(num_sources, num_logprobs):
    with pytest.raises(ValueError, match="a draft of 2 nodes"):
        Draft(
            tree=TokenTree.chain([1, 2]),
            siblings=SiblingDraw.DETERMINISTIC,
            source=("",) * num_sources,
            draft_logprobs=(0.0,) * num_logprobs,
        )


@pytest.mark.parametrize("numbers", [(-1, 2), (2, -1)])
def test_budgets_are_not_negative(numbers):
    with pytest.raises(ValueError, match="not negative"):
        DraftBudget(max_nodes=numbers[0], max_depth=numbers[1])


@pytest.mark.parametrize(
    ("nodes", "depth", "is_empty"), [(0, 3, True), (3, 0, True), (1, 1, False)]
)
def test_budget_is_empty_when_no_node_fits(nodes, depth, is_empty):
    assert DraftBudget(max_nodes=nodes, max_depth=depth).is_empty is is_empty


@given(drafts())
def test_path_estimates_add_up_along_the_path(draft):
    for node, total in enumerate(draft.path_logprobs()):
        assert total == sum(draft.draft_logprobs[step] for step in draft.tree.path(node)[1:])


@given(drafts(), st.integers(0, 8))
def test_prune_keeps_the_likeliest_paths_with_their_estimates(draft, budget):
    pruned = draft.prune(budget)
    assert pruned.tree.num_draft_tokens == min(budget, draft.tree.num_draft_tokens)
    everything = by_sequence(draft, draft.path_logprobs())
    kept = by_sequence(pruned, pruned.path_logprobs())
    assert kept.items() <= everything.items()
    dropped = [everything[sequence] for sequence in everything.keys() - kept.keys()]
    assert min(kept.values()) >= max(dropped, default=-math.inf)
    assert pruned.siblings is draft.siblings


@given(st.lists(drafts(), min_size=1, max_size=3))
def test_merge_keeps_every_node_with_its_best_estimate(some):
    merged = merge_drafts(some)
    best = {}
    for draft in some:
        for sequence, estimate in by_sequence(draft, draft.draft_logprobs).items():
            best[sequence] = max(estimate, best.get(sequence, -math.inf))
    assert by_sequence(merged, merged.draft_logprobs) == best


@given(drafts(name="first"), drafts(name="second"))
def test_merge_names_the_first_drafter_of_a_node(first, second):
    merged = merge_drafts([first, second])
    for sequence, name in by_sequence(merged, merged.source).items():
        expected = "first" if sequence in first.tree.sequences else "second"
        assert name == ("" if sequence == (5,) else expected)


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ([SiblingDraw.COUPLED, SiblingDraw.COUPLED], SiblingDraw.COUPLED),
        ([SiblingDraw.COUPLED, SiblingDraw.IID], SiblingDraw.DETERMINISTIC),
    ],
)
def test_merge_of_unlike_draws_counts_as_deterministic(draws, expected):
    parts = [
        Draft.from_drafter("drafter", TokenTree.chain([5, index]), siblings=draw)
        for index, draw in enumerate(draws)
    ]
    assert merge_drafts(parts).siblings is expected


def test_empty_drafts_have_no_say_in_how_siblings_were_drawn():
    drawn = Draft.from_drafter("drafter", TokenTree.chain([5, 1]), siblings=SiblingDraw.IID)
    assert merge_drafts([Draft.empty(5), drawn]).siblings is SiblingDraw.IID
