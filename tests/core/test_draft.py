"""Drafts: estimates, sources, pruning and the union of several drafters' trees."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import (
    Draft,
    DraftBudget,
    Draws,
    SiblingDraw,
    merge_drafts,
    source_names,
)
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


@given(drafts(name="first"), drafts(name="second"), drafts(name="first"))
def test_merge_keeps_all_names_of_a_node(first, second, again):
    merged = merge_drafts([first, second, again])
    for sequence, source in by_sequence(merged, merged.source).items():
        is_first = sequence in first.tree.sequences | again.tree.sequences
        expected = ["first"] * is_first + ["second"] * (sequence in second.tree.sequences)
        if sequence not in first.tree.sequences:
            expected = expected[::-1]  # in the order of the drafts
        assert source_names(source) == ([] if sequence == (5,) else expected)


def test_names_of_a_merged_draft_can_be_merged_again():
    chain = TokenTree.chain([5, 1])
    parts = [Draft.from_drafter(name, chain) for name in ("a", "b", "c")]
    merged = merge_drafts([merge_drafts(parts[:2]), merge_drafts([parts[1], parts[2]])])
    assert merged.source == ("", "a+b+c")


@given(st.lists(drafts(), min_size=1, max_size=3))
def test_merge_orders_nodes_by_level(some):
    depths = merge_drafts(some).tree.depths
    assert list(depths) == sorted(depths)


def test_a_bound_does_not_starve_the_later_of_equally_sure_drafters():
    """Nodes used to be in the order of the drafters, and a bound cut the last one's first."""
    chains = [TokenTree.chain([5, *[token_id] * 4]) for token_id in (1, 2)]
    drafts = [Draft.from_drafter(name, tree) for name, tree in zip("ab", chains, strict=True)]
    assert merge_drafts(drafts).prune(4).source == ("", "a", "b", "a", "b")


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


# -- samples ---------------------------------------------------------------------------------

PROBS = np.array([0.5, 0.25, 0.25])


def sampled_draft(name="drafter", siblings=SiblingDraw.IID, probs=PROBS):
    """Return a draft with duplicates: three draws at the root, two below each of its children.

    5 ─ 0 ─ 1    drawn 0, 2, 0 at the root; 1, 1 below 0; 0, 2 below 2
      └ 2 ─ 0
          └ 2
    """
    tree = TokenTree((5, 0, 2, 1, 0, 2), (-1, 0, 0, 1, 2, 2))
    draws = {
        0: (Draws(nodes=(1, 2, 1), probs=probs),),
        1: (Draws(nodes=(3, 3), probs=probs),),
        2: (Draws(nodes=(4, 5), probs=probs),),
    }
    return Draft.from_drafter(name, tree, siblings=siblings, draws=draws)


def drawn_tokens(draft):
    """Return the drawn token ids at each node, by its sequence, per drafter."""
    tree = draft.tree
    return {
        tree.sequence(node)[1:]: [
            tuple(tree.token_ids[child] for child in group.nodes) for group in groups
        ]
        for node, groups in draft.draws.items()
    }


def test_draws_make_children_of_their_node():
    draws = {0: (Draws(nodes=(2,), probs=PROBS),)}
    with pytest.raises(ValueError, match=r"draws at node 0 make its children \(1,\); got \[2\]"):
        Draft.from_drafter("it", TokenTree.chain([5, 0, 1]), draws=draws)


def test_draws_are_equal_when_their_nodes_and_numbers_are():
    draws = Draws(nodes=(1, 2), probs=PROBS)
    assert draws == Draws(nodes=(1, 2), probs=PROBS.copy())
    assert hash(draws) == hash(Draws(nodes=(1, 2), probs=PROBS.copy()))
    assert draws != Draws(nodes=(2, 1), probs=PROBS)
    assert draws != Draws(nodes=(1, 2), probs=PROBS[::-1])
    assert draws != "draws"


@pytest.mark.parametrize(
    ("max_nodes", "expected"),
    [
        (0, {}),
        (1, {(): [(0,)]}),
        # Two draws for two nodes; nothing is left for the next level.
        (2, {(): [(0, 2)]}),
        # Three draws, one of them a repetition, so one node is left: the first child gets it.
        (3, {(): [(0, 2, 0)], (0,): [(1,)]}),
        (4, {(): [(0, 2, 0)], (0,): [(1,)], (2,): [(0,)]}),
        (5, {(): [(0, 2, 0)], (0,): [(1, 1)], (2,): [(0,)]}),
        (6, {(): [(0, 2, 0)], (0,): [(1, 1)], (2,): [(0, 2)]}),
    ],
)
def test_prune_keeps_the_earliest_draws_level_by_level(max_nodes, expected):
    """Five nodes do not fit five: the draws could have made more, and that is what counts."""
    pruned = sampled_draft().prune(max_nodes)
    assert drawn_tokens(pruned) == expected
    assert pruned.tree.num_draft_tokens <= max_nodes
    assert pruned.siblings is SiblingDraw.IID


def test_prune_does_not_ask_how_many_nodes_there_are_but_how_many_draws():
    same = TokenTree.chain([5, 0])
    draws = {0: (Draws(nodes=(1, 1), probs=PROBS),)}
    draft = Draft.from_drafter("it", same, siblings=SiblingDraw.IID, draws=draws)
    assert draft.prune(1).draws[0][0].nodes == (1,)
    assert draft.prune(2) is draft


def test_merge_keeps_the_draws_of_each_drafter_at_a_node():
    other_probs = PROBS[::-1].copy()
    merged = merge_drafts([sampled_draft("a"), sampled_draft("b", probs=other_probs)])
    assert merged.siblings is SiblingDraw.IID
    assert drawn_tokens(merged) == {
        (): [(0, 2, 0)] * 2,
        (0,): [(1, 1)] * 2,
        (2,): [(0, 2)] * 2,
    }
    for groups in merged.draws.values():
        np.testing.assert_array_equal(groups[0].probs, PROBS)
        np.testing.assert_array_equal(groups[1].probs, other_probs)
    assert set(merged.source[1:]) == {"a+b"}


def test_a_bound_takes_draws_of_every_drafter_in_turn():
    merged = merge_drafts([sampled_draft("a"), sampled_draft("b")])
    assert drawn_tokens(merged.prune(2)) == {(): [(0,), (0,)], (0,): [(1,)]}


def test_samples_drawn_in_different_ways_lose_their_draws():
    other = sampled_draft("b", siblings=SiblingDraw.WITHOUT_REPLACEMENT)
    merged = merge_drafts([sampled_draft("a"), other])
    assert (merged.siblings, merged.draws) == (SiblingDraw.DETERMINISTIC, {})
    copied = Draft.from_drafter("c", TokenTree.chain([5, 1]))
    assert merge_drafts([sampled_draft("a"), copied]).draws == {}
    assert merge_drafts([sampled_draft("a"), Draft.empty(5)]).draws


# -- scouts ----------------------------------------------------------------------------------


def scouted_draft(name="drafter"):
    """Return a draft with two scouts, both less likely than everything else.

    5 ─ 0 ─ 1 ─ 2    likely
      └ 3 ─ 4        unlikely; 4 is a scout
          └ 6        unlikelier, a scout
    """
    tree = TokenTree((5, 0, 1, 2, 3, 4, 6), (-1, 0, 1, 2, 0, 4, 4))
    logprobs = (0.0, -0.1, -0.1, -0.1, -3.0, -3.0, -4.0)
    return Draft.from_drafter(name, tree, draft_logprobs=logprobs, scouts=frozenset({5, 6}))


def scouted(draft):
    return {draft.tree.sequence(node)[1:] for node in draft.scouts}


@pytest.mark.parametrize(
    ("max_nodes", "sequences", "scouts"),
    [
        (6, {(0,), (0, 1), (0, 1, 2), (3,), (3, 4), (3, 6)}, {(3, 4), (3, 6)}),
        (5, {(0,), (0, 1), (3,), (3, 4), (3, 6)}, {(3, 4), (3, 6)}),
        (3, {(3,), (3, 4), (3, 6)}, {(3, 4), (3, 6)}),
        (2, {(3,), (3, 4)}, {(3, 4)}),  # of scouts, the less likely ones go first
        (1, {(3,)}, set()),
        (0, set(), set()),
    ],
)
def test_scouts_and_what_they_hang_on_are_cut_last(max_nodes, sequences, scouts):
    pruned = scouted_draft().prune(max_nodes)
    assert pruned.tree.sequences == {(5, *sequence) for sequence in {(), *sequences}}
    assert scouted(pruned) == scouts


@given(st.lists(drafts(), min_size=1, max_size=3), st.data())
def test_scouts_outlive_everything_else(some, data):
    merged = merge_drafts(some)
    nodes = range(1, len(merged.tree))
    scouts = data.draw(st.sets(st.sampled_from(nodes))) if len(nodes) else set()
    draft = Draft.from_drafter(
        "it", merged.tree, draft_logprobs=merged.draft_logprobs, scouts=frozenset(scouts)
    )
    needed = {merged.tree.sequence(above) for it in scouts for above in merged.tree.path(it)}
    pruned = draft.prune(data.draw(st.integers(0, len(nodes))))
    kept = pruned.tree.sequences
    assert needed <= kept or kept <= {(5,), *needed}
    assert scouted(pruned) == {sequence[1:] for sequence in kept} & scouted(draft)


def test_merge_and_rename_keep_scouts():
    likely = Draft.from_drafter("other", TokenTree.chain([5, 3, 4, 9]))
    merged = merge_drafts([likely, scouted_draft()])
    assert scouted(merged) == {(3, 4), (3, 6)}
    assert merged.source[min(merged.scouts)] == "other+drafter"
    assert scouted(merged.renamed("drafter", "drafter#2")) == {(3, 4), (3, 6)}
    assert merge_drafts([likely, likely]).scouts == frozenset()


def test_scouts_do_not_decide_which_draws_stand():
    draws = {0: (Draws(nodes=(1, 2), probs=PROBS),)}
    tree = TokenTree((5, 0, 2), (-1, 0, 0))
    draft = Draft.from_drafter(
        "it", tree, siblings=SiblingDraw.IID, draws=draws, scouts=frozenset({2})
    )
    assert drawn_tokens(draft.prune(1)) == {(): [(0,)]}
    assert draft.prune(1).scouts == frozenset()
    assert draft.prune(2).scouts == {2}


@pytest.mark.parametrize("node", [0, -1, 3])
def test_a_scout_is_a_draft_token(node):
    with pytest.raises(ValueError, match=rf"scouts are nodes below .* got \[{node}\]"):
        Draft.from_drafter("it", TokenTree.chain([5, 1, 2]), scouts=frozenset({node}))
