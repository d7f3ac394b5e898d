"""Exact laws: the rules' own code over fractions, with dice that go through every outcome.

No sampling and no tolerance: a law is a dict from token sequences to fractions, and two laws are
equal or they are not.
"""

import random
from collections import defaultdict
from fractions import Fraction
from functools import cache

import numpy as np

from foretoken.core.draft import Draft, Draws, SiblingDraw
from foretoken.core.tree import ROOT, TokenTree
from foretoken.verifiers import VERIFIERS
from foretoken.verifiers.dice import without

ROOT_ID = 0
IID, WITHOUT_REPLACEMENT = SiblingDraw.IID, SiblingDraw.WITHOUT_REPLACEMENT


class EnumeratedDice:
    """Dice that follow a script of choices, extend it with first choices, and keep the odds.

    Args:
        script: Index of the option to take at each fork so far.
    """

    def __init__(self, script):
        self.script = list(script)
        self.num_options = []
        self.probability = Fraction(1)

    def accept(self, probability):
        assert 0 <= probability <= 1
        return self._fork([(True, probability), (False, 1 - probability)])

    def draw(self, weights):
        total = sum(weights)
        assert total > 0
        assert min(weights) >= 0
        return self._fork([(index, weight / total) for index, weight in enumerate(weights)])

    def _fork(self, options):
        options = [(outcome, Fraction(odds)) for outcome, odds in options if odds]
        place = len(self.num_options)
        if place == len(self.script):
            self.script.append(0)
        self.num_options.append(len(options))
        outcome, odds = options[self.script[place]]
        self.probability *= odds
        return outcome


def outcomes(run):
    """Yield each result of `run(dice)` with its probability."""
    script = []
    while True:
        dice = EnumeratedDice(script)
        result = run(dice)
        yield result, dice.probability
        script = dice.script
        while script and script[-1] + 1 == dice.num_options[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


def model(vocab_size, seed, *, largest=4, zeros=0.2):
    """Return a function from paths to random distributions over fractions, some entries zero."""

    @cache
    def probs(path):
        rng = random.Random(f"{seed} {path}")
        while True:
            weights = [
                0 if rng.random() < zeros else rng.randint(1, largest) for _ in range(vocab_size)
            ]
            if any(weights):
                return np.array([Fraction(weight, sum(weights)) for weight in weights])

    return probs


def rule(name):
    """Return a registered rule."""
    return VERIFIERS.load(name)()


# -- drafting --------------------------------------------------------------------------------


def draw_siblings(probs, count, siblings, dice):
    """Return tokens in the order of their drawing, one after the other."""
    token_ids = []
    for _ in range(count):
        if not probs.any():
            break
        token_ids.append(dice.draw(probs))
        if siblings is WITHOUT_REPLACEMENT:
            probs = without(probs, token_ids[-1])
    return token_ids


def sample_tree(draft_model, widths, siblings, dice, name="drafter"):
    """Return a draft of so many samples per node and level; a token drawn twice is one node."""
    token_ids, parents, paths, draws = [ROOT_ID], [-1], [()], {}
    level = [ROOT]
    for width in widths:
        first = len(token_ids)
        for parent in level:
            probs, child_of = draft_model(paths[parent]), {}
            drawn = draw_siblings(probs, width, siblings, dice)
            for token_id in drawn:
                if token_id not in child_of:
                    child_of[token_id] = len(token_ids)
                    token_ids.append(token_id)
                    parents.append(parent)
                    paths.append((*paths[parent], token_id))
            nodes = tuple(child_of[token_id] for token_id in drawn)
            draws[parent] = (Draws(nodes=nodes, probs=probs),)
        level = range(first, len(token_ids))
    return Draft.from_drafter(
        name, TokenTree(tuple(token_ids), tuple(parents)), siblings=siblings, draws=draws
    )


def fixed_tree(sequences):
    """Return the draft that holds these continuations, without chance."""
    return Draft.from_drafter("fixed", TokenTree.from_sequences(ROOT_ID, sequences))


# -- laws ------------------------------------------------------------------------------------


def emit(verifier, draft, target, dice, *, is_checked=True):
    """Return what a rule emits for a draft: the tokens of the accepted path and the final one."""
    if is_checked:
        verifier.check(draft)
    tree = draft.tree
    paths = [tree.sequence(node)[1:] for node in range(len(tree))]
    node, final_id = verifier.decide(draft, lambda node: target(paths[node]), dice)
    return (*paths[node], final_id)


def emitted_law(verifier, draft_by, target, **options):
    """Return the probability of each emission; `draft_by` maps dice to a draft."""
    law = defaultdict(Fraction)
    for tokens, odds in outcomes(
        lambda dice: emit(verifier, draft_by(dice), target, dice, **options)
    ):
        law[tokens] += odds
    assert sum(law.values()) == 1
    return dict(law)


def continued(law, target, length):
    """Return the law of the first `length` tokens if the target goes on after each emission."""
    going = defaultdict(Fraction)
    for tokens, odds in law.items():
        going[tokens] += odds
    for size in range(length):
        for tokens in [tokens for tokens in going if len(tokens) == size]:
            odds = going.pop(tokens)
            for token_id, prob in enumerate(target(tokens)):
                if prob:
                    going[*tokens, token_id] += odds * prob
    cut = defaultdict(Fraction)
    for tokens, odds in going.items():
        cut[tokens[:length]] += odds
    return dict(cut)


def target_law(target, length):
    """Return the law of the first `length` tokens by the target alone."""
    return continued({(): Fraction(1)}, target, length)


def assert_lossless(verifier, draft_by, target, **options):
    """Check the first token and all tokens together; return the mean number of accepted ones."""
    law = emitted_law(verifier, draft_by, target, **options)
    length = max(map(len, law))
    assert continued(law, target, 1) == target_law(target, 1)
    assert continued(law, target, length) == target_law(target, length)
    return mean_accepted(law)


def mean_accepted(law):
    """Return the mean number of accepted draft tokens, the final one not counted."""
    return sum(odds * (len(tokens) - 1) for tokens, odds in law.items())
