"""What rules do in floating point and at their borders; their laws are in `test_lossless`."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from foretoken.core.draft import Draft, Draws, SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT, TokenTree
from foretoken.errors import ConfigError, RequestError
from foretoken.verifiers.base import TargetRows
from foretoken.verifiers.block import stands
from foretoken.verifiers.dice import (
    GeneratorDice,
    excess,
    point_mass,
    ratio,
    residual,
    without,
)
from foretoken.verifiers.k_seq import find_division
from foretoken.verifiers.typical import TypicalVerifier
from tests.engines import sampled
from tests.goodness import FALSE_FAILURE, fit_probability
from tests.verifiers.enumeration import IID, fixed_tree, rule

PROBS = np.array([0.4, 0.0, 0.1, 0.3, 0.2, 0.0])
SAMPLE_RULES = ["rejection", "mss", "rrs", "k-seq", "block", "traversal"]


# -- dice and arithmetic ---------------------------------------------------------------------


def test_draws_have_the_law_of_their_weights():
    """Chi-square; correct code fails for one seed in a million."""
    dice = GeneratorDice(np.random.default_rng(3))
    drawn = torch.tensor([dice.draw(PROBS * 7) for _ in range(4000)])
    assert fit_probability(drawn, torch.from_numpy(PROBS)) > FALSE_FAILURE


def test_acceptance_has_its_probability():
    """Chi-square; correct code fails for one seed in a million."""
    dice = GeneratorDice(np.random.default_rng(4))
    accepted = torch.tensor([int(dice.accept(0.3)) for _ in range(4000)])
    assert fit_probability(accepted, torch.tensor([0.7, 0.3])) > FALSE_FAILURE


class FixedNumbers:
    """A generator that always says the same number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


@pytest.mark.parametrize("number", [0.0, math.nextafter(1, 0)])
@pytest.mark.parametrize("scale", [1.0, 3e-320, 1e300])
def test_the_ends_of_the_unit_interval(number, scale):
    dice = GeneratorDice(FixedNumbers(number))
    assert dice.accept(1)
    assert not dice.accept(0)
    for weights in (PROBS * scale, PROBS[::-1] * scale):
        assert weights[dice.draw(weights)] > 0


@pytest.mark.parametrize("weights", [np.zeros(3), np.full(3, np.nan), np.array([1.0, np.nan])])
def test_weights_that_mean_nothing_still_give_an_index(weights):
    """A model that says no numbers is reported elsewhere; the step of the others must go on."""
    assert 0 <= GeneratorDice(np.random.default_rng(0)).draw(weights) < len(weights)


@given(st.floats(0, 1), st.floats(0, 1))
def test_ratios_are_probabilities(numerator, denominator):
    value = ratio(numerator, denominator)
    assert 0 <= value <= 1
    if numerator < denominator:
        assert value == numerator / denominator


def test_ratio_of_nothing_to_nothing_is_one():
    assert (ratio(0.0, 0.0), ratio(0.0, 1.0), ratio(1e-300, 5e-324)) == (1, 0, 1)


def test_residuals():
    left, right = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    np.testing.assert_allclose(excess(left, right), [0.3, 0.1, 0], atol=1e-15)
    np.testing.assert_allclose(residual(left, right), [0.75, 0.25, 0], atol=1e-15)
    assert residual(left, left) is left  # nothing is left over: what is drawn is still p's
    np.testing.assert_allclose(without(left, 0), [0, 0.6, 0.4])
    assert left[0] == 0.5
    assert not without(point_mass(1, left), 1).any()
    assert point_mass(1, left).tolist() == [0, 1, 0]


def test_what_stands():
    assert stands(0.0, 1.0) == 1  # nothing below can have fallen
    assert stands(0.0, 0.5) == 0
    assert stands(0.5, 1.0) == 1
    assert stands(Fraction(1, 4), Fraction(1, 2)) == Fraction(1, 3)


# -- p equal to q ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE_RULES)
@pytest.mark.parametrize("number", [0.0, math.nextafter(1, 0)])
def test_samples_of_the_target_itself_are_never_rejected(name, number):
    """p / q is exactly 1, so the largest random number accepts, too."""
    probs = np.random.default_rng(1).dirichlet(np.ones(50))
    siblings = rule(name).draws[0]
    draws = {node: (Draws(nodes=(node + 1,), probs=probs),) for node in range(3)}
    draft = Draft.from_drafter(
        "it", TokenTree.chain([0, 7, 20, 49]), siblings=siblings, draws=draws
    )
    decision = rule(name).decide(draft, lambda node: probs, GeneratorDice(FixedNumbers(number)))
    assert decision.node == 3


@pytest.mark.parametrize("name", SAMPLE_RULES)
def test_nearly_equal_distributions_do_no_harm(name):
    """Residuals of rounding errors: whatever is drawn from them has a probability."""
    generator = np.random.default_rng(5)
    for _ in range(50):
        probs = generator.dirichlet(np.full(30, 0.1))
        near = probs * (1 + generator.uniform(-3e-16, 3e-16, 30))
        likeliest = int(probs.argmax())
        draws = {ROOT: (Draws(nodes=(1,), probs=near),)}
        draft = Draft.from_drafter(
            "it", TokenTree.chain([0, likeliest]), siblings=rule(name).draws[0], draws=draws
        )
        for number in (0.0, math.nextafter(1, 0)):
            dice = GeneratorDice(FixedNumbers(number))
            node, final_id = rule(name).decide(draft, lambda _, probs=probs: probs, dice)
            assert node in (0, 1)
            assert probs[final_id] > 0


# -- k-seq -----------------------------------------------------------------------------------

WEIGHTS = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


def num_tested(p, q, rho, num_draws):
    """Return how many draws are tested on average: 1 - (1 - b)**k over b, k where b is 0."""
    passes = np.minimum(q, p / rho).sum()
    return (1 - (1 - passes) ** num_draws) / passes if passes else num_draws


@given(WEIGHTS, WEIGHTS, st.integers(1, 6))
@example([0, 0, 0, 1], [0, 0, 1, 0], 2)
def test_the_division_asks_no_token_for_too_much(target, draft, num_draws):
    p, q = (np.array([Fraction(w, sum(ws)) for w in ws]) for ws in (target, draft))
    rho = find_division(p, q, num_draws)
    assert 1 <= rho <= num_draws
    assert num_tested(p, q, rho, num_draws) <= rho
    # The least such: a little less asks too much.
    less = rho - Fraction(num_draws, 2**20)
    if less > 1:
        assert num_tested(p, q, less, num_draws) > less
    # Floating point finds the same, or the next division of the range.
    found = find_division(p.astype(float), q.astype(float), num_draws)
    assert found == pytest.approx(float(rho), abs=num_draws / 2**19)


def test_one_draw_is_divided_by_one_and_equal_distributions_too():
    assert find_division(PROBS, PROBS[::-1], 1) == 1
    assert find_division(PROBS, PROBS, 5) == 1


# -- controls that fail ----------------------------------------------------------------------


def rows_of(draft, vocab_size=4):
    logits = torch.zeros(len(draft.tree), vocab_size, dtype=torch.float64)
    return TargetRows(logits, [])


def failing_after(bad_id):
    """Return parameters with a processor that raises where the last token is `bad_id`."""

    def process(input_ids, scores):
        if input_ids[0, -1] == bad_id:
            raise ValueError("never after this one")
        return scores

    return sampled(9, seed=1, logits_processors=(process,))


@pytest.mark.parametrize("name", SAMPLE_RULES)
def test_a_control_that_fails_beside_the_accepted_path_has_not_failed(name):
    """`block` and `traversal` look below tokens that are then not accepted; decoding would not."""
    uniform, sure = np.full(4, 0.25), point_mass(2, np.zeros(4))
    siblings = rule(name).draws[0]
    # Token 2 is accepted with 1/4, so most seeds do not come to its row.
    draws = {0: (Draws(nodes=(1,), probs=sure),), 1: (Draws(nodes=(2,), probs=uniform),)}
    draft = Draft.from_drafter("it", TokenTree.chain([0, 2, 3]), siblings=siblings, draws=draws)
    num_failed = 0
    for seed in range(60):
        sampler = Sampler(failing_after(2), seed, 1)
        verdict = rule(name).verify(draft, rows_of(draft), sampler, [1, 0])
        assert (sampler.failure is not None) == (1 in verdict.path)
        num_failed += sampler.failure is not None
    assert 0 < num_failed < 40


@pytest.mark.parametrize("name", ["block", "traversal"])
def test_below_a_token_that_is_impossible_nothing_is_asked(name):
    asked = []

    def target_probs(node):
        asked.append(node)
        return np.array([1.0, 0, 0, 0]) if node == ROOT else np.full(4, 0.25)

    uniform = np.full(4, 0.25)
    draws = {0: (Draws(nodes=(1,), probs=uniform),), 1: (Draws(nodes=(2,), probs=uniform),)}
    draft = Draft.from_drafter("it", TokenTree.chain([0, 2, 3]), siblings=IID, draws=draws)
    decision = rule(name).decide(draft, target_probs, GeneratorDice(np.random.default_rng(0)))
    assert decision == (ROOT, 0)
    assert set(asked) == {ROOT}


# -- typical acceptance ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "epsilon", "delta", "expected"),
    [
        ([1.0, 0, 0, 0], 0.09, 0.3, 0.09),  # entropy 0: delta alone, but epsilon is enough
        ([1.0, 0, 0, 0], 0.5, 0.3, 0.3),
        ([0.25] * 4, 0.09, 0.3, 0.075),  # exp(-H) = 1/4
        ([0.5, 0.5, 0, 0], 0.2, 0.3, 0.15),
    ],
)
def test_threshold_of_typical_acceptance(probs, epsilon, delta, expected):
    threshold = TypicalVerifier(epsilon, delta).threshold(np.array(probs))
    assert threshold == pytest.approx(expected, rel=1e-12)


def test_typical_takes_the_longest_path_and_of_those_the_likeliest():
    table = {
        (): [0.6, 0.4, 0, 0],
        (0,): [0.5, 0.5, 0, 0],
        (1,): [0, 0, 0.3, 0.7],
    }
    draft = fixed_tree([(0, 0), (1, 2), (1, 3)])
    paths = [draft.tree.sequence(node)[1:] for node in range(len(draft.tree))]
    dice = GeneratorDice(np.random.default_rng(0))
    node, _ = TypicalVerifier().decide(
        draft, lambda node: np.array(table.get(paths[node], [0.25] * 4)), dice
    )
    assert paths[node] == (0, 0)  # 0.30 against 0.28; 0.12 is plausible, too
    table[0,] = [0.01, 0.99, 0, 0]
    node, _ = TypicalVerifier().decide(
        draft, lambda node: np.array(table.get(paths[node], [0.25] * 4)), dice
    )
    assert paths[node] == (1, 3)


@pytest.mark.parametrize("values", [(0, 0.3), (0.09, 0), (1.5, 0.3), (0.09, math.nan)])
def test_impossible_thresholds_are_refused(values):
    with pytest.raises(ConfigError, match="typical:"):
        TypicalVerifier(*values)


# -- several drafters ------------------------------------------------------------------------


def test_errors_say_what_is_taken_and_what_came():
    draft = fixed_tree([(1,)])
    with pytest.raises(RequestError) as caught:
        rule("mss").verify(draft, rows_of(draft), Sampler(sampled(9), 1, 1), [1, 0])
    assert str(caught.value) == (
        "verifier 'mss' takes siblings drawn as iid; got deterministic ones"
    )
    assert "coupled" in caught.value.hint
    assert draft.siblings is SiblingDraw.DETERMINISTIC
