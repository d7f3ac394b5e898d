"""Steps between plans in which nothing is decided: the same answers, nothing lost."""

import random
from dataclasses import replace

import pytest

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.planner.base import StepTimes
from foretoken.planner.choices import Passed, Seen
from foretoken.planner.cruising import Cruise
from foretoken.planner.holding import Holding
from foretoken.planner.pacing import Pace
from tests.planner.simulation import RIGHT, SimulatedShare
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
    """Return what a cruise tells, that many times, of steps that are numbered by their tokens."""
    found, number, num_steps = [], 0, 0
    while len(found) < num_times:
        verdict = Verdict(tuple(range(1, 1 + number)), (RIGHT,) * (1 + number), FinalKind.BONUS)
        verdicts, times = [verdict, None], StepTimes({"copy": 0.1}, 0.2, 0.5)
        if cruise.keeps:
            drafts = [Draft.empty(RIGHT)] * 2
            is_time = cruise.keep(Seen(shares(), ORDERS, drafts, drafts, verdicts, times))
        else:
            is_time = cruise.count(verdicts, times)
        number, num_steps = number + 1, num_steps + 1
        if is_time:
            found.append((num_steps, *cruise.take_notes()))
            num_steps = 0
    assert cruise.take_notes() == (None, [], False)
    return found


def test_it_tells_after_some_steps_and_those_of_a_few_times_are_kept(cruise):
    found = told(cruise, 30)
    watched = [place for place, (*_, is_watched) in enumerate(found) if is_watched]
    assert watched == list(range(7, 30, 8))
    first = 0
    for num_steps, passed, steps, is_watched in found:
        assert num_steps == (6 if is_watched else 12)
        numbers = list(range(first, first + num_steps))
        first += num_steps
        assert (passed is None) is is_watched
        if passed is None:
            assert [len(seen.verdicts[0].path) for seen in steps] == numbers
        else:
            assert steps == []
            assert passed.taken == [numbers, []]  # the second one's request has failed
            assert passed.num_tokens == [1 + number for number in numbers]
            assert passed.seconds == [0.5] * 12
            assert (passed.num_plain_tokens, passed.plain_s) == (0, 0.0)
            assert passed.num_steps == 12


def test_all_of_a_trial_is_looked_at_but_for_its_first_steps(pace):
    cruise = Cruise(pace)
    for _ in range(2):
        cruise.begin(shares(), ORDERS, SIZES, is_trial=True)
        found = told(cruise, 4)
        assert [is_watched for *_, is_watched in found] == [False, True, True, True]
        assert {num_steps for num_steps, *_ in found} == {6}


def test_steps_of_several_drafters_at_once_are_all_kept(pace):
    """What each would have given alone is told by what it has proposed."""
    cruise = Cruise(pace)
    cruise.begin(shares(), [{**ORDERS[0], "model": ORDERS[0]["copy"]}, {}], SIZES)
    for num_steps, passed, steps, _ in told(cruise, 9):
        assert passed is None
        assert len(steps) == num_steps == 6


def test_what_several_have_drafted_together_may_be_larger_than_the_plan_wants(pace):
    """Nothing that one alone has drafted is: it is given bounds."""
    cruise, own = Cruise(pace), ORDERS[0]["copy"]
    draft = Draft.from_drafter("copy", TokenTree.chain([RIGHT] * 4), draft_logprobs=(0.0,) * 4)
    drafts = [draft, Draft.empty(RIGHT)]
    for size in (2, 3):
        cruise.begin(shares(), [{"copy": own, "model": own}, {}], [size, 0])
        assert cruise.are_within(drafts) is (size == 3)


def test_steps_in_which_nobody_drafted_are_added_up_apart(cruise):
    verdict = Verdict((), (RIGHT,), FinalKind.RECOVERED)
    for _ in range(3):
        assert not cruise.count([verdict, verdict], StepTimes({}, 0.2, 0.5))
    passed, _, _ = cruise.take_notes()
    assert passed.taken == [[], []]
    assert passed.num_tokens == passed.seconds == []
    assert (passed.num_plain_tokens, passed.plain_s) == (6, 1.5)
    assert passed.num_steps == 3


def test_steps_that_are_counted_are_worth_what_those_are_that_are_kept():
    """Every step of which numbers are enough, and the same ones looked at."""
    rng, budget = random.Random(0), DraftBudget(max_nodes=4, max_depth=4)
    batch = [SimulatedShare(f"r{index}", ("copy",), budget) for index in range(2)]
    kept, counted = Holding(()), Holding(())
    passed = Passed(batch, [[], []])
    tree = TokenTree.chain([RIGHT] * 5)
    draft = Draft.from_drafter("copy", tree, draft_logprobs=(0.0,) * 5)
    for _ in range(40):
        paths = [tuple(range(1, 1 + rng.randrange(5))) for _ in batch]
        verdicts = [Verdict(path, (RIGHT,) * (1 + len(path)), FinalKind.BONUS) for path in paths]
        verdicts[0] = verdicts[0] if rng.random() < 0.8 else None
        times = StepTimes({"copy": 0.1}, 0.2, rng.random())
        passed.add(verdicts, times)
        kept.count([Seen(batch, [{}] * 2, [draft] * 2, [draft] * 2, verdicts, times)])
    counted.count_passed(passed)
    assert counted.rate == pytest.approx(kept.rate)
    for plain_rate in (0.0, kept.rate, 1.2 * kept.rate, 2.0 * kept.rate):
        kept.plain_rate = counted.plain_rate = plain_rate
        assert counted.is_wanting == kept.is_wanting
    for share in batch:
        assert counted.take(share.request_id) == kept.take(share.request_id)


def test_what_is_learned_of_time_is_what_steps_take_that_nobody_looks_at():
    """Steps that were looked at took longer for that, and drafts were taken for dearer."""
    simulated = machine(SMALL)
    planner = simulated.planner()
    simulated.run(planner, num_steps=400)
    batch = [SimulatedShare("r0", ("model", "copy"), DraftBudget(max_nodes=16, max_depth=16))]
    num_quiet = 0
    for _ in range(2000):
        is_quiet = planner._cruise.is_ahead or planner._pace._steps_left > 0
        is_quiet |= planner._rest._steps_left > 0
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
    counts, counts_passed = planner._holding.count, planner._holding.count_passed

    def count(steps, **how):
        nonlocal counted
        counted += sum(seen.num_tokens for seen in steps)
        counts(steps, **how)

    def count_passed(passed):
        nonlocal counted
        counted += sum(passed.num_tokens)
        counts_passed(passed)

    planner._holding.count, planner._holding.count_passed = count, count_passed
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
