"""Token trees: what building, merging, matching and pruning must keep."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.tree import NO_PARENT, ROOT, TokenTree
from tests.fakes import token_trees

SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=5).map(tuple), max_size=8)
TREES = token_trees(max_nodes=14, vocab=4)
# One root token and few others, so that trees overlap.
OVERLAPPING = st.lists(
    token_trees(max_nodes=10, vocab=3, root_ids=st.just(7)), min_size=1, max_size=4
)


@st.composite
def connected_nodes(draw):
    """Draw a tree and an ascending list of its nodes that hang together."""
    tree = draw(TREES)
    kept = [ROOT]
    for node in range(1, len(tree)):
        if tree.parents[node] in kept and draw(st.booleans()):
            kept.append(node)
    return tree, kept


@st.composite
def scored_trees(draw):
    """Draw a tree and scores that fall, or stay, along every path."""
    tree = draw(token_trees(max_nodes=9, vocab=4))
    scores = [0.0]
    for parent in tree.parents[1:]:
        scores.append(scores[parent] - draw(st.integers(0, 4)))
    return tree, scores


def prefixes(sequences):
    return {sequence[:end] for sequence in sequences for end in range(len(sequence) + 1)}


def connected_subtrees(tree, num_draft_tokens):
    """Yield every connected set of that many nodes below the root."""
    for nodes in combinations(range(1, len(tree)), num_draft_tokens):
        if all(tree.parents[node] in {ROOT, *nodes} for node in nodes):
            yield nodes


# -- construction ----------------------------------------------------------------------------


def test_single_is_the_root_alone():
    tree = TokenTree.single(5)
    assert (len(tree), tree.num_draft_tokens, tree.token_ids) == (1, 0, (5,))
    assert tree.is_chain
    assert tree.sequences == {(5,)}


def test_chain_is_one_path():
    tree = TokenTree.chain([5, 6, 6, 7])
    assert tree.parents == (NO_PARENT, 0, 1, 2)
    assert tree.depths == (0, 1, 2, 3)
    assert tree.is_chain
    assert tree.sequence(3) == (5, 6, 6, 7)


@given(SEQUENCES)
def test_from_sequences_holds_exactly_the_prefixes(sequences):
    tree = TokenTree.from_sequences(7, sequences)
    assert tree.sequences == {(7, *prefix) for prefix in prefixes(sequences)} | {(7,)}
    assert len(tree) == len(tree.sequences), "no sequence stands twice"


@pytest.mark.parametrize(
    ("token_ids", "parents", "message"),
    [
        ((), (), "at least a root"),
        ((1, 2), (-1,), "one parent per token"),
        ((1,), (0,), "its parent is -1; got 0"),
        ((1, 2), (-1, -1), r"node 1 needs a parent in \[0, 1\); got -1"),
        ((1, 2), (-1, 1), r"node 1 needs a parent in \[0, 1\); got 1"),
        ((1, 2, 3), (-1, 2, 0), r"node 1 needs a parent in \[0, 1\); got 2"),
    ],
)
def test_malformed_trees_are_refused(token_ids, parents, message):
    with pytest.raises(ValueError, match=message):
        TokenTree(token_ids, parents)


# -- derived ---------------------------------------------------------------------------------


@given(TREES)
def test_paths_depths_and_children_agree(tree):
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[0] == ROOT
        assert path[-1] == node
        assert len(path) == tree.depths[node] + 1
        assert all(tree.parents[below] == above for above, below in pairwise(path))
        assert tree.sequence(node) == tuple(tree.token_ids[step] for step in path)
        assert all(tree.parents[child] == node for child in tree.children[node])
    assert sum(map(len, tree.children)) == tree.num_draft_tokens


@given(TREES)
def test_ancestor_mask_marks_the_path(tree):
    mask = tree.ancestor_mask()
    assert mask.dtype == torch.bool
    assert mask.shape == (len(tree), len(tree))
    for node in range(len(tree)):
        assert mask[node].nonzero().flatten().tolist() == tree.path(node)


@given(TREES)
def test_is_chain_means_no_branch(tree):
    assert tree.is_chain == all(len(children) <= 1 for children in tree.children)


@given(TREES, st.randoms(use_true_random=False))
def test_equality_ignores_the_order_of_nodes(tree, random):
    order, ready = [ROOT], list(tree.children[ROOT])
    while ready:
        node = ready.pop(random.randrange(len(ready)))
        order.append(node)
        ready += tree.children[node]
    new_index = {node: index for index, node in enumerate(order)}
    shuffled = TokenTree(
        tuple(tree.token_ids[node] for node in order),
        (NO_PARENT, *(new_index[tree.parents[node]] for node in order[1:])),
    )
    assert shuffled == tree
    assert hash(shuffled) == hash(tree)


@given(TREES, TREES)
def test_equality_is_by_the_set_of_sequences(first, second):
    assert (first == second) == (first.sequences == second.sequences)
    assert first != first.token_ids


@given(TREES, st.lists(st.integers(0, 4), max_size=6))
def test_match_follows_the_longest_prefix(tree, token_ids):
    nodes = tree.match(token_ids)
    spelled = tuple(tree.token_ids[node] for node in nodes)
    root = tree.token_ids[ROOT]
    assert spelled == tuple(token_ids[: len(nodes)])
    if nodes:
        assert tree.path(nodes[-1]) == [ROOT, *nodes]
    longer = (root, *token_ids[: len(nodes) + 1])
    assert len(nodes) == len(token_ids) or longer not in tree.sequences


# -- merging ---------------------------------------------------------------------------------


@given(OVERLAPPING)
def test_merge_is_the_union_of_sequences(trees):
    merged, node_maps = TokenTree.merge(trees)
    assert merged.sequences == frozenset().union(*(tree.sequences for tree in trees))
    assert len(merged) == len(merged.sequences), "equal siblings become one node"
    for tree, node_map in zip(trees, node_maps, strict=True):
        assert len(node_map) == len(tree)
        for node, merged_node in enumerate(node_map):
            assert merged.sequence(merged_node) == tree.sequence(node)


@given(OVERLAPPING)
def test_merge_does_not_depend_on_the_order(trees):
    assert TokenTree.merge(trees)[0] == TokenTree.merge(trees[::-1])[0]


@given(TREES)
def test_merge_with_itself_changes_nothing(tree):
    merged, node_maps = TokenTree.merge([tree, tree])
    assert merged == tree
    assert node_maps[0] == node_maps[1]


def test_merge_joins_equal_siblings_of_one_tree():
    doubled = TokenTree((1, 2, 2, 3, 4), (-1, 0, 0, 1, 2))
    merged, node_maps = TokenTree.merge([doubled])
    assert merged.token_ids == (1, 2, 3, 4)
    assert node_maps == [[0, 1, 1, 2, 3]]


@pytest.mark.parametrize("trees", [[], [TokenTree.single(1), TokenTree.single(2)]])
def test_merge_needs_one_root_token(trees):
    with pytest.raises(ValueError, match="one common root token"):
        TokenTree.merge(trees)


# -- pruning ---------------------------------------------------------------------------------


@given(connected_nodes())
def test_keep_returns_the_sequences_of_the_kept_nodes(tree_and_nodes):
    tree, nodes = tree_and_nodes
    kept = tree.keep(nodes)
    assert len(kept) == len(nodes)
    assert [kept.sequence(index) for index in range(len(kept))] == [
        tree.sequence(node) for node in nodes
    ]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "ascending from the root"),
        ([1, 2], "ascending from the root"),
        ([0, 2, 1], "ascending from the root"),
        ([0, 1, 1], "ascending from the root"),
        ([0, 3], r"without their parents: \[3\]"),
    ],
)
def test_keep_refuses_what_does_not_hang_together(nodes, message):
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 0, 1))
    with pytest.raises(ValueError, match=message):
        tree.keep(nodes)


@given(TREES, st.data())
def test_top_nodes_hang_together_and_fill_the_budget(tree, data):
    scores = data.draw(st.lists(st.floats(-9, 9), min_size=len(tree), max_size=len(tree)))
    budget = data.draw(st.integers(0, len(tree)))
    nodes = tree.top_nodes(scores, budget)
    assert len(nodes) == 1 + min(budget, tree.num_draft_tokens)
    assert len(tree.keep(nodes)) == len(nodes), "ascending and connected"


@given(scored_trees(), st.integers(0, 9))
def test_top_nodes_are_the_best_connected_subtree(tree_and_scores, budget):
    tree, scores = tree_and_scores
    nodes = tree.top_nodes(scores, budget)
    size = min(budget, tree.num_draft_tokens)
    best = max(sum(scores[node] for node in nodes) for nodes in connected_subtrees(tree, size))
    assert sum(scores[node] for node in nodes) == best


def test_top_nodes_prefer_the_earlier_of_equals():
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 0, 0))
    assert tree.top_nodes([0, -1, -1, -1], 2) == [0, 1, 2]
