"""Which rule accepts more: exact means over random distributions, on the same drafts."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.verifiers.enumeration import (
    IID,
    WITHOUT_REPLACEMENT,
    emitted_law,
    fixed_tree,
    mean_accepted,
    rule,
    sample_tree,
)

FEW = settings(max_examples=25, deadline=None)
VOCAB_SIZE = 3
MAX_DEPTH = 3


@st.composite
def models(draw):
    """Draw a function from paths to distributions, some entries zero."""
    weights = st.lists(st.integers(0, 5), min_size=VOCAB_SIZE, max_size=VOCAB_SIZE).filter(any)
    rows = draw(st.lists(weights, min_size=4, max_size=4))
    table = [np.array([Fraction(weight, sum(row)) for weight in row]) for row in rows]
    return lambda path: table[(len(path) + 2 * sum(path)) % len(table)]


def mean(name, widths, siblings, target, draft):
    law = emitted_law(rule(name), lambda dice: sample_tree(draft, widths, siblings, dice), target)
    return mean_accepted(law)


@FEW
@given(models(), models(), st.sampled_from([(1,), (2,), (3,), (1, 1), (2, 1)]))
def test_mss_accepts_at_least_what_naive_sampling_does(target, draft, widths):
    """SpecInfer's Theorem 4.3, and that it carries over to more than one level."""
    args = (widths, IID, target, draft)
    assert mean("mss", *args) >= mean("naive", *args)


@FEW
@given(models(), models(), st.integers(1, MAX_DEPTH))
def test_block_accepts_at_least_what_rejection_does(target, draft, depth):
    args = ((1,) * depth, IID, target, draft)
    assert mean("block", *args) >= mean("rejection", *args)


@FEW
@given(models(), models(), st.sampled_from([(1, 1), (2,), (2, 1), (1, 2), (3, 1)]))
def test_traversal_accepts_at_least_what_rrs_does(target, draft, widths):
    args = (widths, WITHOUT_REPLACEMENT, target, draft)
    assert mean("traversal", *args) >= mean("rrs", *args)


@FEW
@given(models(), models(), st.sampled_from([(2,), (2, 1), (1, 2)]))
def test_traversal_accepts_at_least_what_mss_does(target, draft, widths):
    args = (widths, IID, target, draft)
    assert mean("traversal", *args) >= mean("mss", *args)


@FEW
@given(models(), models(), st.integers(1, MAX_DEPTH))
def test_on_a_chain_traversal_is_block_and_recursive_rejection_is_rejection(target, draft, depth):
    """Not only the same mean: the same law of what is emitted."""

    def law(name, siblings):
        widths = (1,) * depth
        return emitted_law(
            rule(name), lambda dice: sample_tree(draft, widths, siblings, dice), target
        )

    assert law("traversal", IID) == law("traversal", WITHOUT_REPLACEMENT) == law("block", IID)
    rejection = law("rejection", IID)
    assert law("mss", IID) == law("rrs", WITHOUT_REPLACEMENT) == rejection
    assert law("k-seq", IID) == rejection


@FEW
@given(models(), models(), st.integers(2, 3))
def test_one_level_of_k_draws(target, draft, width):
    """k-seq never reaches less than 1 - 1/e of the best rule, so of mss; one draw less is less."""
    k_seq = mean("k-seq", (width,), IID, target, draft)
    mss = mean("mss", (width,), IID, target, draft)
    assert k_seq >= mss * Fraction(63, 100)
    assert mss >= mean("mss", (width - 1,), IID, target, draft)


@FEW
@given(models(), models())
def test_one_draw_is_accepted_as_often_as_any_rule_can(target, draft):
    """The overlap of p and q is the most that one sample can be accepted (total variation)."""
    overlap = np.minimum(target(()), draft(())).sum()
    for name in ("rejection", "block", "traversal", "mss", "k-seq"):
        assert mean(name, (1,), IID, target, draft) == overlap


def test_block_gains_where_a_weak_token_is_made_up_for():
    """An instance with a strict gain, by hand: p = (1/3, 2/3), q = (2/3, 1/3) at both positions.

    Token by token a chain is accepted with 2/3 + 4/9 = 10/9 on average. As a block, "00" has
    weight 1/4, "01" and "10" up to 1 and 1/2, and 11 stands for sure: 11/9 (the paper's example).
    """
    third = Fraction(1, 3)
    target, draft = (np.array([third, 2 * third]), np.array([2 * third, third]))
    args = ((1, 1), IID, lambda path: target, lambda path: draft)
    assert mean("rejection", *args) == Fraction(10, 9)
    assert mean("block", *args) == Fraction(11, 9)


@pytest.mark.parametrize("seed_path", [(0,), (2,), (1, 0)])
def test_point_masses_are_accepted_as_by_naive_sampling(seed_path):
    draft = fixed_tree([seed_path])
    probs = np.array([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)])
    laws = [
        emitted_law(rule(name), lambda dice: draft, lambda path: probs)
        for name in ("rejection", "naive")
    ]
    assert laws[0] == laws[1]
