"""The search for layers that a model can do without."""

import random
from itertools import pairwise
from statistics import mean

from foretoken.drafters.skip_search import SkipSearch, SkipSet


def run(search, agreement, num_trials):
    """Play a search against a function from a set to its agreement; return the best scores."""
    scores = []
    for _ in range(num_trials):
        if search.is_over:
            break
        before = search.best
        other = search.propose()
        won = search.observe(agreement(other), agreement(before))
        assert search.best == (other if won else before)
        scores.append(agreement(search.best))
    return scores


def make(num_layers=16, share=0.5, **options):
    options = {"enough": 1.0, "max_trials": 400, "has_parts": True, **options}
    return SkipSearch(range(1, num_layers - 1), share=share, **options)


def test_it_starts_with_parts_spread_over_the_layers():
    best = make(num_layers=10, share=0.25).best
    assert len(best.attention) + len(best.mlp) == 4
    layers = sorted((*best.attention, *best.mlp))
    assert layers[0] == 1
    assert layers[-1] == 8
    assert max(b - a for a, b in pairwise(layers)) <= 3


def test_it_finds_the_parts_that_matter_least_under_noise():
    """28 parts, 14 of them free, the others worth 0.02 to 0.1 each, windows of 32 tokens.

    In the mean of sixteen searches, since a single one hangs by the last bits of sums that differ
    from processor to processor: one of them came to 0.35 of chance where another gave it 0.11.
    """

    def lost(seed):
        """Return what the set that is found loses, over what a random half does on average."""
        rng = random.Random(seed)
        units = [(layer, part) for layer in range(1, 15) for part in "am"]
        worth = dict.fromkeys(units, 0.0)
        worth |= {unit: rng.uniform(0.02, 0.1) for unit in rng.sample(units, 14)}

        def exact(skipped):
            lost = sum(worth[layer, "a"] for layer in skipped.attention)
            return max(0.0, 1 - lost - sum(worth[layer, "m"] for layer in skipped.mlp))

        def noisy(skipped):
            return sum(rng.random() < exact(skipped) for _ in range(32)) / 32

        search = make(seed=seed, max_trials=150)
        start = exact(search.best)
        run(search, noisy, 150)
        assert exact(search.best) > start
        return (1 - exact(search.best)) / (sum(worth.values()) / 2)

    found = [lost(seed) for seed in range(16)]
    assert mean(found) < 0.22
    assert max(found) < 0.5


def test_a_set_that_only_ties_does_not_replace_the_best():
    search = make()
    best = search.best
    search.propose()
    assert not search.observe(0.5, 0.5)
    assert search.best == best
    assert search.num_trials == 1


def test_it_ends_when_the_agreement_is_good_enough():
    search = make(enough=0.9)
    search.propose()
    search.observe(0.2, 0.85)
    assert not search.is_over
    search.propose()
    search.observe(0.95, 0.85)
    assert search.is_over


def test_it_ends_after_the_last_trial():
    search = make(max_trials=3)
    assert len(run(search, lambda _: 0.0, 10)) == 3
    assert search.is_over


def test_nothing_to_choose_from_is_over_at_once():
    assert make(num_layers=3, has_parts=False, share=1.0).is_over


def test_whole_layers_where_parts_cannot_be_left_out():
    search = make(has_parts=False, share=0.3)
    assert search.best.attention == search.best.mlp
    for _ in range(20):
        other = search.propose()
        assert other.attention == other.mlp
        assert len(other.mlp) == 4
        search.observe(0.0, 0.5)


def test_the_same_seed_proposes_the_same_sets():
    first, second = make(seed=3), make(seed=3)
    for step in range(10):
        assert first.propose() == second.propose()
        first.observe(step / 10, 0.4)
        second.observe(step / 10, 0.4)


def test_sets_are_written_as_the_option_is():
    assert str(SkipSet((3, 5), (5, 6))) == "a3-5-m6"
