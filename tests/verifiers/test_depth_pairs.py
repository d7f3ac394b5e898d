"""LoopSpec's pair of draws is exact whatever the depths say: by enumeration, over fractions."""

from fractions import Fraction

import numpy as np
import pytest

from foretoken.core.draft import Draft, Draws
from foretoken.core.residual import residual
from foretoken.core.tree import ROOT, TokenTree
from foretoken.drafters.loopspec import second_probs
from tests.verifiers.enumeration import (
    IID,
    ROOT_ID,
    WITHOUT_REPLACEMENT,
    assert_lossless,
    continued,
    emitted_law,
    model,
    outcomes,
    rule,
    target_law,
)

RULES = [("mss", IID), ("rrs", WITHOUT_REPLACEMENT)]
LOOPS = 4
PAIRS = [(d1, d2) for d1 in range(1, LOOPS) for d2 in range(d1 + 1, LOOPS)]


def depths(vocab_size, seed):
    """Return one random model per depth, from 1 to G; the last is the target."""
    return [None, *(model(vocab_size, f"{seed} {depth}") for depth in range(1, LOOPS + 1))]


def gated(later, earlier, first_id, dice):
    """Return the draws of a node as the drafter makes them: (token, q) each."""
    probs = second_probs(later, earlier, first_id)
    return [] if probs is None else [(dice.draw(probs), probs)]


def always(later, earlier, first_id, dice):
    """Return a second draw whatever the first one was."""
    probs = residual(later, earlier)
    return [(dice.draw(probs), probs)]


def depth_tree(models, first, second, num_levels, siblings, dice, gate=gated):
    """Return a draft of so many levels, each node's children drawn after two of its loops."""
    token_ids, parents, paths, draws = [ROOT_ID], [-1], [()], {}
    level = [ROOT]
    for _ in range(num_levels):
        start = len(token_ids)
        for parent in level:
            earlier, later = models[first](paths[parent]), models[second](paths[parent])
            first_id = dice.draw(earlier)
            drawn = [(first_id, earlier), *gate(later, earlier, first_id, dice)]
            child_of = {}
            for token_id, _ in drawn:
                if token_id not in child_of:
                    child_of[token_id] = len(token_ids)
                    token_ids.append(token_id)
                    parents.append(parent)
                    paths.append((*paths[parent], token_id))
            draws[parent] = tuple(
                Draws(nodes=(child_of[token_id],), probs=probs) for token_id, probs in drawn
            )
        level = range(start, len(token_ids))
    tree = TokenTree(tuple(token_ids), tuple(parents))
    return Draft.from_drafter("loopspec", tree, siblings=siblings, draws=draws)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("vocab_size", [2, 3, 4])
@pytest.mark.parametrize(("name", "siblings"), RULES)
def test_one_token_has_the_targets_law(name, siblings, vocab_size, first, second, seed):
    models = depths(vocab_size, seed)
    assert_lossless(
        rule(name),
        lambda dice: depth_tree(models, first, second, 1, siblings, dice),
        models[LOOPS],
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("first", "second"), [(1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize(("name", "siblings"), RULES)
def test_two_tokens_have_the_targets_law(name, siblings, first, second, seed):
    """Below both guesses the same goes on, and everything after them is the target's."""
    models = depths(3, f"two {seed}")
    assert_lossless(
        rule(name),
        lambda dice: depth_tree(models, first, second, 2, siblings, dice),
        models[LOOPS],
    )


@pytest.mark.parametrize(("name", "siblings"), RULES)
def test_any_rule_that_looks_at_the_first_draw_may_offer_the_second(name, siblings):
    """The gate serves speed: opened always, or just when it should be closed, nothing changes."""

    def closed(later, earlier, first_id, dice):
        return (
            always(later, earlier, first_id, dice) if later[first_id] >= earlier[first_id] else []
        )

    for gate in (always, closed):
        for seed in range(3):
            models = depths(3, f"gate {seed}")
            assert_lossless(
                rule(name),
                lambda dice, models=models, gate=gate: depth_tree(
                    models, 1, 2, 1, siblings, dice, gate
                ),
                models[LOOPS],
            )


def constant(*weights):
    probs = np.array([Fraction(weight, sum(weights)) for weight in weights])
    return lambda path: probs


def test_a_gate_that_looks_at_the_second_draw_would_be_biased():
    """The trap: the second draw is kept only if the model thinks it likely.

    The first is rejected, the second is token 1 with 3/4, accepted with 2/3, and kept only then:
    token 1 comes out with 3/4 * 2/3 + 1/4 * 1/2 = 5/8 instead of 1/2.
    """
    target = constant(0, 1, 1)
    models = [None, constant(1, 0, 0), constant(0, 3, 1), None, target]

    def fussy(later, earlier, first_id, dice):
        [(token_id, probs)] = always(later, earlier, first_id, dice)
        return [(token_id, probs)] if later[token_id] > Fraction(1, 2) else []

    law = emitted_law(
        rule("mss"), lambda dice: depth_tree(models, 1, 2, 1, IID, dice, fussy), target
    )
    assert continued(law, target, 1)[1,] == Fraction(5, 8)


def test_rules_that_count_draws_would_be_biased():
    """The trap: `k-seq` tests the first draw by how many there are, which here depends on it."""
    target, draft = constant(1, 1, 2), constant(2, 1, 1)

    def counted(dice):
        drawn = [dice.draw(draft(()))]
        if drawn[0] == 0:
            drawn.append(dice.draw(draft(())))
        tree = TokenTree.from_sequences(ROOT_ID, [(token_id,) for token_id in drawn])
        nodes = tuple(tree.token_ids.index(token_id, 1) for token_id in drawn)
        draws = {ROOT: (Draws(nodes=nodes, probs=draft(())),)}
        return Draft.from_drafter("counted", tree, siblings=IID, draws=draws)

    law = emitted_law(rule("k-seq"), counted, target)
    assert continued(law, target, 1) != target_law(target, 1)
    assert_lossless(rule("mss"), counted, target)


def rejected_both(models, first, second, gate):
    """Return the exact probability that no guess of a row is accepted."""
    target = models[LOOPS](())

    def run(dice):
        draft = depth_tree(models, first, second, 1, IID, dice, gate)
        return rule("mss").settle(draft, ROOT, target, dice).child is None

    return sum(odds for is_rejected, odds in outcomes(run) if is_rejected)


def distance(left, right):
    return sum(np.maximum(left - right, 0))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_bound_on_the_rejection_of_both(first, second, seed):
    """Pr[both rejected] <= TV(p_d2, p) without the gate, and twice that with it."""
    models = depths(4, f"bound {seed}")
    bound = distance(models[second](()), models[LOOPS](()))
    assert rejected_both(models, first, second, always) <= bound
    assert rejected_both(models, first, second, gated) <= 2 * bound


def test_a_second_guess_helps():
    """Over many models the pair is rejected less often than the first guess by itself."""
    alone, both = Fraction(0), Fraction(0)
    for seed in range(10):
        models = depths(4, f"helps {seed}")
        alone += rejected_both(models, 1, 2, lambda *_: [])
        both += rejected_both(models, 1, 2, gated)
    assert both < alone


def test_the_gate_keeps_the_two_apart():
    for seed in range(40):
        models = depths(4, f"apart {seed}")
        earlier, later = models[1](()), models[2](())
        for first_id in np.flatnonzero(earlier):
            probs = second_probs(later, earlier, first_id)
            assert (probs is not None) == (later[first_id] < earlier[first_id])
            if probs is not None:
                assert probs[first_id] == 0
                assert sum(probs) == 1
