"""Growing trees from explicit tables: shapes, budgets, and the best tree by brute force."""

import math
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import DraftBudget, SiblingDraw
from foretoken.drafters.growth import (
    BestFirst,
    DrawnTree,
    GrowingTree,
    StaticExpansion,
    _plan_best_first,
    draw_acceptance,
    estimate_draw,
)
from foretoken.errors import ConfigError
from foretoken.verifiers import k_seq
from tests.verifiers.enumeration import (
    IID,
    ROOT_ID,
    WITHOUT_REPLACEMENT,
    assert_lossless,
    draw_siblings,
    model,
    outcomes,
    rule,
)


def grow(table, policy, *, max_nodes, max_depth, own_depth=99, max_width=None):
    """Return the draft that a policy grows from a table of children, and the draft passes used.

    Args:
        table: Maps a path (token ids below the root) to its candidates, best first.
    """
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_depth, max_width=max_width)
    tree = GrowingTree(ROOT_ID, budget, policy, own_depth)
    num_passes = 0
    while tree.frontier:
        num_passes += 1
        width = tree.num_children
        levels = [table(tree.paths[node])[:width] for node in tree.frontier]
        tree.grow(
            [[token_id for token_id, _ in level] for level in levels],
            [[logprob for _, logprob in level] for level in levels],
        )
    return tree.finish("test", SiblingDraw.DETERMINISTIC), num_passes


def table_of(probs):
    """Return a table in which every node has the same children."""
    return lambda path: [(token_id, math.log(p)) for token_id, p in enumerate(probs, start=1)]


def paths_of(draft):
    return {sequence[1:] for sequence in draft.tree.sequences} - {()}


# -- static expansion ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "widths", [(1,), (3,), (1, 1, 1), (2, 2), (1, 1, 3, 1, 1), (2, 3, 1), (4, 1, 2)]
)
def test_expansion_gives_each_node_of_a_level_its_width(widths):
    table = table_of([0.4, 0.3, 0.2, 0.1])
    draft, num_passes = grow(table, StaticExpansion(widths), max_nodes=500, max_depth=len(widths))
    expected = set()
    for depth in range(1, len(widths) + 1):
        expected |= set(product(*(range(1, width + 1) for width in widths[:depth])))
    assert paths_of(draft) == expected
    assert num_passes == len(widths)


@pytest.mark.parametrize("max_nodes", range(12))
def test_budget_cuts_an_expansion_in_the_order_of_its_levels(max_nodes):
    table = table_of([0.5, 0.3, 0.2])
    draft, _ = grow(table, StaticExpansion((2, 2, 1)), max_nodes=max_nodes, max_depth=3)
    in_order = [(1,), (2,), *product((1, 2), repeat=2), *product((1, 2), (1, 2), (1,))]
    assert paths_of(draft) == set(in_order[:max_nodes])


@pytest.mark.parametrize("max_depth", range(5))
def test_depth_cuts_an_expansion(max_depth):
    table = table_of([0.5, 0.3, 0.2])
    draft, num_passes = grow(
        table, StaticExpansion((1, 2, 1)), max_nodes=50, max_depth=max_depth, own_depth=3
    )
    assert max(draft.tree.depths) == min(3, max_depth) == num_passes


@pytest.mark.parametrize(
    ("widths", "max_nodes", "passes"),
    [
        ((2, 2, 2), 2, 1),
        ((3, 1, 1), 3, 1),
        ((1, 1, 1, 1), 2, 2),
        ((2, 1, 1), 4, 2),
    ],
)
def test_no_pass_is_run_for_a_level_that_the_budget_cannot_hold(widths, max_nodes, passes):
    """A full budget used to cost one more draft pass, whose nodes were all dropped."""
    table = table_of([0.4, 0.3, 0.2])
    draft, num_passes = grow(
        table, StaticExpansion(widths), max_nodes=max_nodes, max_depth=9, own_depth=len(widths)
    )
    assert draft.tree.num_draft_tokens == max_nodes
    assert num_passes == passes


def test_ruled_out_tokens_leave_an_expansion_smaller():
    def table(path):
        return [(1, -0.1)] if path else [(1, -0.5), (2, -1.0)]

    draft, _ = grow(table, StaticExpansion((3, 3)), max_nodes=50, max_depth=2)
    assert paths_of(draft) == {(1,), (2,), (1, 1), (2, 1)}


@pytest.mark.parametrize("widths", [(), (0,), (2, 0, 1), (-1,)])
def test_impossible_expansions_are_refused(widths):
    with pytest.raises(ConfigError, match="at least 1 per level"):
        StaticExpansion(widths)


# -- best first ------------------------------------------------------------------------------

MAX_DEPTH = 3
WIDTH = 3


@st.composite
def probability_tables(draw):
    """Draw a table with three children per node, three levels deep; no two paths are equal."""
    table = {}
    for depth in range(MAX_DEPTH):
        for path in product((1, 2, 3), repeat=depth):
            weights = draw(st.tuples(*[st.integers(1, 1000)] * WIDTH))
            total = sum(weights) + draw(st.integers(0, 300))
            probs = {token_id: weight / total for token_id, weight in enumerate(weights, start=1)}
            ranked = sorted(probs.items(), key=lambda item: (-item[1], item[0]))
            table[path] = [(token_id, math.log(prob)) for token_id, prob in ranked]
    return table


def path_logprobs(table):
    """Return the log-probability of every path of a table."""
    totals = {(): 0.0}
    for path in sorted(table, key=len):
        for token_id, logprob in table[path]:
            totals[*path, token_id] = totals[path] + logprob
    return totals


@given(probability_tables(), st.integers(0, 5), st.integers(1, MAX_DEPTH))
def test_best_first_is_the_best_connected_tree(table, max_nodes, max_depth):
    draft, _ = grow(
        table.__getitem__,
        BestFirst(width=WIDTH, min_gain=0),
        max_nodes=max_nodes,
        max_depth=max_depth,
    )
    totals = path_logprobs(table)
    paths = [path for path in totals if 0 < len(path) <= max_depth]
    # The best set of any kind: that it hangs together is part of what is tested.
    best = sum(sorted((math.exp(totals[path]) for path in paths), reverse=True)[:max_nodes])
    found = sum(math.exp(totals[path]) for path in paths_of(draft))
    assert len(paths_of(draft)) == min(max_nodes, len(paths))
    assert math.isclose(found, best, rel_tol=1e-9, abs_tol=1e-12)


def test_best_first_equals_brute_force_over_connected_trees():
    table = {
        (): [(1, math.log(0.5)), (2, math.log(0.3)), (3, math.log(0.1))],
        (1,): [(1, math.log(0.9)), (2, math.log(0.05))],
        (2,): [(1, math.log(0.4)), (3, math.log(0.4))],
        (3,): [(1, math.log(0.99))],
        (1, 1): [(2, math.log(0.6)), (1, math.log(0.3))],
    }
    totals = path_logprobs(table)
    paths = [path for path in totals if path]
    for max_nodes in range(1, 7):
        connected = [
            chosen
            for chosen in combinations(paths, max_nodes)
            if all(path[:-1] in {(), *chosen} for path in chosen)
        ]
        best = max(connected, key=lambda chosen: sum(math.exp(totals[path]) for path in chosen))
        draft, _ = grow(
            lambda path: table.get(path, []),
            BestFirst(width=3, min_gain=0),
            max_nodes=max_nodes,
            max_depth=3,
        )
        value = sum(math.exp(totals[path]) for path in paths_of(draft))
        assert math.isclose(value, sum(math.exp(totals[path]) for path in best))


def test_certain_chain_becomes_a_chain():
    draft, num_passes = grow(
        table_of([0.98, 0.01, 0.005]), BestFirst(width=3, min_gain=0.1), max_nodes=5, max_depth=5
    )
    assert draft.tree.is_chain
    assert draft.tree.token_ids == (ROOT_ID, 1, 1, 1, 1, 1)
    assert num_passes == 5


def test_level_worth_less_than_min_gain_is_the_last():
    # Level d holds two kept nodes at first, worth 0.6 ** d and less.
    table = table_of([0.6])
    for min_gain, passes in [(0.0, 8), (0.07, 6), (0.22, 3), (0.61, 1), (5.0, 1)]:
        policy = BestFirst(width=2, min_gain=min_gain)
        draft, num_passes = grow(table, policy, max_nodes=8, max_depth=8)
        # A level is run when the one above it is worth min_gain: 0.6 ** (passes - 1) >= min_gain.
        assert num_passes == passes
        assert draft.tree.num_draft_tokens == passes


def test_estimates_are_those_of_the_kept_nodes():
    draft, _ = grow(table_of([0.5, 0.3]), BestFirst(width=2, min_gain=0), max_nodes=4, max_depth=3)
    for sequence, total in zip(
        map(draft.tree.sequence, range(len(draft.tree))), draft.path_logprobs(), strict=True
    ):
        expected = sum(math.log({1: 0.5, 2: 0.3}[token_id]) for token_id in sequence[1:])
        assert math.isclose(total, expected, abs_tol=1e-12)


@pytest.mark.parametrize(("width", "min_gain"), [(0, 0.1), (-2, 0.1), (2, -0.5)])
def test_impossible_growth_is_refused(width, min_gain):
    with pytest.raises(ConfigError, match="width is at least 1"):
        BestFirst(width=width, min_gain=min_gain)


@pytest.mark.parametrize(("max_nodes", "max_depth"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("policy", [StaticExpansion((2, 2)), BestFirst(width=2, min_gain=0)])
def test_empty_budget_grows_nothing(policy, max_nodes, max_depth):
    draft, num_passes = grow(table_of([0.5]), policy, max_nodes=max_nodes, max_depth=max_depth)
    assert draft.tree.token_ids == (ROOT_ID,)
    assert num_passes == 0


def test_best_first_does_not_run_a_level_that_cannot_enter_a_full_tree():
    """A chain as long as the budget used to cost one more draft pass than it could use."""
    budget = DraftBudget(max_nodes=2, max_depth=8)
    tree = GrowingTree(1, budget, BestFirst(width=1, min_gain=0.0), 8)
    num_passes = 0
    while tree.frontier:
        num_passes += 1
        tree.grow([[7] for _ in tree.frontier], [[math.log(0.9)] for _ in tree.frontier])
    assert num_passes == 2
    assert tree.finish("test", SiblingDraw.DETERMINISTIC).tree.token_ids == (1, 7, 7)


def test_min_gain_that_is_not_a_number_is_refused():
    with pytest.raises(ConfigError, match="min_gain"):
        BestFirst(width=1, min_gain=math.nan)


# -- width -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_width", [1, 2, 3])
@pytest.mark.parametrize("policy", [StaticExpansion((3, 1, 2)), BestFirst(width=4, min_gain=0)])
def test_no_node_gets_more_children_than_the_verifier_takes(policy, max_width):
    table = table_of([0.4, 0.3, 0.2, 0.1])
    draft, _ = grow(table, policy, max_nodes=9, max_depth=3, max_width=max_width)
    assert max(map(len, draft.tree.children)) == min(max_width, 3 if max_width > 2 else max_width)
    assert draft.tree.is_chain == (max_width == 1)
    assert max(draft.tree.depths) > 1


# -- samples ---------------------------------------------------------------------------------


def grow_drawn(draft_model, policy, siblings, dice, *, max_nodes, max_width=None, max_depth=3):
    """Return the draft that a policy grows from samples, and how many draws each level made."""
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_depth, max_width=max_width)
    tree = DrawnTree(ROOT_ID, budget, policy, max_depth)
    levels = []
    while tree.frontier:
        levels.append(list(tree.num_draws))
        drawn = []
        for node, count in zip(tree.frontier, tree.num_draws, strict=True):
            probs = draft_model(tree.paths[node])
            drawn.append((draw_siblings(probs, count, siblings, dice), probs))
        tree.grow_drawn(drawn)
    return tree.finish("test", siblings), levels


POLICIES = {
    "fixed": StaticExpansion((2, 1, 2)),
    "best first": BestFirst(width=2, min_gain=0),
    "best first that stops": BestFirst(width=3, min_gain=0.45),
}
SAMPLED_RULES = [
    ("mss", IID),
    ("k-seq", IID),
    ("traversal", IID),
    ("rrs", WITHOUT_REPLACEMENT),
    ("traversal", WITHOUT_REPLACEMENT),
]


@pytest.mark.parametrize("max_nodes", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "siblings"), SAMPLED_RULES)
def test_grown_samples_are_lossless_at_every_size(name, siblings, policy, max_nodes, monkeypatch):
    """Over fractions: what is drawn next depends on estimates, and the law is the target's."""
    monkeypatch.setattr(k_seq, "NUM_BISECTIONS", 4)
    target, draft_model = model(2, "P grown"), model(2, "Q grown", zeros=0)

    def draft_by(dice):
        args = (draft_model, POLICIES[policy], siblings, dice)
        draft, _ = grow_drawn(*args, max_nodes=max_nodes)
        assert draft.tree.num_draft_tokens <= max_nodes
        assert draft.prune(max_nodes) == draft  # the engine prunes to the budget once more
        return draft

    assert_lossless(rule(name), draft_by, target)


@pytest.mark.parametrize("name", ["rejection", "block"])
@pytest.mark.parametrize("policy", POLICIES)
def test_sampled_chains_for_chain_rules(name, policy):
    target, draft_model = model(3, "P chain"), model(3, "Q chain")

    def draft_by(dice):
        args = (draft_model, POLICIES[policy], IID, dice)
        draft, _ = grow_drawn(*args, max_nodes=3, max_width=1)
        assert draft.tree.is_chain
        return draft

    assert_lossless(rule(name), draft_by, target)


@pytest.mark.parametrize("siblings", [IID, WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_level_draws_does_not_depend_on_the_level_itself(policy, siblings):
    """Drafts that are equal above a level ask for equally many draws at each of its nodes."""
    draft_model, asked = model(3, "asked", zeros=0), {}

    def run(dice):
        return grow_drawn(draft_model, POLICIES[policy], siblings, dice, max_nodes=4)

    for (draft, levels), _ in outcomes(run):
        for depth, counts in enumerate(levels):
            above = []
            for node, groups in draft.draws.items():
                if draft.tree.depths[node] < depth:
                    above.append((node, tuple(draft.tree.token_ids[c] for c in groups[0].nodes)))
            assert asked.setdefault((depth, tuple(above)), counts) == counts
    assert len(asked) > 3


def test_draws_that_are_equal_share_a_node_and_keep_their_count():
    tree = DrawnTree(
        ROOT_ID, DraftBudget(max_nodes=9, max_depth=2), StaticExpansion((4, 1)), max_depth=2
    )
    probs = model(3, "equal", zeros=0)(())
    tree.grow_drawn([([2, 0, 2, 2], probs)])
    assert (tree.token_ids, tree.num_draws) == ([ROOT_ID, 2, 0], [1, 1])
    tree.grow_drawn([([1], probs), ([1], probs)])
    draft = tree.finish("test", IID)
    assert draft.draws[0][0].nodes == (1, 2, 1, 1)
    assert (draft.draws[1][0].nodes, draft.draws[2][0].nodes) == ((3,), (4,))


def test_a_level_counts_draws_not_nodes_against_the_budget():
    """Three draws of one token leave two of the four nodes to the next level, not to their own."""
    tree = DrawnTree(
        ROOT_ID, DraftBudget(max_nodes=4, max_depth=3), StaticExpansion((3, 3, 3)), max_depth=3
    )
    probs = model(3, "count", zeros=0)(())
    assert tree.num_draws == [3]
    tree.grow_drawn([([1, 1, 2], probs)])
    assert (tree.frontier, tree.num_draws) == ([1, 2], [1, 1])  # two left, shared
    tree.grow_drawn([([0], probs), ([0], probs)])
    assert tree.frontier == []


def test_a_short_supply_of_draws_ends_the_paths_that_get_none():
    tree = DrawnTree(
        ROOT_ID, DraftBudget(max_nodes=4, max_depth=3), StaticExpansion((3, 2)), max_depth=2
    )
    tree.grow_drawn([([2, 0, 1], model(3, "short", zeros=0)(()))])
    assert (tree.frontier, tree.num_draws) == ([1], [1])


def test_best_first_draws_deep_where_the_draft_is_sure_and_wide_at_the_root():
    certain = DrawnTree(
        ROOT_ID, DraftBudget(max_nodes=8, max_depth=8), BestFirst(width=4, min_gain=0), 8
    )
    sure = model(1, "sure", zeros=0)(())
    counts = []
    while certain.frontier:
        counts.append(certain.num_draws)
        certain.grow_drawn([([0] * count, sure) for count in certain.num_draws])
    assert len(counts) > 4  # mostly a chain
    wide = DrawnTree(
        ROOT_ID, DraftBudget(max_nodes=8, max_depth=1), BestFirst(width=4, min_gain=0), 8
    )
    assert wide.num_draws == [4]


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    st.integers(0, 12),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_the_plan_of_a_level_is_that_of_the_best_tree(estimates, num_draws, width, num_levels):
    """By brute force: all draws that there could be, sorted by their chance to be accepted."""
    draws = []

    def add(index, chance, level):
        for place in range(width):
            gain = chance * draw_acceptance(place)
            draws.append((gain, index if level == 0 else None))
            if level + 1 < num_levels:
                add(index, gain, level + 1)

    for index, estimate in enumerate(estimates):
        add(index, estimate, 0)
    counts = _plan_best_first(estimates, num_draws, width, num_levels)
    gains = sorted((gain for gain, _ in draws), reverse=True)
    least = gains[:num_draws][-1] if num_draws else math.inf  # among equals any may be chosen
    for index, count in enumerate(counts):
        own = [gain for gain, place in draws if place == index]
        assert sum(gain > least * (1 + 1e-9) for gain in own) <= count
        assert count <= sum(gain >= least * (1 - 1e-9) for gain in own)
    assert sum(counts) <= num_draws


def test_best_first_stops_drawing_when_a_level_is_worth_too_little():
    tree = DrawnTree(
        ROOT_ID, DraftBudget(max_nodes=30, max_depth=30), BestFirst(width=1, min_gain=0.4), 30
    )
    unlikely = model(9, "unlikely", zeros=0)(())
    num_levels = 0
    while tree.frontier:
        num_levels += 1
        worth = math.exp(tree.totals[tree.frontier[0]])
        assert worth >= 0.4
        tree.grow_drawn([([8], unlikely)])
    assert math.exp(tree.totals[-1]) < 0.4
    assert num_levels > 1


def test_later_and_unlikelier_draws_are_estimated_lower():
    places = [draw_acceptance(place) for place in range(12)]
    assert places == sorted(places, reverse=True)
    assert places[-1] > 0
    assert sum(places) < 1
    for place in range(5):
        estimates = [estimate_draw(place, q) for q in (1e-9, 0.1, 0.5, 1.0)]
        assert estimates == sorted(estimates)
        assert estimates[-1] <= 0
    assert estimate_draw(0, 0.5) > estimate_draw(1, 0.5)
