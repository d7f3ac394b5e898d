"""Rest: plain decoding goes on without the planner, and it wakes up when something may change."""

import random
from statistics import mean

import pytest

from foretoken.core.draft import DraftBudget
from foretoken.planner.base import StepTimes
from foretoken.planner.cost import CostModel
from foretoken.planner.pacing import Pace
from foretoken.planner.probing import Probes
from foretoken.planner.resting import Rest
from tests.planner.simulation import SimulatedShare
from tests.planner.test_adaptive import SMALL, machine

STEP_S, PLAN_S = 0.0005, 0.0004


def settled_pace(num_requests=1):
    """Return a pace that knows what plans and steps take, right after a plan."""
    pace = Pace()
    for _ in range(2000):
        if pace.begins_plan(num_requests):
            pace.planned(PLAN_S, STEP_S + PLAN_S)
    while not pace.begins_plan(num_requests):
        pass
    pace.planned(PLAN_S, STEP_S + PLAN_S)
    return pace


def shares(count=1, temperature=0.0, drafters=("model", "copy")):
    budget = DraftBudget(max_nodes=8, max_depth=8)
    return [
        SimulatedShare(f"r{index}", drafters, budget, temperature=temperature)
        for index in range(count)
    ]


def walk(pace, rest, num_steps):
    """Return for each step whether it is planned, and whether it is one to learn from."""
    seen = []
    for _ in range(num_steps):
        if rest is not None and rest.orders(1) is not None:
            seen.append((False, False))
            continue
        is_planned = pace.begins_plan(1)
        if is_planned:
            pace.planned(PLAN_S, STEP_S + PLAN_S)
        elif rest is not None and not pace.is_settled:
            rest.begin(shares())
        seen.append((is_planned, not is_planned and pace.is_settled))
    return seen


def test_a_rest_misses_no_plan():
    pace = settled_pace()
    awake = walk(settled_pace(), None, 1000)
    resting = walk(pace, Rest(pace, Probes([])), 1000)
    plans = [step for step, (is_planned, _) in enumerate(awake) if is_planned]
    assert len(plans) > 2
    assert [step for step, (is_planned, _) in enumerate(resting) if is_planned] == plans


def test_what_steps_of_a_rest_took_is_learned_without_the_first_ones():
    cost, rest = CostModel(SMALL), Rest(settled_pace(), Probes([]))
    for _ in range(20):
        rest.begin(shares(2))
        for pass_ms in [9.0, 9.0, *[0.6] * 40, 7.0, *[0.6] * 40]:
            rest.note(StepTimes({}, pass_ms / 1000, (pass_ms + 0.2) / 1000))
        assert rest.teach(cost) == pytest.approx((2 * 9.2 + 80 * 0.8 + 7.2) / 1000)
    assert rest.teach(cost) == 0.0
    # One that was interrupted counts as three: 0.015 ms in the mean, where it would be 0.08.
    assert cost.plain_ms(40, 2) == pytest.approx(0.8 + 0.015, rel=0.01)


def test_plain_decoding_is_not_taken_for_faster_than_it_is():
    """The longest of the few steps of a trial did not count, those with drafts all did."""
    rng, cost = random.Random(0), CostModel(SMALL)
    rest, found = Rest(settled_pace(), Probes([])), []
    for _ in range(600):
        rest.begin(shares())
        for _ in range(2 + 5):
            pass_ms, rest_ms = 0.4 * rng.uniform(0.5, 1.5), 0.2 * rng.uniform(0.5, 1.5)
            rest.note(StepTimes({}, pass_ms / 1000, (pass_ms + rest_ms) / 1000))
        rest.teach(cost)
        found.append(cost.plain_ms(7, 1))
    assert mean(found[100:]) == pytest.approx(0.6, rel=0.02)


def test_plain_decoding_is_not_taken_for_slower_than_it_is():
    """Where steps are looked at they take longer, and all that was learned came from such steps.

    Plain decoding seemed a sixth slower than it was, so drafts were made that did not pay.
    """
    simulated = machine(SMALL, good=0.02)
    planner = simulated.planner()
    simulated.run(planner, num_steps=400)
    batch = [SimulatedShare("r0", ("model", "copy"), DraftBudget(max_nodes=16, max_depth=16))]
    num_resting = 0
    for _ in range(3000):
        is_resting = planner._rest._steps_left > 0
        num_resting += is_resting
        simulated.rest_ms = 0.2 if is_resting else 0.5
        simulated._step(planner, batch)
    assert num_resting > 2000
    assert planner._cost.plain_ms(20, 1) == pytest.approx(0.4 + 0.2, rel=0.05)


def test_most_plain_steps_are_rests():
    pace = settled_pace()
    rest, num_asked = Rest(pace, Probes([])), 0
    for _ in range(500):
        if rest.orders(1) is None:
            num_asked += 1
            if pace.begins_plan(1):
                pace.planned(PLAN_S, STEP_S + PLAN_S)
            elif not pace.is_settled:
                rest.begin(shares())
    assert num_asked < 500 / 12


@pytest.mark.parametrize("wakes", ["another number", "a request ends"])
def test_what_is_left_of_a_rest_has_not_passed(wakes):
    pace, awake = settled_pace(), settled_pace()
    rest = Rest(pace, Probes([]))
    for one in (pace, awake):
        assert not one.begins_plan(1)
    rest.begin(shares())
    for _ in range(3):
        assert rest.orders(1) is not None
        assert not awake.begins_plan(1)
    if wakes == "another number":
        assert rest.orders(2) is None
    else:
        rest.end()
        assert rest.orders(1) is None

    def steps_left(one):
        return next(step for step in range(1000) if one.begins_plan(1))

    assert steps_left(pace) == steps_left(awake)


@pytest.fixture
def poor():
    """A rest whose probes owe time, after a first plan for one request."""
    pace, probes = settled_pace(), Probes(["model", "copy"])
    probes.earn(STEP_S)
    probes.pay(10 * STEP_S)
    rest = Rest(pace, probes)
    assert rest.needs_plan(shares(), is_plain=True)  # the first of its kind
    assert not rest.needs_plan(shares(), is_plain=True)
    return rest, probes


@pytest.mark.parametrize(
    "decoding",
    [shares(2), shares(temperature=0.7), shares(drafters=("model",))],
    ids=["more requests", "another temperature", "other drafters"],
)
def test_requests_of_another_kind_are_planned(poor, decoding):
    rest, _ = poor
    assert rest.needs_plan(decoding, is_plain=True)
    assert not rest.needs_plan(decoding, is_plain=True)


def test_drafts_are_planned_always_and_plain_decoding_where_something_may_be_tried(poor):
    rest, probes = poor
    assert rest.needs_plan(shares(), is_plain=False)
    for _ in range(3000):
        probes.earn(STEP_S)
    assert probes.has_credit
    assert rest.needs_plan(shares(), is_plain=True)


def test_a_plan_that_would_be_the_same_holds_as_long_again(poor):
    rest, _ = poor
    pace = rest._pace
    period = pace.period
    for _ in range(3):
        assert not rest.needs_plan(shares(), is_plain=True)
        assert next(step for step in range(1000) if pace.begins_plan(1)) == period - 1


def test_plans_that_are_left_out_become_rare_like_those_that_are_made():
    """Without credit after the first few plans, each step asked for the next plan, and none learned
    anything: no credit was ever earned again."""
    pace, probes = Pace(), Probes(["model"])
    while not pace.is_new or pace.period == 1:
        if pace.begins_plan(1):
            pace.planned(PLAN_S, STEP_S + PLAN_S)
        if not pace.is_new:
            break
    probes.earn(STEP_S)
    probes.pay(10 * STEP_S)
    rest = Rest(pace, probes)
    rest.needs_plan(shares(), is_plain=True)
    num_asked = 0
    for _ in range(300):
        if pace.begins_plan(1):
            num_asked += 1
            assert not rest.needs_plan(shares(), is_plain=True)
    assert num_asked < 12
