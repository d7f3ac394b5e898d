"""Steps between plans in which nothing is decided: the same answers, nothing lost."""

from dataclasses import replace

import pytest

from foretoken.core.draft import DraftBudget
from foretoken.planner.cruising import Cruise
from foretoken.planner.pacing import Pace
from tests.planner.simulation import SimulatedShare
from tests.planner.test_adaptive import SMALL, machine

ORDERS = [{"copy": DraftBudget(max_nodes=5, max_depth=16, min_gain=0.1)}, {}]
SIZES = [2, 0]


def shares(room=16, num_requests=2):
    budget = DraftBudget(max_nodes=room, max_depth=room)
    return [SimulatedShare(f"r{index}", ("copy",), budget) for index in range(num_requests)]


@pytest.fixture
def pace():
    pace = Pace()
    for _ in range(20):
        while not pace.begins_plan(2):
            pass
        pace.planned(0.0005, 0.001)
    pace.begins_plan(2)
    return pace


@pytest.fixture
def cruise(pace):
    cruise = Cruise(pace)
    cruise.begin(shares(), ORDERS, SIZES)
    return cruise


def num_cruised(cruise, shares):
    count = 0
    while cruise.orders(shares) is not None:
        assert cruise.is_on
        count += 1
    assert not cruise.is_on
    return count


def test_it_answers_until_the_next_plan(pace, cruise):
    left = pace.period - 2
    assert cruise.is_ahead
    assert num_cruised(cruise, shares()) == left
    assert not cruise.is_ahead
    assert pace.begins_plan(2)


def prompts():
    return [replace(shares()[0], num_rows=3), shares()[1]]


@pytest.mark.parametrize(
    "requests",
    [
        [replace(share, budget=None) for share in shares()],
        prompts(),
        [replace(share, drafters=("copy", "forced")) for share in shares()],
    ],
    ids=["no budgets", "prompts", "who always drafts"],
)
def test_it_does_not_answer_where_each_step_is_another(pace, requests):
    cruise, before = Cruise(pace, ["forced"]), pace._steps_left
    cruise.begin(requests, ORDERS, SIZES)
    assert cruise.orders(shares()) is None
    assert pace._steps_left == before


@pytest.mark.parametrize("others", [shares(num_requests=1), shares(num_requests=3)])
def test_other_requests_end_it_and_nothing_has_passed(pace, others):
    before = pace._steps_left
    cruise = Cruise(pace)
    cruise.begin(shares(), ORDERS, SIZES)
    for _ in range(3):
        assert cruise.orders(shares()) == ORDERS
    assert cruise.orders(others) is None
    assert pace._steps_left == before - 3
    assert cruise.orders(shares()) is None


def test_bounds_that_shrink_are_kept_to(cruise):
    narrow, empty = shares(room=3), shares(room=0)
    assert cruise.orders([narrow[0], shares()[1]]) == [
        {"copy": DraftBudget(max_nodes=3, max_depth=3, min_gain=0.1)},
        {},
    ]
    assert cruise.orders(empty) == [{}, {}]
    prompt = [replace(shares()[0], budget=None), shares()[1]]
    assert cruise.orders(prompt) == [{}, {}]
    assert cruise.orders(shares()) == ORDERS


def told(cruise, num_times):
    """Return what a cruise tells, that many times, of steps that are numbered."""
    found = []
    for number in range(6 * num_times):
        assert cruise.note(number) is (number % 6 == 5)
        if number % 6 == 5:
            found.append(cruise.take_notes())
    assert cruise.take_notes()[0] == []
    return found


def test_it_tells_after_some_steps_and_a_few_are_looked_at(cruise):
    found = told(cruise, 30)
    assert [steps for steps, _ in found] == [list(range(at, at + 6)) for at in range(0, 180, 6)]
    watched = [place for place, (_, is_watched) in enumerate(found) if is_watched]
    assert watched == list(range(3, 30, 4))


def test_all_of_a_trial_is_looked_at_but_for_its_first_steps(pace):
    cruise = Cruise(pace)
    for _ in range(2):
        cruise.begin(shares(), ORDERS, SIZES, is_trial=True)
        assert [is_watched for _, is_watched in told(cruise, 4)] == [False, True, True, True]


def test_what_is_learned_of_time_is_what_steps_take_that_nobody_looks_at():
    """Steps that were looked at took longer for that, and drafts were taken for dearer."""
    simulated = machine(SMALL)
    planner = simulated.planner()
    simulated.run(planner, num_steps=400)
    batch = [SimulatedShare("r0", ("model", "copy"), DraftBudget(max_nodes=16, max_depth=16))]
    num_quiet = 0
    for _ in range(2000):
        is_quiet = planner._cruise.is_ahead or planner._pace._steps_left > 0
        num_quiet += is_quiet
        simulated.rest_ms = 0.2 if is_quiet else 0.4
        simulated._step(planner, batch)
    assert num_quiet > 1700
    assert planner._cost.overhead_ms(1, 5) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("num_requests", [1, 3])
def test_between_plans_steps_are_answered_alike_and_all_tokens_are_counted(num_requests):
    simulated = machine(SMALL)
    planner = simulated.planner()
    simulated.run(planner, num_requests=num_requests, num_steps=600)
    counted = num_tokens = num_on = 0
    counts = planner._holding.count

    def count(steps, **how):
        nonlocal counted
        counted += sum(len(verdict.token_ids) for seen in steps for verdict in seen.verdicts)
        counts(steps, **how)

    planner._holding.count = count
    observe = planner.observe

    def watch(seen_shares, scored, verdicts, times):
        nonlocal num_tokens, num_on
        if planner._step is None and times.draft_s:
            num_tokens += sum(len(verdict.token_ids) for verdict in verdicts)
        num_on += planner._cruise.is_on
        observe(seen_shares, scored, verdicts, times)

    planner.observe = watch
    simulated.run(planner, num_requests=num_requests, num_steps=400)
    planner._count_cruise()
    assert num_on > 200
    in_trials = counted - num_tokens  # planned steps of trials are counted, too
    assert 0 <= in_trials < 0.1 * num_tokens
