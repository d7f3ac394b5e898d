"""What the planner learns: acceptance, worth of drafts, corrections of costs, and its own pace."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.planner.acceptance import Acceptance, judged_nodes
from foretoken.planner.base import StepTimes
from foretoken.planner.choices import Seen
from foretoken.planner.cost import CostModel
from foretoken.planner.cost_correction import Correction
from foretoken.planner.experience import Experience
from foretoken.planner.gains import Gains, list_arms, temperature_class
from foretoken.planner.learning import Learning
from foretoken.planner.pacing import PLANNING_SHARE, Pace
from tests.planner.simulation import SimulatedShare
from tests.planner.test_adaptive import SMALL

# -- acceptance ----------------------------------------------------------------------------------


def test_a_guess_is_first_taken_at_its_own_word():
    acceptance = Acceptance()
    assert acceptance.estimate(1, 0, math.log(0.3)) == pytest.approx(0.3)
    assert acceptance.estimate(1, 0, 0.0) == pytest.approx(0.9)  # nobody is certain


def test_estimates_come_to_what_is_seen_by_confidence_depth_and_rank():
    acceptance, rng = Acceptance(), random.Random(0)
    rates = {(1, 0, 0.7): 0.9, (1, 1, 0.7): 0.2, (6, 0, 0.7): 0.5, (1, 0, 0.1): 0.05}
    for _ in range(600):
        for (depth, rank, claim), rate in rates.items():
            acceptance.learn(depth, rank, math.log(claim), rng.random() < rate)
    for (depth, rank, claim), rate in rates.items():
        estimate = acceptance.estimate(depth, rank, math.log(claim))
        # 600 draws have a standard error of at most 0.02; the prior weighs 3 %.
        assert estimate == pytest.approx(rate, abs=0.09)


def test_what_was_learned_fades():
    acceptance = Acceptance()
    for is_taken in [True] * 300 + [False] * 300:
        acceptance.fade()
        acceptance.learn(1, 0, -0.1, is_taken)
    assert acceptance.estimate(1, 0, -0.1) < 0.2


def test_weights_never_overflow():
    acceptance = Acceptance()
    for _ in range(20_000):
        acceptance.fade()
    acceptance.learn(1, 0, -0.1, True)
    assert 0.0 < acceptance.estimate(1, 0, -0.1) <= 1.0


def test_only_nodes_below_what_was_said_are_judged():
    #        1 ── 2 ── 3        said: 2, 9
    #        └─── 4 ── 5
    tree = TokenTree((1, 2, 3, 4, 5), (-1, 0, 1, 0, 3))
    draft = Draft.from_drafter("it", tree)
    assert judged_nodes(draft, (2, 9)) == [(1, 1, 0, True), (3, 1, 1, False), (2, 2, 0, False)]
    assert judged_nodes(draft, (7,)) == [(1, 1, 0, False), (3, 1, 1, False)]
    # The token after the last that was said is not known.
    assert judged_nodes(draft, (2,)) == [(1, 1, 0, True), (3, 1, 1, False)]


# -- worth of drafts -----------------------------------------------------------------------------


def make_gains(first_guess=0.5, max_nodes=6):
    labels = ("a", "b")
    return Gains(list_arms(labels), max_nodes, dict.fromkeys(labels, first_guess))


def test_ways_are_each_alone_pairs_of_a_few_and_all():
    assert list_arms(["a"]) == [("a",)]
    assert list_arms(["a", "b"]) == [("a",), ("b",), ("a", "b")]
    assert len(list_arms("abcd")) == 4 + 6 + 1
    assert len(list_arms("abcde")) == 5 + 1


def test_nodes_that_were_not_asked_for_keep_what_was_known_of_them():
    gains = make_gains()
    before = gains.of([("r", 0)])[0, 0].copy()
    for _ in range(50):
        gains.learn(("r", 0), 0, np.array([0.9]), 2)
    after = gains.of([("r", 0)])[0, 0]
    assert after[0] == pytest.approx(0.9, abs=0.02)
    assert after[1] == pytest.approx(0.0, abs=0.02)  # asked for, and not proposed
    np.testing.assert_allclose(after[2:], before[2:])


def test_a_union_is_worth_no_more_than_its_parts_together():
    gains = make_gains(first_guess=0.9)
    for arm in (0, 1):
        for _ in range(60):
            gains.learn(("r", 0), arm, np.array([0.3, 0.1]), 6)
    union = gains.of([("r", 0)])[0, 2]
    np.testing.assert_allclose(union, [0.3, 0.3, 0.1, 0.1, 0.0, 0.0], atol=0.03)


def test_a_new_request_begins_with_what_others_of_its_temperature_have_shown():
    gains = make_gains()
    for index in range(60):
        gains.learn((f"g{index}", 0), 0, np.array([0.95, 0.9]), 6)
        gains.learn((f"s{index}", 2), 0, np.array([0.1]), 6)
        gains.forget(f"g{index}")
        gains.forget(f"s{index}")
    assert gains.of([("new", 0)])[0, 0, 0] > 0.8
    assert gains.of([("other", 2)])[0, 0, 0] < 0.25
    # A temperature of which nothing is known begins with the nearest.
    assert gains.of([("hot", 3)])[0, 0, 0] < 0.25


def test_a_draft_tells_what_a_larger_one_would_be_worth():
    """What was known of larger ones came from other texts, and kept drafts small for long."""
    gains = make_gains(first_guess=0.1, max_nodes=8)
    for _ in range(400):
        gains.learn(("r", 0), 0, 0.8 ** np.arange(1, 5), 4)
    assert gains.of([("other", 0)])[0, 0] == pytest.approx(0.8 ** np.arange(1, 9), abs=1e-3)


def test_rows_of_forgotten_requests_are_used_again():
    gains = make_gains()
    for index in range(100):
        gains.of([(f"r{index}", 0)])
        gains.forget(f"r{index}")
        gains.forget(f"r{index}")
    assert len(gains._counts) == 4


def test_a_tree_is_cut_to_its_likeliest_nodes_and_a_chain_to_its_first():
    experience = Experience([("copy",)], ["copy"], 8, {"copy": 0.4})
    share = SimpleNamespace(request_id="one", temperature=0.0)
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 0, 1))
    logprobs = (0.0, math.log(0.1), math.log(0.8), math.log(0.8))
    draft = Draft.from_drafter("copy", tree, draft_logprobs=logprobs)
    assert experience.cut(share, draft, 1).tree == TokenTree.chain((1, 3))
    assert experience.cut(share, draft, 2).tree == TokenTree((1, 2, 3), (-1, 0, 0))
    assert experience.cut(share, draft, 3) is draft
    chain = Draft.from_drafter("copy", TokenTree.chain((1, 2, 3)), draft_logprobs=(0.0,) * 3)
    assert experience.cut(share, chain, 1).tree == TokenTree.chain((1, 2))


@pytest.mark.parametrize(
    ("temperature", "kind"), [(0.0, 0), (0.3, 1), (0.7, 2), (1.0, 3), (1.5, 4), (9.0, 4)]
)
def test_classes_of_temperature(temperature, kind):
    assert temperature_class(temperature) == kind


# -- corrections of costs ------------------------------------------------------------------------


def test_passes_of_one_size_move_the_level_and_contrast_shows_what_comes_on_top():
    correction, rng = Correction(), random.Random(0)
    small, large = 0.5, 0.02
    for _ in range(300):
        correction.observe(large, 1.5 * math.exp(0.05 * rng.gauss(0, 1)))
    assert correction.factor(large) == pytest.approx(1.5, rel=0.05)
    assert correction.factor(small) > 1.2  # nothing speaks against it
    for _ in range(20):
        for _ in range(8):
            correction.observe(large, 1.5 * math.exp(0.05 * rng.gauss(0, 1)))
        correction.observe(small, 0.9 * math.exp(0.05 * rng.gauss(0, 1)))
    assert correction.factor(large) == pytest.approx(1.5, rel=0.05)
    assert correction.factor(small) == pytest.approx(0.9, rel=0.08)


def test_one_interrupted_pass_says_little():
    correction = Correction()
    for _ in range(100):
        correction.observe(0.5, 1.0)
    correction.observe(0.5, 1000.0)
    assert correction.factor(0.5) < 1.05


# -- pace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [0.0005, 0.005, 0.2])
def test_planning_stays_under_its_share(step_s):
    pace, planned_s, total_s = Pace(), 0.0, 0.0
    for step in range(4000):
        if pace.begins_plan(1):
            pace.planned(0.0004, step_s + 0.0004)
            planned_s += 0.0004 if step >= 100 else 0.0
        total_s += step_s if step >= 100 else 0.0
    assert 0 < planned_s <= max(PLANNING_SHARE * total_s, 0.0004 * 3900 / 64 * 1.1)
    assert planned_s / 3900 <= 125e-6 * 1.05


@pytest.mark.parametrize(
    ("num_before", "num_now", "is_planned"),
    [(1, 2, True), (2, 3, True), (16, 8, True), (16, 24, True), (16, 15, False), (4, 5, False)],
)
def test_another_batch_is_planned_at_once_and_one_request_of_many_makes_none(
    num_before, num_now, is_planned
):
    pace = Pace()
    for _ in range(50):
        if pace.begins_plan(num_before):
            pace.planned(0.001, 0.002)
    assert not pace.begins_plan(num_before)
    assert pace.begins_plan(num_now) == is_planned


def test_a_batch_that_shrinks_one_by_one_is_planned_when_it_is_another():
    pace = Pace()
    for _ in range(50):
        if pace.begins_plan(16):
            pace.planned(0.005, 0.002)

    def shrink():
        planned = []
        for count in range(15, 0, -1):
            if pace.begins_plan(count):
                planned.append(count)
                pace.planned(0.005, 0.002)
        return planned

    assert shrink() == [10, 6, 4, 2, 1]


def test_a_plan_that_is_wanted_sooner_comes_after_half_of_the_time_but_not_at_any_price():
    plan_s, step_s = 0.0001, 0.0005
    price = plan_s / (PLANNING_SHARE * step_s)

    def num_steps(ends):
        pace = Pace()
        for _ in range(1000):
            if pace.begins_plan(1):
                pace.planned(plan_s, step_s + plan_s)
        while not pace.begins_plan(1):
            pass
        pace.planned(plan_s, step_s + plan_s)
        for _ in range(ends):
            pace.sooner()
        return next(count for count in itertools.count() if pace.begins_plan(1))

    assert num_steps(0) == pytest.approx(price, abs=1)
    assert num_steps(1) == num_steps(0) // 2
    assert num_steps(16) == pytest.approx(price / 4, abs=1)


def test_steps_to_learn_from_are_free_of_planning():
    pace = Pace()
    for _ in range(400):
        is_planned = pace.begins_plan(1)
        if is_planned:
            pace.planned(0.0004, 0.001)
        assert not (is_planned and pace.is_settled) or pace.period <= 2


def test_a_first_plan_that_waited_for_its_code_does_not_space_the_next_ones():
    pace = Pace()
    for plan_s in [0.05] + [0.0004] * 20:
        while not pace.begins_plan(1):
            pass
        pace.planned(plan_s, plan_s + 0.04)
    assert pace.period == 4  # 0.4 ms each, 0.125 ms a step


def test_a_plan_for_a_size_that_comes_back_goes_on_where_it_was_left():
    pace = Pace()
    for _ in range(200):
        if pace.begins_plan(16):
            pace.planned(0.005, 0.002)
    assert pace.begins_plan(4)
    assert pace.is_other
    pace.planned(0.005, 0.002)
    before = pace._steps_left
    assert not pace.begins_plan(14)
    assert pace.gone_back_to == 16
    assert not pace.begins_plan(15)
    assert pace.gone_back_to == 0
    assert not pace.begins_plan(4)
    assert pace.gone_back_to == 4
    assert pace._steps_left == before - 1
    pace.drop_left()
    assert pace.begins_plan(16)  # what it was made from has changed
    assert pace.is_other


def test_what_rows_and_levels_take_is_told_by_steps_of_different_sizes_that_are_read_together():
    """In the mean all readings are alike, and the time of a row is anybody's guess."""
    cost = CostModel(SMALL)
    learning = Learning(cost, [("copy",)], ("copy",), (), 16, {"copy": 0.5}, lambda: 0.0)
    budget = DraftBudget(max_nodes=16, max_depth=16)
    share = SimulatedShare("r", ("copy",), budget)

    def step(size):
        tree = TokenTree(tuple(range(size + 1)), tuple(range(-1, size)))
        draft = Draft.from_drafter("copy", tree, draft_logprobs=(0.0,) * (size + 1))
        verdict = Verdict((), (1,), FinalKind.RECOVERED)
        draft_ms, rest_ms = 0.1 + 0.02 * size, 0.1 + 0.03 * (1 + size)
        pass_ms = SMALL.pass_ms(1 + size, share.num_keys)
        times = StepTimes(
            {"copy": draft_ms / 1000}, pass_ms / 1000, (draft_ms + rest_ms + pass_ms) / 1000
        )
        return Seen([share], [{"copy": budget}], [draft], [draft], [verdict], times)

    for _ in range(40):
        steps = [step(size) for size in (1, 9, 2, 8, 1, 9)]
        learning.learn_held(steps, ("copy",), is_judged=False, is_timed=True)
    per_row = cost.overhead_ms(1, 10) - cost.overhead_ms(1, 2)
    assert per_row == pytest.approx(8 * 0.03, rel=0.1)
    per_level = cost.draft_ms("copy", 1, 9) - cost.draft_ms("copy", 1, 1)
    assert per_level == pytest.approx(8 * 0.02, rel=0.1)
