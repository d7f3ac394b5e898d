"""Every lossless rule has exactly the target's law: by enumeration, over fractions."""

from fractions import Fraction

import numpy as np
import pytest

from foretoken.core.draft import Draft, Draws, merge_drafts
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import Exactness
from foretoken.errors import RequestError
from foretoken.verifiers import VERIFIERS, k_seq
from tests.verifiers.enumeration import (
    IID,
    WITHOUT_REPLACEMENT,
    assert_lossless,
    continued,
    emitted_law,
    fixed_tree,
    mean_accepted,
    model,
    rule,
    sample_tree,
    target_law,
)

# (vocabulary, samples per level); a chain has one everywhere.
CHAINS = [(2, (1,)), (4, (1,)), (3, (1, 1)), (2, (1, 1, 1)), (3, (1, 1, 1))]
TREES = [(2, (2,)), (3, (2,)), (4, (3,)), (3, (2, 1)), (2, (2, 2)), (2, (3, 1)), (2, (1, 2, 1))]
TREE_RULES = [
    ("mss", IID),
    ("k-seq", IID),
    ("traversal", IID),
    ("rrs", WITHOUT_REPLACEMENT),
    ("traversal", WITHOUT_REPLACEMENT),
]
ANY_TREE_RULES = [("naive", IID), ("naive", WITHOUT_REPLACEMENT)]
CHAIN_RULES = [(name, way) for name in ("rejection", "block") for way in (IID, WITHOUT_REPLACEMENT)]


@pytest.fixture(autouse=True)
def _few_bisections(monkeypatch):
    """Let k-seq halve a few times: exact after any number, and small fractions are quick."""
    monkeypatch.setattr(k_seq, "NUM_BISECTIONS", 4)


def drafted(draft_model, widths, siblings):
    return lambda dice: sample_tree(draft_model, widths, siblings, dice)


def test_the_rules_here_are_all_that_claim_the_targets_distribution():
    listed = {name for name, _ in TREE_RULES + ANY_TREE_RULES + CHAIN_RULES}
    claimed = {n for n in VERIFIERS if VERIFIERS.load(n).exactness is Exactness.DISTRIBUTION}
    assert claimed == listed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("vocab_size", "widths"), CHAINS)
@pytest.mark.parametrize(("name", "siblings"), TREE_RULES + CHAIN_RULES)
def test_sampled_chains(name, siblings, vocab_size, widths, seed):
    target, draft = model(vocab_size, f"p{seed}"), model(vocab_size, f"q{seed}")
    assert_lossless(rule(name), drafted(draft, widths, siblings), target)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab_size", "widths"), TREES)
@pytest.mark.parametrize(("name", "siblings"), TREE_RULES + ANY_TREE_RULES)
def test_sampled_trees(name, siblings, vocab_size, widths, seed):
    target, draft = model(vocab_size, f"P{seed}"), model(vocab_size, f"Q{seed}")
    assert_lossless(rule(name), drafted(draft, widths, siblings), target)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["rejection", "block"])
@pytest.mark.parametrize("sequence", [(0,), (2,), (1, 0), (2, 2), (0, 1, 2), (1, 1, 0)])
def test_copied_chains_count_as_point_masses(name, sequence, seed):
    target = model(3, f"copied {seed}")
    draft = fixed_tree([sequence])
    mean = assert_lossless(rule(name), lambda dice: draft, target)
    # Each token is accepted with its own probability: no rule for a fixed chain does better.
    odds, expected = Fraction(1), Fraction(0)
    for depth, token_id in enumerate(sequence):
        odds *= target(sequence[:depth])[token_id]
        expected += odds
    assert mean == expected


@pytest.mark.parametrize("seed", range(3))
def test_naive_takes_any_tree(seed):
    target = model(3, f"any {seed}")
    draft = fixed_tree([(0, 1), (0, 2, 2), (2,)])
    assert_lossless(rule("naive"), lambda dice: draft, target)


# -- degenerate distributions ----------------------------------------------------------------


def constant(*weights):
    probs = np.array([Fraction(weight, sum(weights)) for weight in weights])
    return lambda path: probs


EDGES = {
    "equal": (constant(1, 2, 3), constant(1, 2, 3)),
    "disjoint": (constant(1, 2, 0), constant(0, 0, 1)),
    "target sure": (constant(0, 1, 0), constant(1, 1, 2)),
    "draft sure": (constant(1, 2, 1), constant(0, 1, 0)),
    "both sure, alike": (constant(0, 1, 0), constant(0, 1, 0)),
    "both sure, apart": (constant(0, 1, 0), constant(1, 0, 0)),
    "target cut by top-k": (constant(3, 1, 0), constant(1, 1, 1)),
    "draft of smaller support": (constant(1, 1, 1), constant(0, 1, 3)),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("widths", [(1, 1), (3,), (2, 2)])
@pytest.mark.parametrize(("name", "siblings"), TREE_RULES)
def test_degenerate_distributions(name, siblings, widths, edge):
    """0 / 0 in residuals, draws that are used up, p and q with zeros, p equal to q."""
    target, draft = EDGES[edge]
    mean = assert_lossless(rule(name), drafted(draft, widths, siblings), target)
    if edge in ("equal", "both sure, alike"):
        assert mean == len(widths)
    if edge in ("disjoint", "both sure, apart"):
        assert mean == 0


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("name", "siblings"), CHAIN_RULES)
def test_degenerate_chains(name, siblings, edge):
    target, draft = EDGES[edge]
    assert_lossless(rule(name), drafted(draft, (1, 1, 1), siblings), target)


@pytest.mark.parametrize("name", ["rrs", "traversal"])
def test_a_whole_support_drawn_leaves_nothing_undrafted(name):
    """All three tokens are drawn, so the next one is always among them."""
    target, draft = constant(5, 2, 1), constant(1, 2, 3)
    law = emitted_law(rule(name), drafted(draft, (3,), WITHOUT_REPLACEMENT), target)
    assert mean_accepted(law) == 1
    # A fourth draw is asked for and not made.
    law = emitted_law(rule(name), drafted(draft, (4,), WITHOUT_REPLACEMENT), target)
    assert mean_accepted(law) == 1


# -- bounds ----------------------------------------------------------------------------------

CUTS = [(2, (2, 2)), (3, (2, 1)), (2, (3, 1)), (2, (1, 2, 1))]


@pytest.mark.parametrize("max_nodes", range(1, 6))
@pytest.mark.parametrize(("vocab_size", "widths"), CUTS)
@pytest.mark.parametrize(("name", "siblings"), TREE_RULES)
def test_any_bound_on_nodes_leaves_the_law_alone(name, siblings, vocab_size, widths, max_nodes):
    """What is cut depends on counts alone: pruning by what was drawn would show here."""
    target, draft = model(vocab_size, "P cut"), model(vocab_size, "Q cut", zeros=0)

    def cut(dice):
        pruned = sample_tree(draft, widths, siblings, dice).prune(max_nodes)
        assert pruned.tree.num_draft_tokens <= max_nodes
        return pruned

    assert_lossless(rule(name), cut, target)


def test_keeping_equal_draws_because_they_fit_would_be_biased():
    """The trap: two draws, room for one node, and the second kept only if it costs none."""
    target, draft = constant(3, 2, 1), constant(1, 1, 4)

    def fitted(dice):
        drawn = sample_tree(draft, (2,), IID, dice)
        return drawn if drawn.tree.num_draft_tokens <= 1 else drawn.prune(1)

    law = emitted_law(rule("mss"), fitted, target)
    assert law_of_first(law, target) != target_law(target, 1)
    assert_lossless(rule("mss"), lambda dice: sample_tree(draft, (2,), IID, dice).prune(1), target)


def test_keeping_the_likeliest_draws_would_be_biased():
    """The trap: of two draws without replacement the one that the draft model prefers stays."""
    target, draft = constant(3, 1, 1), constant(1, 3, 1)

    def likeliest(dice):
        drawn = sample_tree(draft, (2,), WITHOUT_REPLACEMENT, dice)
        return one_child(max(drawn.tree.token_ids[1:], key=draft(()).__getitem__), draft(()))

    law = emitted_law(rule("rrs"), likeliest, target)
    assert law_of_first(law, target) != target_law(target, 1)


def one_child(token_id, probs, siblings=WITHOUT_REPLACEMENT):
    """Return a draft that claims one token as a sample of some distribution."""
    draws = {0: (Draws(nodes=(1,), probs=probs),)}
    return Draft.from_drafter(
        "claims", TokenTree.chain([0, token_id]), siblings=siblings, draws=draws
    )


def law_of_first(law, target):
    return continued(law, target, 1)


# -- several drafters ------------------------------------------------------------------------


@pytest.mark.parametrize("max_nodes", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("name", "siblings"), [("mss", IID), ("rrs", WITHOUT_REPLACEMENT)])
@pytest.mark.parametrize("widths", [((1,), (1,)), ((2,), (1, 1)), ((1, 1), (1, 1))])
def test_merged_samples_of_two_drafters(name, siblings, widths, max_nodes):
    target = model(2, "P merged")
    first, second = model(2, "Q first", zeros=0), model(2, "Q second", zeros=0)

    def merged(dice):
        drafts = [
            sample_tree(first, widths[0], siblings, dice, name="first"),
            sample_tree(second, widths[1], siblings, dice, name="second"),
        ]
        return merge_drafts(drafts).prune(max_nodes)

    assert_lossless(rule(name), merged, target)


# -- the documented trap ---------------------------------------------------------------------


def test_mss_on_the_likeliest_tokens_with_the_drafts_q_is_biased():
    """SpecInfer's children must be samples: top-k children tested as samples are over-accepted.

    The target finds all three tokens equally likely. The draft's favourite, proposed each time,
    is taken 2/3 of the time, not 1/3 of it: the check refuses such drafts.
    """
    target, draft = constant(1, 1, 1), constant(2, 1, 1)
    top_one = one_child(0, draft(()), siblings=IID)
    first = law_of_first(emitted_law(rule("mss"), lambda dice: top_one, target), target)
    assert first[0,] == Fraction(2, 3)
    assert target_law(target, 1)[0,] == Fraction(1, 3)
    # What it is: a draft without chance, which only says so if nobody claims that it is a sample.
    with pytest.raises(RequestError, match="takes siblings drawn as iid; got deterministic ones"):
        rule("mss").check(fixed_tree([(0,)]))


def test_typical_acceptance_is_lossy_by_exact_numbers():
    """p = (1/2, 1/4, 1/4): a drafted token of 1/4 passes for sure, so it comes out 100 % and more.

    The threshold is min(0.09, 0.3 * exp(-H)) = 0.09 here; 1/4 is above it.
    """
    target = constant(2, 1, 1)
    draft = fixed_tree([(2,)])
    law = continued(emitted_law(rule("typical"), lambda dice: draft, target), target, 1)
    assert law == {(2,): 1}
    assert target_law(target, 1)[2,] == Fraction(1, 4)
    assert rule("typical").exactness is Exactness.LOSSY


@pytest.mark.parametrize("name", [n for n in VERIFIERS if n != "coupled"])
def test_empty_drafts_are_plain_sampling(name):
    target = model(3, "empty")
    law = emitted_law(rule(name), lambda dice: fixed_tree([]), target)
    assert law == target_law(target, 1)
