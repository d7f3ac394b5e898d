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
    cruise.begin(ORDERS, SIZES)
    return cruise


def num_cruised(cruise, shares):
    count = 0
    while cruise.orders(shares) is not None:
        assert cruise.is_on
        count += 1
    assert not cruise.is_on
    return count


def test_it_answers_until_a_step_is_to_be_learned_from(pace, cruise):
    left = pace._steps_left
    count = num_cruised(cruise, shares())
    assert count == 6
    assert pace._steps_left == left
    pace.begins_plan(2)
    assert pace.is_settled


@pytest.mark.parametrize("others", [shares(num_requests=1), shares(num_requests=3)])
def test_other_requests_end_it_and_nothing_has_passed(pace, others):
    before = pace._steps_left
    cruise = Cruise(pace)
    cruise.begin(ORDERS, SIZES)
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


def test_it_tells_after_some_steps(cruise):
    assert [cruise.note(number) for number in range(3)] == [False, False, True]
    assert cruise.take_notes() == [0, 1, 2]
    assert cruise.take_notes() == []


@pytest.mark.parametrize("num_requests", [1, 3])
def test_between_plans_steps_are_answered_alike_and_all_tokens_are_counted(num_requests):
    simulated = machine(SMALL)
    planner = simulated.planner()
    simulated.run(planner, num_requests=num_requests, num_steps=600)
    counted = num_tokens = num_on = 0
    counts = planner._holding.count

    def count(seen, **how):
        nonlocal counted
        counted += sum(len(verdict.token_ids) for verdict in seen.verdicts)
        counts(seen, **how)

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
