"""Sequoia's trees: exact against brute force, and the machine's say in their size."""

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.core.tree import TokenTree
from foretoken.errors import ConfigError
from foretoken.planner.sequoia import TreeTable, best_tree, choose_tree, greedy_tree

RISING = (0.1, 0.6, 0.2)  # a good child behind a bad one
FALLING = (0.6, 0.2, 0.1)


@cache
def shapes(num_nodes, depth, num_ranks):
    """Return every ordered tree of so many nodes as nested tuples of children."""
    if num_nodes == 1:
        return ((),)
    if depth == 0:
        return ()
    return tuple(forests(num_nodes - 1, depth - 1, num_ranks, num_ranks))


@cache
def forests(num_nodes, depth, num_ranks, most):
    """Return every sequence of at most `most` trees with so many nodes together."""
    if num_nodes == 0:
        return ((),)
    if most == 0:
        return ()
    return tuple(
        (first, *rest)
        for size in range(1, num_nodes + 1)
        for first in shapes(size, depth, num_ranks)
        for rest in forests(num_nodes - size, depth, num_ranks, most - 1)
    )


def shape_value(shape, acceptances):
    return 1 + sum(
        a * shape_value(child, acceptances) for a, child in zip(acceptances, shape, strict=False)
    )


def tree_value(parents, acceptances):
    """Return the expected tokens of a parents list by walking it."""
    reached, num_children = [1.0], [0] * len(parents)
    for parent in parents[1:]:
        reached.append(reached[parent] * acceptances[num_children[parent]])
        num_children[parent] += 1
    return math.fsum(reached)


@pytest.mark.parametrize("acceptances", [FALLING, RISING, (0.5,), (0.3, 0.3, 0.3), (0.4, 0.0, 0.3)])
def test_best_tree_is_that_of_brute_force(acceptances):
    table = TreeTable(acceptances, max_nodes=7, max_depth=4)
    for num_nodes in range(1, 8):
        for depth in range(5):
            every = shapes(num_nodes, depth, len(acceptances))
            tree = table.best(num_nodes, depth)
            if not every:
                assert tree is None
                continue
            expected = max(shape_value(shape, acceptances) for shape in every)
            assert tree.expected_tokens == pytest.approx(expected)
            assert tree_value(tree.parents, acceptances) == pytest.approx(expected)
            assert len(tree.parents) == num_nodes
            assert tree.depth <= depth


def test_brute_force_counts_all_ordered_trees():
    """Catalan numbers: 1, 1, 2, 5, 14 ordered trees of 1 to 5 nodes."""
    assert [len(shapes(size, 9, 9)) for size in range(1, 6)] == [1, 1, 2, 5, 14]


def test_parents_make_a_token_tree():
    tree = best_tree(FALLING, num_nodes=12, max_depth=4)
    token_tree = TokenTree(tuple(range(12)), tree.parents)
    assert max(token_tree.depths) == tree.depth
    assert list(token_tree.depths) == sorted(token_tree.depths)  # level by level


@settings(deadline=None, max_examples=60)
@given(
    raw=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    num_nodes=st.integers(1, 24),
    max_depth=st.integers(0, 6),
)
def test_greedy_is_as_good_as_the_best_where_acceptance_falls_with_rank(raw, num_nodes, max_depth):
    total = sum(raw)
    falling = sorted((value / max(1.0, total) for value in raw), reverse=True)
    best = best_tree(falling, num_nodes=num_nodes, max_depth=max_depth)
    greedy = greedy_tree(falling, num_nodes=num_nodes, max_depth=max_depth)
    assert greedy.expected_tokens == pytest.approx(best.expected_tokens)
    assert tree_value(greedy.parents, falling) == pytest.approx(greedy.expected_tokens)
    assert len(greedy.parents) == len(best.parents) <= num_nodes


def test_greedy_misses_a_good_child_behind_a_bad_one():
    """Three children are worth 1.95; the second, at 0.05, keeps greedy from the third."""
    hidden = (0.3, 0.05, 0.6)
    best = best_tree(hidden, num_nodes=4, max_depth=3)
    greedy = greedy_tree(hidden, num_nodes=4, max_depth=3)
    assert best.expected_tokens == pytest.approx(1.95)
    assert tree_value(greedy.parents, hidden) == pytest.approx(greedy.expected_tokens)
    assert greedy.expected_tokens < 1.5


def test_a_tree_beats_a_chain_of_as_many_nodes():
    chain = best_tree(FALLING[:1], num_nodes=9, max_depth=8)
    tree = best_tree(FALLING, num_nodes=9, max_depth=8)
    assert tree.expected_tokens > chain.expected_tokens + 0.3


def test_fewer_nodes_where_depth_and_ranks_hold_no_more():
    tree = best_tree((0.5, 0.3), num_nodes=50, max_depth=2)
    assert len(tree.parents) == 1 + 2 + 4


def choose(**changes):
    values = {"draft_ms": 1.0, "verify_ms": lambda rows: 20.0 + 0.5 * rows, "max_nodes": 24}
    return choose_tree(FALLING, **{**values, "max_depth": 6, **changes})


def test_choice_minimises_time_per_token_over_every_size_and_depth():
    table = TreeTable(FALLING, max_nodes=24, max_depth=6)
    every = [20.5] + [
        (depth * 1.0 + 20.0 + 0.5 * nodes) / tree.expected_tokens
        for nodes in range(2, 25)
        for depth in range(1, 7)
        if (tree := table.best(nodes, depth)) is not None
    ]
    chosen = choose()
    assert chosen.ms_per_token == pytest.approx(min(every))
    assert 1 < len(chosen.tree.parents) < 24


def test_dear_drafting_makes_shallow_trees_and_dear_rows_small_ones():
    usual = choose()
    assert choose(draft_ms=4.0).tree.depth < usual.tree.depth
    dear = choose(verify_ms=lambda rows: 20.0 + 3.0 * rows)
    assert len(dear.tree.parents) < len(usual.tree.parents)


def test_plain_decoding_where_no_tree_pays():
    chosen = choose(draft_ms=30.0)
    assert chosen.tree.parents == (-1,)
    assert chosen.step_ms == 20.5


def test_large_tables_are_filled_in_native_time():
    tree = best_tree((0.7, 0.12, 0.06, 0.03), num_nodes=256, max_depth=20)
    assert len(tree.parents) == 256
    assert tree_value(tree.parents, (0.7, 0.12, 0.06, 0.03)) == pytest.approx(tree.expected_tokens)


@pytest.mark.parametrize("acceptances", [(0.7, 0.5), (-0.1, 0.5), (float("nan"),)])
def test_what_is_no_distribution_is_refused(acceptances):
    with pytest.raises(ConfigError, match="probabilities of different outcomes"):
        best_tree(acceptances, num_nodes=4, max_depth=2)


def test_a_tree_has_at_least_its_root():
    with pytest.raises(ConfigError, match="max_nodes=0"):
        best_tree((0.5,), num_nodes=0, max_depth=2)
