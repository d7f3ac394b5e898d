"""Trees of what followed earlier occurrences: against a search written the plain way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import DraftBudget
from foretoken.drafters.copying import NOTHING, Occurrences, Shape, best_tree
from foretoken.drafters.suffix_index import SuffixIndex
from tests.drafters.test_suffix_index import find_own


def shape(max_nodes=16, max_depth=16, max_width=16, per_match=2.0, offset=1, min_prob=0.05):
    return Shape(max_nodes, max_depth, max_width, per_match, offset, min_prob)


def occurrences(texts, starts, lengths, end=-1):
    return Occurrences(
        np.array(texts, np.int32), np.array(starts, np.int64), np.array(lengths, np.int64), end
    )


def plain_tree(followers, length, bounds):
    """Return [(path, probability of its last token, of the whole path)], best first.

    Args:
        followers: For each occurrence a function from a path to its next token or None.
        length: Of the match.
        bounds: A `Shape`.
    """
    max_depth = min(bounds.max_depth, int(bounds.depth_per_match * length) + bounds.depth_offset)
    taken, width_of = [], {}
    candidates, born = [], 0

    def expand(path, members, total):
        nonlocal born
        going_on = [(follow(path), follow) for follow in members]
        going_on = [(token_id, follow) for token_id, follow in going_on if token_id is not None]
        groups = {}
        for token_id, follow in going_on:
            groups.setdefault(token_id, []).append(follow)
        for token_id, group in groups.items():  # in the order of first occurrences
            prob = len(group) / (len(going_on) + 1 / (length + len(path) + 1))
            candidates.append((-total * prob, born, path, token_id, prob, group))
            born += 1

    if max_depth > 0:
        expand((), followers, 1.0)
    while candidates and len(taken) < bounds.max_nodes:
        best = min(candidates, key=lambda entry: entry[:2])
        candidates.remove(best)
        negative, _, path, token_id, prob, group = best
        if -negative < bounds.min_prob:
            break
        if width_of.get(path, 0) == bounds.max_width:
            continue
        width_of[path] = width_of.get(path, 0) + 1
        taken.append(((*path, token_id), prob, -negative))
        if len(path) + 1 < max_depth:
            expand((*path, token_id), group, -negative)
    return taken


def plain_best(found, bounds):
    """Return the tree of the highest score over the eight longest lengths."""
    texts = found.tokens.tolist()

    def follower(start):
        def follow(path):
            place = start + len(path)
            if 0 <= found.end <= place:
                return path[place - found.end]
            token_id = texts[place % len(texts)]
            return token_id if token_id >= 0 else None

        return follow

    best, best_score = [], 0.0
    for length in sorted(set(found.lengths.tolist()), reverse=True)[:8]:
        members = [
            (-size, follower(start))
            for start, size in zip(found.starts.tolist(), found.lengths.tolist(), strict=True)
            if size >= length
        ]
        members.sort(key=lambda entry: entry[0])
        tree = plain_tree([follow for _, follow in members], length, bounds)
        score = sum(total for _, _, total in tree)
        if score > best_score:
            best, best_score = tree, score
    return best, best_score


def paths_of(tree):
    paths = [()]
    for token_id, parent in zip(tree.token_ids, tree.parents, strict=True):
        paths.append((*paths[parent], token_id))
    return paths[1:]


bounds = st.builds(
    shape,
    max_nodes=st.integers(1, 12),
    max_depth=st.integers(1, 6),
    max_width=st.integers(1, 4),
    per_match=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    offset=st.integers(0, 3),
    min_prob=st.sampled_from([0.0, 0.05, 0.3]),
)


def assert_equal(tree, expected, score):
    assert paths_of(tree) == [path for path, _, _ in expected]
    assert tree.probs == pytest.approx([prob for _, prob, _ in expected], rel=1e-12)
    assert tree.score == pytest.approx(score, rel=1e-12)


@given(st.lists(st.integers(-1, 3), min_size=2, max_size=60), st.data(), bounds)
def test_tree_of_separated_texts_equals_a_plain_search(texts, data, limits):
    texts = [*texts, -1]
    count = data.draw(st.integers(0, 12))
    starts = data.draw(st.lists(st.integers(0, len(texts) - 2), min_size=count, max_size=count))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    found = occurrences(texts, starts, lengths)
    assert_equal(best_tree(found, limits), *plain_best(found, limits))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), bounds)
def test_tree_of_the_context_itself_reads_its_own_copy_past_the_end(text, limits):
    index = SuffixIndex(1000)
    index.extend(text)
    found = find_own(index, 8, 50)
    assert_equal(best_tree(found, limits), *plain_best(found, limits))


def test_one_occurrence_is_estimated_by_laplaces_rule():
    tree = best_tree(occurrences([1, 2, 3, 4, -1], [3], [3]), shape())
    assert tree.token_ids == [4]
    assert tree.probs == pytest.approx([4 / 5])


def test_frequent_continuations_come_first_and_siblings_share():
    tree = best_tree(occurrences([7, -1, 8, -1, 8, -1], [0, 2, 4], [5, 5, 5]), shape())
    assert tree.token_ids == [8, 7]
    assert tree.probs == pytest.approx([2 / (3 + 1 / 6), 1 / (3 + 1 / 6)])


def test_depth_grows_with_the_match():
    texts = [*range(50), -1]
    depths = [
        len(best_tree(occurrences(texts, [0], [length]), shape(99, 99, per_match=1.5)).token_ids)
        for length in (1, 2, 4, 10)
    ]
    assert depths == [2, 4, 7, 16]


def test_long_match_wins_over_frequent_short_ones():
    texts = [*[9, -1] * 20, *[1, 2, 3, 4, 5, 6, -1]]
    found = occurrences(texts, [*range(0, 40, 2), 40], [1] * 20 + [6])
    assert best_tree(found, shape()).token_ids == [1, 2, 3, 4, 5, 6]


def test_a_ring_is_read_across_its_edge():
    assert best_tree(occurrences([3, -1, 1, 2], [2], [9]), shape()).token_ids == [1, 2, 3]


@pytest.mark.parametrize("bound", [{"max_nodes": 0}, {"max_depth": 0}])
def test_nothing_comes_of_an_empty_budget(bound):
    assert best_tree(occurrences([1, -1], [0], [2]), shape(**bound)) is NOTHING


def test_a_draft_carries_logs_of_the_estimates():
    draft = best_tree(occurrences([1, 2, -1], [0], [3]), shape()).as_draft(6, "it")
    assert draft.tree.sequences == {(6,), (6, 1), (6, 1, 2)}
    assert draft.draft_logprobs == pytest.approx((0, math.log(4 / 5), math.log(5 / 6)))
    assert draft.source == ("", "it", "it")


def test_shape_takes_over_the_budget():
    budget = DraftBudget(max_nodes=5, max_depth=3, max_width=2)
    assert Shape.within(budget, depth_per_match=1, depth_offset=4, min_prob=0)[:5] == (
        5,
        3,
        2,
        1.0,
        4,
    )
    assert (
        Shape.within(
            DraftBudget(max_nodes=5, max_depth=3), depth_per_match=1, depth_offset=4, min_prob=0
        ).max_width
        == 5
    )
