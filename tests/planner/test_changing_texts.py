"""Texts that change: what was learned of one kind does not stand in the way of the next."""

import math
from collections import defaultdict
from dataclasses import replace
from statistics import harmonic_mean, mean

import numpy as np
import pytest

from foretoken.core.draft import Draft
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.planner.base import StepTimes
from foretoken.planner.choices import Seen
from foretoken.planner.experience import Experience
from foretoken.planner.gains import Gains, list_arms
from foretoken.planner.holding import Counts, Holding, Tally
from foretoken.planner.trials import Trials
from tests.planner.simulation import FixedSize, Machine, SimulatedDrafter, SimulatedShare
from tests.planner.test_adaptive import LARGE, SMALL, machine

HARD = {"model": 0.05, "copy": 0.02}
EASY = {"model": 0.7, "copy": 0.2}
MERGED = "forced+model"
CURVES = {"small": SMALL, "large": LARGE}
NUM_SEEDS = 12  # one run of five texts is luck, by a tenth, and six of them by two hundredths


def speeds(name, texts, num_requests, num_seeds=NUM_SEEDS):
    """Return the mean speed of an adaptive planner over all but the first texts of each kind.

    Returns:
        Over plain decoding, and over the best fixed way, for each kind in turn.
    """
    curve = CURVES[name]

    def rates(planner, seed):
        return machine(curve, seed=seed).run_texts(planner, texts, num_requests=num_requests)

    found = []
    for seed in range(num_seeds):
        simulated = machine(curve, seed=seed)
        adaptive = simulated.run_texts(simulated.planner(), texts, num_requests=num_requests)
        plain = rates(FixedSize([], 0), seed)
        best = [
            max(each)
            for each in zip(
                plain, *(rates(FixedSize(["model"], size), seed) for size in (1, 2, 4)), strict=True
            )
        ]
        for part in (slice(3, 8), slice(11, 16)):
            own = harmonic_mean(adaptive[part])
            found.append((own / harmonic_mean(plain[part]), own / harmonic_mean(best[part])))
    kinds = [found[place::2] for place in (0, 1)]
    return [[sum(each) / num_seeds for each in zip(*kind, strict=True)] for kind in kinds]


@pytest.mark.parametrize(
    ("name", "num_requests", "least", "num_seeds"),
    [("small", 1, 0.87, 40), ("small", 4, 0.9, NUM_SEEDS), ("large", 4, 0.93, NUM_SEEDS)],
)
def test_drafts_that_become_good_are_found(name, num_requests, least, num_seeds):
    """Before tokens were counted while a plan holds, 0.75, 0.88 and 0.66 of the best.

    Now 0.875 and 0.91 in the first two over forty and 24 seeds, planning included, and 0.895 and
    0.90 when counted steps weighed twice as much. Twelve scatter by 0.02 in the first case: the
    first of these once came to 0.84 when the others came to 0.92.
    """
    texts = [HARD] * 8 + [EASY] * 8
    _, (over_plain, over_best) = speeds(name, texts, num_requests, num_seeds)
    assert over_plain > 0.97
    assert over_best > least


def test_the_luck_of_some_texts_does_not_decide_where_ways_are_nearly_as_good():
    """Texts of one kind, some easier than others: two or four draft tokens give 1.09 of plain.

    What was counted along the last hundred steps said more of all texts than everything before,
    and drafts were left and taken up again by luck: 0.999 of the better size. To draft or not text
    by text gives more than that; now 1.013 (6 seeds).
    """

    def ratio(seed):
        ease = np.random.default_rng(seed).normal(0.5, 0.06, 200)
        texts = [{"model": float(it), "copy": 0.05} for it in ease]

        def rate(planner):
            rates = machine(SMALL, seed=seed).run_texts(planner, texts, num_tokens=64)
            return harmonic_mean(rates[50:])

        simulated = machine(SMALL, seed=seed)
        found = simulated.run_texts(simulated.planner(), texts, num_tokens=64)
        return harmonic_mean(found[50:]) / max(rate(FixedSize(["model"], it)) for it in (2, 4))

    assert mean(map(ratio, range(6))) > 1.006


def test_long_calm_costs_less_and_drafts_that_become_good_are_found_all_the_same():
    """Three hundred texts of one kind, and another one then.

    With as large a share for trials however long nothing changes, 0.993 of plain decoding in the
    calm, and 10 texts until the drafts were found; now 0.998 and 10 (6 seeds).
    """
    texts, calm = [HARD] * 300 + [EASY] * 40, slice(100, 300)

    def rates(planner, seed):
        return machine(SMALL, seed=seed).run_texts(planner, texts, num_tokens=64)

    over_plain, over_best = [], []
    for seed in range(3):
        simulated = machine(SMALL, seed=seed)
        found = simulated.run_texts(simulated.planner(), texts, num_tokens=64)
        plain, best = rates(FixedSize([], 0), seed), rates(FixedSize(["model"], 4), seed)
        over_plain.append(harmonic_mean(found[calm]) / harmonic_mean(plain[calm]))
        over_best.append(harmonic_mean(found[300:]) / harmonic_mean(best[300:]))
    assert mean(over_plain) > 0.9945
    assert mean(over_best) > 0.78


@pytest.mark.parametrize(("name", "num_requests"), [("small", 1), ("small", 4), ("large", 4)])
def test_drafts_that_become_bad_are_left_out(name, num_requests):
    """Before, 0.87 of plain decoding for one request of the small model."""
    (good, _), (over_plain, _) = speeds(name, [EASY] * 8 + [HARD] * 8, num_requests)
    assert good > 1.0
    assert over_plain > 0.94


def test_two_drafters_that_copy_the_same_give_as_much_as_the_cheap_one_alone():
    """Stories that neither can copy, then many texts that both can.

    One takes four times as long as the other. Which of them is used is luck in so few texts, and
    it is a matter of a twentieth: the dear one alone has 0.94 of the cheap one.
    """

    def simulated(seed):
        return Machine(
            SMALL,
            {
                "model": SimulatedDrafter(0.6, level_ms=0.05),
                "quick": SimulatedDrafter(0.0, request_ms=0.02, claimed=-0.2, max_depth=16),
                "slow": SimulatedDrafter(0.0, request_ms=0.09, claimed=-0.2, max_depth=16),
            },
            seed=seed,
        )

    stories = [{"model": 0.6, "quick": 0.02, "slow": 0.15}] * 40
    copies = [{"model": 0.3, "quick": 0.85, "slow": 0.85}] * 80

    def ratio(seed):
        machine = simulated(seed)
        planner = machine.planner()
        machine.run_texts(planner, stories, num_tokens=64)
        rates = machine.run_texts(planner, copies, num_tokens=64)
        best = simulated(seed).run_texts(FixedSize(["quick"], 8), copies, num_tokens=64)
        return harmonic_mean(rates[40:]) / harmonic_mean(best[40:])

    assert mean(map(ratio, range(8))) > 0.95


def test_the_cheap_one_of_two_that_copy_is_found_after_texts_of_which_it_copies_less():
    """One copies more of stories, and both the same of edits; one takes four times as long.

    Seldom used, the cheap one seemed to take as long as the dear one: its single drafts find the
    processor's caches full of others. With that, and with a difference in tokens that stories had
    told, as much as the dear one gives, 0.94 of the cheap one alone; now 0.96 (24 seeds, which
    scatter by 0.045 each).
    """

    def simulated(seed):
        return Machine(
            SMALL,
            {
                "model": SimulatedDrafter(0.6, level_ms=0.05),
                "quick": SimulatedDrafter(
                    0.0, request_ms=0.02, claimed=-0.2, max_depth=16, is_retracer=True, cold=5.0
                ),
                "slow": SimulatedDrafter(
                    0.0, request_ms=0.09, claimed=-0.2, max_depth=16, is_retracer=True, cold=2.0
                ),
            },
            seed=seed,
        )

    stories = [{"model": 0.1, "quick": 0.2, "slow": 0.5}] * 40
    copies = [{"model": 0.1, "quick": 0.85, "slow": 0.85}] * 80

    def ratio(seed):
        machine = simulated(seed)
        planner = machine.planner()
        machine.run_texts(planner, stories, num_tokens=64)
        rates = machine.run_texts(planner, copies, num_tokens=64)
        best = simulated(seed).run_texts(FixedSize(["quick"], 8), copies, num_tokens=64)
        return harmonic_mean(rates[40:]) / harmonic_mean(best[40:])

    assert mean(map(ratio, range(24))) > 0.95


# -- the parts ---------------------------------------------------------------------------------


def counted(num_steps, num_taken):
    """What is counted if drafts give as much as each other, as far as that is possible."""
    each, rest = divmod(num_taken, num_steps)
    num_squares = (num_steps - rest) * each**2 + rest * (each + 1) ** 2
    return {"num_steps": num_steps, "num_taken": num_taken, "num_squares": num_squares}


def gains_of(*, first=0.5, num_requests=1):
    gains = Gains([("model",), ("copy",)], 4, {"model": first, "copy": 0.1})
    gains.of([(f"r{index}", 0) for index in range(num_requests)])
    return gains


def test_counts_scale_what_drafts_are_worth():
    gains = gains_of()
    before = gains.of([("r0", 0)])[0]
    factor = gains.learn_count(("r0", 0), 0, 2, **counted(1000, 375))
    after = gains.of([("r0", 0)])[0]
    assert after[0, :2].sum() == pytest.approx(0.375, rel=0.02)  # they were 0.5 + 0.25
    assert after[0] == pytest.approx(before[0] * factor)
    assert (after[1] == before[1]).all()


def test_counts_as_expected_change_nothing():
    gains = gains_of()
    before = gains.of([("r0", 0)])
    assert gains.learn_count(("r0", 0), 0, 2, **counted(4, 3)) == pytest.approx(1.0)
    assert gains.of([("r0", 0)]) == pytest.approx(before)


def test_few_counts_say_little_and_none_is_worth_more_than_a_token():
    gains = gains_of()
    assert 1.0 < gains.learn_count(("r0", 0), 0, 1, **counted(1, 1)) < 1.2
    for _ in range(100):
        gains.learn_count(("r0", 0), 0, 4, **counted(64, 256))
    assert gains.of([("r0", 0)])[0, 0] == pytest.approx([1.0] * 4)


def seen_step(verdict, scored, proposed=None, drafters=("a", "b", "c")):
    share = SimulatedShare("r", drafters, None)
    return Seen([share], [{}], [proposed or scored], [scored], [verdict], StepTimes(total_s=0.001))


def test_what_each_of_several_drafters_would_have_given_alone_is_counted():
    """Up to the first token that it did not propose; what was cut away counts, too."""
    tree = TokenTree((7, 1, 1, 1, 2), (-1, 0, 1, 2, 0))
    union = replace(Draft.from_drafter("a", tree), source=("", "a+b", "a", "a+b", "c"))
    holding = Holding(())
    for path in ((1, 2, 3), (4,), ()):
        tokens = Verdict(path, (*(tree.token_ids[node] for node in path), 9), FinalKind.RECOVERED)
        holding.count([seen_step(tokens, union)], is_union=True)
    cut = Verdict((1,), (1, 1), FinalKind.BONUS)
    holding.count([seen_step(cut, union.keep([0, 1, 4]), union)], is_union=True)
    counts = holding.take("r")
    assert (counts.num_steps, counts.taken) == (4, Tally(5, 11))  # 3, 1, 0 and 1 of a draft
    assert counts.alone == {"a": Tally(5, 13), "b": Tally(2, 2), "c": Tally(1, 1)}


def test_parts_of_a_union_learn_what_they_gave_even_if_it_is_nothing():
    experience = Experience([("a",), ("b",), ("a", "b")], ("a", "b"), 4, {"a": 0.5, "b": 0.5})
    share = SimulatedShare("r", ("a", "b"), None)
    before = experience.gains([share])[0].sum(axis=1)
    alone = defaultdict(Tally, a=Tally(30, 90))
    counts = Counts(0.0, ("a", "b"), 10, Tally(30, 90), alone)
    experience.learn_counts("r", ("a", "b"), 4, counts)
    after = experience.gains([share])[0].sum(axis=1)
    assert after[0] > before[0]
    assert after[1] < before[1] / 2
    experience.learn_counts("r", ("a",), 4, Counts(0.0, ("b",), 10))  # it may not have "a"
    assert experience.gains([share])[0].sum(axis=1) == pytest.approx(after)


def test_a_request_that_was_never_planned_for_teaches_others():
    gains = gains_of()
    before = gains.of([("r1", 0)])[0, 0].sum()
    gains.learn_count(("new", 0), 0, 4, **counted(20, 60))
    assert gains.of([("r2", 0)])[0, 0].sum() > before


def test_a_request_that_nobody_drafted_for_follows_what_others_show():
    """It kept what was known when it began: of sixteen, half were never drafted for."""
    gains = gains_of(num_requests=2)
    for _ in range(8):
        gains.learn_count(("r0", 0), 0, 4, **counted(20, 70))
    first, second = gains.of([("r0", 0), ("r1", 0)])[:, 0, 0]
    assert second == pytest.approx(first, rel=0.2)
    gains.learn_count(("r1", 0), 0, 4, **counted(4, 8))  # its own luck counts from there
    assert second / 2 < gains.of([("r1", 0)])[0, 0, 0] < second


def test_drafts_that_some_of_many_requests_have_are_soon_drafted_for_all():
    """0.93 of the best fixed way, where those that had none at first never had any; now 0.97."""
    simulated = machine(LARGE, good=0.85)
    rate = simulated.run(simulated.planner(), num_requests=16, num_steps=600)
    fixed = machine(LARGE, good=0.85).run_fixed(["model"], 2, num_requests=16, num_steps=600)
    assert rate > 0.95 * fixed


def test_a_union_is_worth_no_less_than_its_best_part():
    gains = Gains([("a",), ("b",), ("a", "b")], 4, {"a": 0.5, "b": 0.1})
    gains.of([("r", 0)])
    gains.learn_count(("r", 0), 2, 4, **counted(100, 0))
    first, second, union = gains.of([("r", 0)])[0]
    assert (union == first).all()
    assert (first > second).all()


def test_a_new_request_begins_with_what_others_counted():
    gains = gains_of()
    for _ in range(12):
        gains.learn_count(("r0", 0), 0, 1, **counted(20, 0))
    assert gains.of([("r1", 0)])[0, 0, 0] < 0.1


def test_texts_that_change_at_one_temperature_change_at_the_others():
    """Edits that were asked for greedily, and then at temperature 1.

    What the copying drafters had shown was not known there: in the sweep of the embedded pair the
    first rounds were decoded plainly.
    """
    gains = Gains([("copy",)], 2, {"copy": 0.2})
    for kind in (0, 3):
        for _ in range(50):
            gains.learn((f"story {kind}", kind), 0, np.array([0.1, 0.05]), 2)
    before = {kind: gains.of([(f"before {kind}", kind)])[0, 0, 0] for kind in (0, 3)}
    for index in range(8):
        gains.learn_count((f"edit {index}", 0), 0, 2, **counted(20, 30))
    after = {kind: gains.of([(f"after {kind}", kind)])[0, 0, 0] for kind in (0, 3)}
    assert after[0] > 4 * before[0]
    assert after[3] == pytest.approx(after[0], rel=0.05)


def verdict(path, final=7):
    return Verdict(tuple(path), (*([1] * len(path)), final), FinalKind.RECOVERED)


def test_holding_counts_tokens_of_the_plan_alone():
    """What a grammar forces would have been drafted in any case."""
    holding = Holding(["forced"])
    holding.begin(1.0)
    tree = TokenTree.chain([0, 1, 1, 1])
    draft = replace(Draft.from_drafter("model", tree), source=("", "forced", "model", MERGED))
    drafters = ("forced", "model")
    holding.count([seen_step(verdict([1, 2, 3]), draft, drafters=drafters)])
    holding.count([seen_step(None, draft, drafters=drafters)])
    assert holding.take("r") == Counts(0.0, drafters, 1, Tally(2, 4))
    assert holding.take("r") is None


@pytest.mark.parametrize(("tokens_per_step", "is_wanting"), [(1, True), (2, False)])
def test_a_plan_under_plain_decoding_is_wanting_after_some_steps(tokens_per_step, is_wanting):
    holding = Holding([])
    holding.begin(1.5)  # tokens per millisecond
    draft = Draft.from_drafter("model", TokenTree.chain([0, 1, 1]))
    found = []
    for _ in range(8):
        holding.count([seen_step(verdict([1] * (tokens_per_step - 1)), draft)])
        found.append(holding.is_wanting)
    assert found == [False] * 5 + [is_wanting] * 3


def dues(trials, num_plans, *, is_plain):
    return [trials.is_due(is_plain=is_plain) for _ in range(num_plans)]


def trials_of(num_drafters=3):
    labels = "abc"[:num_drafters]
    return Trials(list_arms(labels), labels)


def picks(trials, rates, present, count, times=None):
    """Return the ways that are tried, plans going by between them."""
    times = np.array(times) if times else np.ones(len(rates))
    found = []
    for _ in range(count):
        trials.is_due(is_plain=False)
        found.append(trials.pick(np.array(rates), times, present))
    return found


A, B, C, AB, AC, BC, ABC, NOBODY = range(8)  # ways to draft with three drafters, and plain decoding


def test_a_new_text_is_tried_at_once_where_nothing_is_drafted():
    trials, even = trials_of(), (np.ones(8), np.ones(8), NOBODY)
    for _ in range(20):
        if trials.is_due(is_plain=True):
            trials.pick(*even)
    assert dues(trials, 1, is_plain=True) == [False]
    trials.begin_text()
    assert dues(trials, 1, is_plain=True) == [True]
    trials.pick(*even)
    trials.begin_text()
    assert dues(trials, 1, is_plain=False) == [False]  # its drafts are counted anyway


def test_every_drafter_has_its_turn_beside_plain_decoding_and_the_best_way_every_second():
    picked = picks(trials_of(), [0.9, 0.9, 0.9, 0.9, 0.9, 0.95, 0.9, 1.0], NOBODY, 12)
    assert picked[1::2] == [BC] * 6
    assert sorted(picked[::2]) == [A, A, B, B, C, C]


def test_plain_decoding_is_timed_soon_where_drafts_are_used_from_the_start():
    """Others that were nearly as good had their turns first, some for thousands of steps."""
    trials, picked = trials_of(), []
    for _ in range(24):
        if trials.is_due(is_plain=False):
            rates = [1.0, 0.99, 0.99, *[0.98] * 4, 0.3]  # far too slow, as far as is known
            picked.append(trials.pick(np.array(rates), np.ones(8), A))
    assert picked.count(NOBODY) == 1
    begun_plain = trials_of()
    begun_plain.is_due(is_plain=True)
    assert NOBODY not in picks(begun_plain, rates, A, 24)


def test_what_is_used_is_not_tried_and_plain_decoding_is():
    picked = picks(trials_of(), [0.9, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], B, 12)
    assert set(picked) == {A, C, NOBODY}
    assert all(picked.count(way) == 4 for way in set(picked))
    single = Trials([("a",)], "a")
    assert picks(single, [1.0, 0.9], 0, 4) == [1] * 4


def test_who_texts_tell_of_is_tried_only_if_it_is_nearly_as_good():
    """What it would give is known; what it takes, if it is used, nobody else can tell."""
    labels = "abc"
    near = Trials(list_arms(labels), "a", "bc")
    picked = picks(near, [1.0, 0.95, 0.85, 0.3, 0.3, 0.3, 0.3, 0.3], A, 8)
    assert set(picked) == {B}
    every = picks(trials_of(), [1.0, 0.95, 0.85, 0.3, 0.3, 0.3, 0.3, 0.3], A, 8)
    assert set(every) == {B, C}


def test_who_would_lose_too_much_alone_is_tried_beside_others():
    """A drafter that copies what the one in use copies, and is not known for it yet."""
    picked = picks(trials_of(), [0.3, 1.0, 0.3, 0.97, 0.3, 0.3, 0.3, 0.3], B, 4)
    assert picked == [AB] * 4


def test_nothing_is_tried_where_all_would_lose_too_much():
    assert picks(trials_of(), [0.5, 1.0, *[0.5] * 6], B, 2) == [B, B]
    assert picks(trials_of(), [*[0.5] * 7, 1.0], NOBODY, 2) == [NOBODY, NOBODY]


def test_dear_trials_are_rarer():
    rates = [0.98, 1.0, 0.7, *[0.1] * 5]  # "c" loses fifteen times as much as "a"
    picked = picks(trials_of(), rates, B, 100)
    assert 2 < picked.count(A) / picked.count(C) < 6


def test_guesses_that_are_worth_more_boast_less():
    """A drafter that is thought to boast stops early; counted tokens put it right."""
    simulated = machine(SMALL)
    planner = simulated.planner()
    simulated.run_texts(planner, [HARD] * 4)
    before = planner._experience.boast("model")
    simulated.run_texts(planner, [EASY] * 8)
    assert before > 2.0
    assert planner._experience.boast("model") < before / 2
    assert math.isfinite(planner._experience.boast("model"))
