"""Drafters that tell along texts what they would have given, and what the planner makes of it."""

import itertools
import random
from statistics import harmonic_mean

import numpy as np
import pytest

from foretoken.errors import DrafterError
from foretoken.planner.experience import Experience
from foretoken.planner.gains import Gains
from foretoken.planner.probing import PROBING_SHARE, Probes
from foretoken.planner.retracing import RETRACING_PART, Retracing
from tests.planner.simulation import (
    FixedSize,
    Machine,
    SimulatedDrafter,
    SimulatedShare,
)
from tests.planner.test_adaptive import SMALL

ARMS = [("quick",), ("slow",), ("model",), ("quick", "slow")]
GUESSES = {"quick": 0.3, "slow": 0.3, "model": 0.3}


class Clock:
    """Time passes where somebody says so."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Asked:
    """A drafter whose drafts give what they are said to; a token takes some time."""

    def __init__(self, clock, token_s, worth):
        self.clock, self.token_s, self.worth = clock, token_s, worth
        self.num_asked = []

    def __call__(self, token_ids, start, max_nodes):
        num_ids = len(token_ids) - start
        self.num_asked.append(num_ids)
        self.clock.now_s += self.token_s * num_ids
        taken = [round(8 * self.worth ** (1 + node)) for node in range(max_nodes)]
        return np.array([8, *taken])


class Situation:
    def __init__(self, *, quick=0.5, slow=0.75, quick_s=1e-6, slow_s=2e-6):
        self.clock = Clock()
        self.quick = Asked(self.clock, quick_s, quick)
        self.slow = Asked(self.clock, slow_s, slow)
        labels = tuple(GUESSES)
        self.experience = Experience(ARMS, labels, 4, GUESSES)
        self.probes = Probes(labels)
        retraces = {"slow": self.slow, "quick": self.quick}
        self.retracing = Retracing(retraces, 4, self.experience, self.probes, self.clock)
        self.forget()

    def forget(self):
        self.quick.num_asked, self.slow.num_asked = [], []

    def pass_s(self, seconds):
        self.probes.earn(seconds)

    def worth(self, temperature=0.0):
        share = SimulatedShare("another", ("quick", "slow", "model"), None, temperature)
        return self.experience.gains([share])[0]


def text(num_tokens, name="r", temperature=0.0, num_prompt_ids=0):
    return SimulatedShare(
        name, (), None, temperature, num_keys=num_tokens, num_prompt_ids=num_prompt_ids
    )


def test_where_no_plan_has_changed_for_long_less_is_asked():
    """What texts took was a share of its own, in a long calm all that trials might have."""
    situation = Situation(quick_s=0.2e-6, slow_s=5e-6)
    situation.probes.earn(100.0, 10_000)
    situation.retracing.learn(text(64, "first"))  # has what was saved up
    start_s = situation.clock.now_s
    for number in range(3000):
        situation.pass_s(0.02)
        situation.retracing.learn(text(64, f"r{number}"))
    spent_s, most_s = situation.clock.now_s - start_s, RETRACING_PART * PROBING_SHARE * 3000 * 0.02
    assert spent_s < 0.5 * most_s + 0.02


def test_one_text_tells_what_drafts_that_nobody_made_are_worth():
    situation = Situation()
    situation.pass_s(10.0)
    for number in range(30):
        situation.retracing.learn(text(64, f"r{number}"))
    quick, slow, model, _ = situation.worth()
    assert quick == pytest.approx(0.5 ** np.arange(1, 5), abs=0.07)
    assert slow == pytest.approx(0.75 ** np.arange(1, 5), abs=0.08)
    assert model == pytest.approx(0.3 ** np.arange(1, 5))
    # What changes at one temperature changes at the others.
    assert situation.worth(1.0)[0] == pytest.approx(quick, abs=0.02)


def test_it_takes_no_more_than_its_share_and_the_cheapest_goes_first():
    situation = Situation(quick_s=0.2e-6, slow_s=5e-6)
    start_s = situation.clock.now_s
    for number in range(500):
        situation.pass_s(0.02)
        situation.retracing.learn(text(64, f"r{number}"))
    spent_s, most_s = situation.clock.now_s - start_s, RETRACING_PART * PROBING_SHARE * 500 * 0.02
    assert 0.5 * most_s < spent_s <= 1.01 * most_s
    # Each time it is asked alone, and again where the other one is.
    assert len(situation.quick.num_asked) == 500 + len(situation.slow.num_asked)
    assert 100 < len(situation.slow.num_asked) < 400
    assert min(situation.slow.num_asked) >= 16


def test_drafters_are_compared_on_the_same_texts():
    """What one gives follows at once what the other gives, whoever was asked."""
    situation = Situation()
    situation.pass_s(10.0)
    for number in range(30):
        situation.retracing.learn(text(64, f"r{number}"))
    quick, slow, *_ = situation.worth()
    assert (slow > quick).any()
    more, less = (slow - quick) / (1.0 - quick), (slow - quick) / quick
    situation.slow.token_s = 1.0  # from now on it is too dear
    situation.retracing._token_s["slow"] = 1.0
    situation.quick.worth = 0.1
    for number in range(30):
        situation.retracing.learn(text(64, f"s{number}"))
    quick, slow, *_ = situation.worth()
    assert quick[0] == pytest.approx(0.1, abs=0.05)
    # What the other one misses it copies in part, or misses in part what the other one copies.
    expected = quick + np.where(more > 0, more * (1.0 - quick), less * quick)
    assert slow == pytest.approx(expected, abs=0.01)


def test_who_copies_more_of_some_texts_copies_no_more_of_those_that_are_copied_whole():
    """A difference in tokens from stories had the dearer of two that copy draft for all edits."""
    situation = Situation()
    situation.pass_s(10.0)
    situation.quick.worth, situation.slow.worth = 0.2, 0.5
    for number in range(30):
        situation.retracing.learn(text(64, f"r{number}"))
    quick, slow, *_ = situation.worth()
    assert slow[0] > quick[0] + 0.2
    situation.quick.worth = situation.slow.worth = 1.0
    for number in range(3):
        situation.retracing.learn(text(64, f"s{number}"))
    quick, slow, *_ = situation.worth()
    assert quick[0] > 0.7
    assert slow.sum() < 1.1 * quick.sum()


def test_only_what_is_new_of_a_request_that_goes_on_is_asked_for():
    situation = Situation()
    situation.pass_s(10.0)
    going_on = text(40, num_prompt_ids=8)
    situation.retracing.learn_all([going_on])
    assert situation.quick.num_asked == []  # too few
    going_on.num_keys = 100
    situation.retracing.learn_all([going_on])
    situation.retracing.learn_all([going_on])
    going_on.num_keys = 130
    situation.retracing.learn_all([going_on])
    situation.retracing.learn(going_on)  # its end
    assert situation.quick.num_asked[::2] == [91, 29]
    situation.retracing.forget("r")
    situation.forget()
    situation.retracing.learn(text(1000))
    assert situation.quick.num_asked[0] == 256


def test_where_nobody_copies_the_cheapest_is_asked_of_every_fourth_text_in_the_end():
    situation = Situation(quick=0.0, slow=0.0)
    situation.pass_s(10.0)
    for number in range(64):
        situation.retracing.learn(text(64, f"r{number}"))
    num_slow = len(situation.slow.num_asked)  # after 1, 2, 4 and 8 texts, then 16 and some more
    assert num_slow == 6
    assert len(situation.quick.num_asked) == 17 + 47 // 4 + num_slow
    situation.slow.worth = situation.quick.worth = 0.5
    situation.forget()
    for number in range(64):
        situation.retracing.learn(text(64, f"s{number}"))
    assert len(situation.slow.num_asked) > 45


def test_without_such_drafters_nothing_is_asked():
    clock = Clock()
    experience = Experience(ARMS, tuple(GUESSES), 4, GUESSES)
    retracing = Retracing({}, 4, experience, Probes(tuple(GUESSES)), clock)
    retracing.learn(text(1000))
    retracing.learn_all([text(1000)])
    retracing.forget("r")


def gains_with(retraced):
    gains = Gains(ARMS, 2, GUESSES)
    gains.of([("r", 0)])
    for arm in retraced:
        gains.learn_text(("r", 0), arm, np.array([1000, 400, 200]))
    return gains


def test_the_luck_of_a_text_is_that_of_all_that_copy():
    """A request whose drafts had bad luck went on with another drafter, which had no better."""
    gains = gains_with([0, 1])
    before = gains.of([("r", 0), ("other", 0)])
    gains.learn_count(("r", 0), 0, 2, num_steps=50, num_taken=10, num_squares=10)
    after = gains.of([("r", 0), ("other", 0)])
    assert after[0, 0] == pytest.approx(0.478 * before[0, 0], rel=0.01)  # all of it is a third
    assert after[0, 1] == pytest.approx(after[0, 0])
    assert after[:, 2] == pytest.approx(before[:, 2])
    assert after[1] == pytest.approx(before[1])  # whole texts will tell


def test_a_text_that_goes_on_tells_its_own_request_too():
    gains = gains_with([0])
    gains.learn_count(("r", 0), 0, 2, num_steps=50, num_taken=0, num_squares=0)
    assert gains.of([("r", 0)])[0, 0].sum() == pytest.approx(0.113, rel=0.01)
    gains.learn_text(("r", 0), 0, np.array([30, 24, 21]))
    assert gains.of([("r", 0)])[0, 0].sum() > 1.2


def texts_rates(*, is_retracer, seed, num_texts=12):
    """Return how fast the first copied texts after other ones are, over the best fixed way."""

    def simulated():
        return Machine(
            SMALL,
            {
                "model": SimulatedDrafter(0.6, level_ms=0.1, request_ms=0.1),
                "quick": SimulatedDrafter(0.0, request_ms=0.02, is_retracer=is_retracer),
                "slow": SimulatedDrafter(0.0, request_ms=0.1, is_retracer=is_retracer),
            },
            seed=seed,
        )

    before = [{"model": 0.05, "quick": 0.02, "slow": 0.05}] * 30
    after = [{"model": 0.3, "quick": 0.85, "slow": 0.85}] * num_texts
    own = simulated()
    planner = own.planner()
    own.run_texts(planner, before, num_tokens=64)
    rates = own.run_texts(planner, after, num_tokens=64)
    best = simulated().run_texts(FixedSize(["quick"], 8), after, num_tokens=64)
    return harmonic_mean(rates) / harmonic_mean(best)


def test_texts_that_begin_to_repeat_themselves_are_copied_from_the_second_on():
    """By trials that is found in the first of them, or after several: 0.51 to 0.87."""
    assert min(texts_rates(is_retracer=True, seed=seed) for seed in range(8)) > 0.72


def test_who_is_told_of_is_not_tried():
    simulated = Machine(
        SMALL,
        {
            "model": SimulatedDrafter(0.6, level_ms=0.1, request_ms=0.1),
            "copy": SimulatedDrafter(0.05, request_ms=0.02, is_retracer=True),
        },
    )
    planner = simulated.planner()
    texts = itertools.repeat({"model": 0.6, "copy": 0.05}, 40)
    tried = []
    choose = planner._choose_trial

    def watch(*arguments):
        choose(*arguments)
        if planner._is_trial:
            tried.append(planner._choice[0])

    planner._choose_trial = watch
    simulated.run_texts(planner, texts, num_tokens=64)
    assert tried
    assert ("copy",) not in tried


def test_random_texts_cost_little():
    rng = random.Random(0)
    chances = [{"copy": 0.02 * rng.random()} for _ in range(60)]

    def rate(planner, is_retracer):
        simulated = Machine(
            SMALL, {"copy": SimulatedDrafter(0.0, request_ms=0.05, is_retracer=is_retracer)}
        )
        return harmonic_mean(simulated.run_texts(planner or simulated.planner(), chances))

    plain = rate(FixedSize([], 0), is_retracer=False)
    assert rate(None, is_retracer=True) > 0.975 * plain


@pytest.mark.parametrize("counts", [[0, 0, 0], [3, 1], [3, 1, 0, 0]])
def test_a_drafter_that_counts_no_drafts_or_other_nodes_is_named(counts):
    """What it is worth would be no number from then on."""
    labels = tuple(GUESSES)
    experience, probes = Experience(ARMS, labels, 2, GUESSES), Probes(labels)
    retraces = {"quick": lambda *_: np.array(counts)}
    with pytest.raises(DrafterError, match="'quick' retraced 63 tokens as"):
        Retracing(retraces, 2, experience, probes, Clock())


def test_what_nobody_can_copy_is_soon_not_learned_again_and_what_can_be_is():
    situation = Situation(quick=0.0)
    for number in range(40):
        situation.pass_s(1.0)
        situation.retracing.learn(text(80, f"r{number}"))
    assert situation.worth()[0].sum() == pytest.approx(0.0, abs=0.01)
    situation.quick.worth = 0.75
    situation.pass_s(1.0)
    assert max(situation.retracing.learn(text(80, f"copied{number}")) for number in range(4)) > 0.25


@pytest.mark.parametrize("drafts", ["nobody", "the model"])
def test_a_text_that_could_have_been_copied_brings_a_plan_at_once(drafts):
    """Where somebody drafted it came when it was due, half a text later."""
    simulated = Machine(
        SMALL,
        {
            "model": SimulatedDrafter(0.6, level_ms=0.02),
            "copy": SimulatedDrafter(0.05, request_ms=0.02, is_retracer=True),
        },
    )
    planner = simulated.planner()
    chance = 0.05 if drafts == "nobody" else 0.85
    simulated.run_texts(planner, [{"model": chance, "copy": 0.02}] * 30, num_tokens=64)
    assert planner._choice[0] == (() if drafts == "nobody" else ("model",))
    planner._probes.earn(1.0)
    planner._pace._steps_left = 50
    planner._experience.learn_text = lambda *_: 0.3
    planner.finish(text(100, "copied"))
    assert planner._pace._steps_left == 0
