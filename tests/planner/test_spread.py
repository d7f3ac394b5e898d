"""How much drafts differ: what a count is worth beside what is known, and what surprises."""

from statistics import harmonic_mean, mean

import numpy as np
import pytest

from foretoken.core.draft import Draft
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.planner.base import StepTimes
from foretoken.planner.choices import Seen
from foretoken.planner.gains import Gains
from foretoken.planner.holding import Holding
from foretoken.planner.spread import STRENGTH, learn_spread, new_spread
from foretoken.planner.trials import trial_steps
from tests.planner.simulation import (
    FixedSize,
    Machine,
    SimulatedDrafter,
    SimulatedShare,
)
from tests.planner.test_adaptive import SMALL


def learned(means, *, num_steps=20, seed=0, num_counts=200):
    """Return what is known after requests whose steps give so many tokens in the mean."""
    rng, spread, expected = np.random.default_rng(seed), new_spread(1), float(np.mean(means))
    for index in range(num_counts):
        taken = rng.poisson(means[index % len(means)], num_steps)
        counts = num_steps, int(taken.sum()), int((taken**2).sum())
        learn_spread(spread, 0, expected, counts)
    return spread


def test_where_requests_are_alike_what_is_known_of_all_outweighs_their_luck():
    strengths = [learned([1.5], seed=seed)[0, STRENGTH] for seed in range(8)]
    assert mean(strengths) > 40


def test_where_requests_differ_each_tells_of_itself():
    """Copies in every second request: 3 tokens a step, and none."""
    strengths = [learned([3.0, 0.0], seed=seed)[0, STRENGTH] for seed in range(8)]
    assert max(strengths) < 3


def test_strength_is_the_ratio_of_the_two_variances():
    """Steps vary by 1.5, requests by 0.25 about 1, 1.5 and 2: 1.5 / (2 / 3 * 0.25)."""
    strengths = [learned([1.0, 1.5, 2.0], seed=seed)[0, STRENGTH] for seed in range(16)]
    assert mean(strengths) == pytest.approx(9, rel=0.25)


@pytest.mark.parametrize(("taken", "surprise"), [([2, 1, 0] * 2, 0.0), ([0] * 20, 0.3)])
def test_chance_does_not_surprise_and_a_change_of_texts_does(taken, surprise):
    spread = learned([1.5])
    counts = len(taken), sum(taken), sum(it * it for it in taken)
    assert surprise <= learn_spread(spread, 0, 1.5, counts) <= 2 * surprise


def test_what_is_off_again_and_again_surprises():
    spread = learned([1.5])
    found = [learn_spread(spread, 0, 1.5, (7, 0, 0)) for _ in range(3)]
    assert found[0] < 0.2
    assert found[-1] > found[0] + 0.2


def test_a_few_unlucky_steps_count_less_than_many_lucky_ones():
    """They counted nearly as much, and plans that are unlucky end early: drafts were underrated."""
    gains = Gains([("model",)], 4, {"model": 0.6})
    gains.of([("r", 0)])

    def worth():
        return gains.of([("new", 0)])[0, 0].sum()

    expected, worths = worth(), []
    for _ in range(40):  # plans that give what is expected, in the mean
        lucky, unlucky = round(100 * 1.06 * expected), round(10 * 0.4 * expected)
        gains.learn_count(("r", 0), 0, 4, 100, lucky, 3 * lucky)
        gains.learn_count(("r", 0), 0, 4, 10, unlucky, 3 * unlucky)
        worths.append(worth())
    assert mean(worths[20:]) == pytest.approx(expected, rel=0.05)


def wanting_after(tokens_of_steps):
    """Return after how many steps a plan is found wanting where plain decoding gives 2 a step."""
    holding = Holding([])
    holding.begin(2.0)
    draft = Draft.from_drafter("model", TokenTree.chain([0, *[1] * 9]))
    for index, num_tokens in enumerate(tokens_of_steps):
        path = tuple(range(1, num_tokens))
        verdict = Verdict(path, (*[1] * len(path), 7), FinalKind.RECOVERED)
        share, times = SimulatedShare("r", ("model",), None), StepTimes(total_s=0.001)
        holding.count([Seen([share], [{}], [draft], [draft], [verdict], times)])
        if holding.is_wanting:
            return index + 1
    return None


def test_bad_luck_does_not_end_a_plan_that_is_good_and_hopeless_ones_end_early():
    assert wanting_after([1, 5, 1, 1, 1, 1, 1, 1, 5, 4, 1, 5]) is None
    assert wanting_after([1] * 12) == 6


def test_what_a_trial_reads_and_plans_first_does_not_end_it():
    """Nearly all trials of a draft model ended after six steps, however good they were."""
    holding = Holding([])
    holding.begin(2.0)
    draft = Draft.from_drafter("model", TokenTree.chain([0, 1]))
    share, verdict = SimulatedShare("r", ("model",), None), Verdict((1,), (1, 7), FinalKind.BONUS)

    def count(total_s, **how):
        seen = Seen([share], [{}], [draft], [draft], [verdict], StepTimes(total_s=total_s))
        holding.count([seen], **how)

    count(0.004, is_usual=False)
    for _ in range(8):
        count(0.001)
        assert not holding.is_wanting
    counts = holding.take("r")
    assert (counts.num_steps, counts.taken.num_taken) == (9, 9)


def test_a_trial_of_what_is_nearly_as_good_lasts_longer():
    """What it costs is to begin, and a few steps tell little."""
    assert trial_steps(0.001, 0.4, 1) == 12
    assert trial_steps(0.001, 0.125, 1) == 24
    assert trial_steps(0.001, 0.0, 1) == trial_steps(0.001, -0.5, 1) == 60
    assert trial_steps(0.001, 0.0, 4) == 15  # many requests tell as much in fewer steps
    assert trial_steps(1.0, 1.0, 1) == 3
    assert trial_steps(0.0, 1.0, 1) == 12  # all of the step was planning


def test_a_draft_model_that_is_a_little_better_is_used_most_of_the_time():
    """By a tenth; it was used too little: 0.92 of the best fixed way, plain decoding is 0.91."""
    stories = [{"model": 0.6 + 0.07 * (index % 3 - 1)} for index in range(90)]

    def ratio(seed):
        def simulated():
            drafters = {
                "model": SimulatedDrafter(0.6, level_ms=0.09, request_ms=0.19, claimed=-0.4),
                "copy": SimulatedDrafter(0.05, request_ms=0.06, is_retracer=True),
            }
            return Machine(SMALL, drafters, seed=seed, rest_ms=0.2)

        own = simulated()
        rates = own.run_texts(own.planner(), stories, num_tokens=64)
        best = max(
            harmonic_mean(simulated().run_texts(fixed, stories, num_tokens=64)[30:])
            for fixed in (FixedSize(["model"], 2), FixedSize(["model"], 3), FixedSize([], 0))
        )
        return harmonic_mean(rates[30:]) / best

    assert mean(map(ratio, range(8))) > 0.945
