"""The adaptive planner in simulated time, where the best that could be done is known."""

import itertools
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.planner.adaptive import AdaptivePlanner
from foretoken.planner.base import StepTimes
from foretoken.planner.cost import CostCurve, CostModel
from foretoken.planner.probing import PROBING_SHARE
from tests.planner.simulation import RIGHT, Machine, SimulatedDrafter, SimulatedShare

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Memory decides what a pass costs: rows are nearly free.
LARGE = CostCurve(rows=ROWS, base_ms=(25, 25, 26, 28, 35, 55, 100, 190, 370))
# Arithmetic decides: every row has its price.
SMALL = CostCurve(rows=ROWS, base_ms=(0.4, 0.45, 0.55, 0.75, 1.15, 2.0, 3.7, 7.1, 14.0))


def machine(curve, *, good=0.7, seed=0, **drafters):
    return Machine(
        curve,
        {
            "model": SimulatedDrafter(good, level_ms=0.15 if curve is SMALL else 1.0),
            "copy": SimulatedDrafter(0.15, request_ms=0.02, claimed=-0.2),
            **drafters,
        },
        seed=seed,
    )


CELLS = list(itertools.product(["large", "small"], [1, 4, 16], [0.05, 0.5, 0.85]))


@pytest.mark.parametrize(("size", "num_requests", "good"), CELLS)
def test_nearly_as_fast_as_the_best_fixed_way_and_never_slower_than_plain(size, num_requests, good):
    curve = {"large": LARGE, "small": SMALL}[size]
    how = {"num_requests": num_requests, "num_steps": 4800 // num_requests}
    plain = machine(curve, good=good).run_fixed([], 0, **how)
    fixed = max(
        machine(curve, good=good).run_fixed([label], nodes, **how)
        for label in ("model", "copy")
        for nodes in (1, 2, 4, 8)
    )
    simulated = machine(curve, good=good)
    planner = simulated.planner()
    simulated.run(planner, num_requests=num_requests, num_steps=2000)  # to know its drafters
    auto = simulated.run(planner, **how)
    assert auto >= 0.98 * plain
    # The best of eight ways is known afterwards only, and their own luck is part of it.
    assert auto >= 0.92 * fixed


@pytest.mark.parametrize("num_steps", [5, 9, 20])
def test_a_planner_that_owes_time_for_its_first_trials_tries_again(num_steps):
    """Code that first drafts load takes milliseconds, which are owed before anything is known."""
    simulated = machine(SMALL, good=0.9)
    planner = simulated.planner()
    simulated.run(planner, num_steps=num_steps)
    planner._probes.pay(1.0)
    best = simulated.run_fixed(["model"], 4, num_steps=2000)
    simulated.run(planner, num_steps=4000)
    assert simulated.run(planner, num_steps=2000) >= 0.9 * best


def test_follows_a_drafter_that_becomes_good_and_one_that_becomes_bad():
    simulated = machine(LARGE, good=0.02, copy=SimulatedDrafter(0.0, claimed=-0.2))
    planner = simulated.planner()
    slow = simulated.run(planner, num_steps=600)
    simulated.drafters["copy"].acceptance = 0.9
    simulated.run(planner, num_steps=400)
    fast = simulated.run(planner, num_steps=400)
    assert fast > 2.5 * slow
    simulated.drafters["copy"].acceptance = 0.0
    simulated.run(planner, num_steps=400)
    assert simulated.run(planner, num_steps=400) > 0.97 * slow


def test_a_curve_that_was_measured_on_a_slower_machine_is_corrected():
    slower = CostCurve(rows=ROWS, base_ms=tuple(3 * ms for ms in SMALL.base_ms))
    simulated = machine(SMALL, good=0.85)
    right = simulated.run(simulated.planner(), num_steps=1500)
    simulated = machine(SMALL, good=0.85)
    wrong = simulated.run(simulated.planner(curve=slower), num_steps=1500)
    assert wrong > 0.97 * right


def test_requests_of_one_batch_get_what_suits_each():
    """Half of the requests repeat themselves; the drafter that copies serves these alone."""
    copy = SimulatedDrafter(
        lambda request_id: 0.9 if int(request_id[1:]) % 2 else 0.02,
        request_ms=0.2,
        claimed=-0.2,
    )
    simulated = Machine(LARGE, {"copy": copy})
    planner = simulated.planner()
    simulated.run(planner, num_requests=8, num_steps=300)
    served = Counter()
    order = planner.order

    def counted(shares):
        orders = order(shares)
        served.update(share.request_id for share, own in zip(shares, orders, strict=True) if own)
        return orders

    planner.order = counted
    simulated.run(planner, num_requests=8, num_steps=100)
    for index in range(8):  # the others by trials alone
        count = served[f"r{index}"]
        assert count > 80 if index % 2 else count < 20


@pytest.mark.parametrize("num_requests", [1, 8])
def test_drafters_that_do_not_pay_take_no_more_than_the_stated_share(num_requests):
    simulated = Machine(
        SMALL,
        {"dear": SimulatedDrafter(0.3, level_ms=0.4), "vain": SimulatedDrafter(0.0)},
    )
    planner = simulated.planner()
    simulated.run(planner, num_requests=num_requests, num_steps=500)  # it has to find out first
    simulated.run(planner, num_requests=num_requests, num_steps=4000)
    assert 0 < sum(simulated.ms_of.values()) < 1.3 * PROBING_SHARE * simulated.ms


def test_a_level_that_does_not_pay_is_not_drafted():
    simulated = Machine(LARGE, {"model": SimulatedDrafter(0.7, level_ms=6.0)})
    planner = simulated.planner()
    simulated.run(planner, num_steps=200)
    share = SimulatedShare("r0", ("model",), DraftBudget(max_nodes=16, max_depth=16))
    orders = (planner.order([share])[0] for _ in range(20))  # some are trials of other ways
    budget = next(order["model"] for order in orders if "model" in order)
    # A level takes about a quarter of a pass, in which plain decoding makes a quarter of a token.
    assert 0.1 < budget.min_gain < 0.6


def test_prompts_and_full_requests_get_nothing():
    planner = machine(LARGE).planner()
    prompt = SimulatedShare("p", ("model", "copy"), None, num_rows=64)
    full = SimulatedShare("f", ("model", "copy"), DraftBudget(max_nodes=16, max_depth=0))
    assert planner.order([prompt]) == [{}]
    assert planner.order([prompt, full]) == [{}, {}]


def test_a_request_gets_only_the_drafters_that_it_may_have():
    simulated = machine(LARGE, good=0.9)
    planner = simulated.planner()
    simulated.run(planner, num_steps=100)
    budget = DraftBudget(max_nodes=16, max_depth=16)
    for _ in range(3):
        orders = planner.order(
            [SimulatedShare("a", ("copy",), budget), SimulatedShare("b", (), budget)]
        )
        assert set(orders[0]) <= {"copy"}
        assert not orders[1]


def test_always_drafters_draft_and_their_nodes_are_kept():
    planner = AdaptivePlanner(
        CostModel(SMALL), ["copy"], always=["forced"], max_nodes=8, first_guess={"copy": 0.01}
    )
    share = SimulatedShare("a", ("copy", "forced"), DraftBudget(max_nodes=8, max_depth=8))
    for _ in range(3):
        [order] = planner.order([share])
        assert "forced" in order
        draft = Draft.from_drafter("forced", TokenTree.chain([1, 1, 1]))
        [chosen] = planner.choose([share], [draft])
        assert chosen.tree == draft.tree


def test_scouts_are_scored_whatever_their_chances():
    planner = AdaptivePlanner(CostModel(SMALL), ["look"], max_nodes=8, first_guess={"look": 0.9})
    share = SimulatedShare("a", ("look",), DraftBudget(max_nodes=8, max_depth=8))
    planner.order([share])
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 1, 0))
    draft = Draft.from_drafter(
        "look", tree, draft_logprobs=(0.0, -20.0, -20.0, -20.0), scouts=frozenset({2})
    )
    [chosen] = planner.choose([share], [draft])
    assert set(chosen.tree.sequences) == {(1,), (1, 2), (1, 2, 3)}


def test_forgets_requests_that_have_ended():
    simulated = machine(LARGE, good=0.9)
    planner = simulated.planner()
    simulated.run(planner, num_requests=4, num_steps=60)
    for index in range(4):
        planner.forget(f"r{index}")
        planner.forget(f"r{index}")
    planner.forget("never seen")
    assert not planner._experience._gains._rows
    assert not planner._choices


def test_a_way_that_does_not_pay_is_not_taken_for_the_steps_after_a_prompt_was_read_beside():
    # Beside a prompt's rows a few more cost little, but the plan holds when the prompt is over.
    simulated = machine(SMALL, good=0.3)
    planner = simulated.planner()
    simulated.run(planner, num_requests=4, num_steps=1500)
    budget = DraftBudget(max_nodes=16, max_depth=16)
    shares = [SimulatedShare(f"r{index}", ("model", "copy"), budget) for index in range(4)]
    prompt = SimulatedShare("new", ("model", "copy"), None, num_rows=128)
    num_plans = 0
    for beside in ([], [prompt]) * 10:
        planner.order(shares[:2])  # another number of requests, so that the next step is planned
        planner.order([*shares, *beside])
        after = planner.order(shares)
        if not planner._is_trial:
            num_plans += 1
            assert after == [{}] * 4
    assert num_plans >= 10


def test_while_a_plan_holds_what_is_free_to_draft_is_no_larger_than_it_says():
    """What it seemed worth beyond the plan's size cost more rows and time than it gave tokens."""
    simulated = machine(SMALL, good=0.1, copy=SimulatedDrafter(0.8, claimed=-0.01))
    planner = simulated.planner()
    simulated.run(planner, num_steps=1500)
    budget = DraftBudget(max_nodes=16, max_depth=16)
    share = SimulatedShare("r0", ("model", "copy"), budget)
    num_held = 0
    for _ in range(300):
        [order] = planner.order([share])
        if planner._step is None and not planner._is_trial and "copy" in order:
            num_held += 1
            assert order["copy"].max_nodes == planner._choices["r0"][1] > 0
        simulated._step(planner, [share])
    assert num_held > 100


def test_an_order_is_kept_until_the_bounds_of_the_request_come_near_it():
    simulated = machine(SMALL, good=0.8)
    planner = simulated.planner()
    simulated.run(planner, num_steps=1500)

    def order(room):
        budget = DraftBudget(max_nodes=16, max_depth=room)
        return planner.order([SimulatedShare("r0", ("model", "copy"), budget)])[0]

    def num_left():  # steps until a plan is due
        return planner._pace._steps_left + planner._cruise._steps_left

    kept = order(16)
    while not kept or planner._is_trial or num_left() < 8 or planner._step is not None:
        simulated.run(planner, num_steps=1)
        kept = order(16)
    kept = order(16)
    size = planner._choices["r0"][1]
    assert order(15) is kept
    for room in range(size, 0, -1):
        near = order(room)
        if planner._step is None:
            # A draft of so few nodes is no deeper.
            assert all(min(it.max_nodes, it.max_depth) <= room for it in near.values())


def test_where_nobody_may_have_a_drafter_nothing_is_planned():
    read = 0

    def clock():
        nonlocal read
        read += 1
        return 0.001 * read

    planner = AdaptivePlanner(
        CostModel(SMALL), ["model"], max_nodes=4, first_guess={"model": 0.9}, clock=clock
    )
    budget = DraftBudget(max_nodes=4, max_depth=4)
    for _ in range(20):
        assert planner.order([SimulatedShare("plain", (), budget)]) == [{}]
    assert read == 0
    planner.order([SimulatedShare("plain", (), budget), SimulatedShare("own", ("model",), budget)])
    assert read > 0


def test_a_curve_that_falls_gives_no_rows_for_less_than_nothing():
    # As one that was measured while others worked: eight rows seem to take less than one.
    falling = CostCurve(rows=(1, 2, 4, 8, 16), base_ms=(1.0, 1.0, 0.9, 0.5, 0.6))
    planner = AdaptivePlanner(
        CostModel(falling), ["copy"], max_nodes=16, first_guess={"copy": 0.02}
    )
    budget = DraftBudget(max_nodes=16, max_depth=16)
    assert planner.order([SimulatedShare("r", ("copy",), budget)]) == [{}]


def test_a_prompt_that_is_read_during_a_trial_is_not_paid_for_as_one():
    """Texts of a dozen steps have one in nearly every trial, and one takes as long as ten steps."""
    simulated = machine(SMALL, good=0.85)
    planner = simulated.planner()
    simulated.run(planner, num_steps=1000)
    budget = DraftBudget(max_nodes=16, max_depth=16)
    share = SimulatedShare("r0", ("model", "copy"), budget)
    while not planner._is_trial:
        simulated._step(planner, [share])
    before = planner._probes._credit_s
    reading = replace(share, request_id="new", budget=None, num_rows=500)
    planner.order([share, reading])
    verdict = Verdict((), (RIGHT,), FinalKind.RECOVERED)
    drafts = planner.choose([share, reading], [Draft.empty(RIGHT)] * 2)
    planner.observe([share, reading], drafts, [verdict, None], StepTimes({}, 1.0, 1.0))
    assert planner._is_trial
    assert planner._probes._credit_s == before


def test_a_trial_that_is_lucky_earns_what_one_that_is_not_costs():
    """Luck cost and did not pay: what was as good as the plan was charged for its bad steps."""
    simulated = machine(SMALL, good=0.85)
    planner = simulated.planner()
    simulated.run(planner, num_steps=1000)
    share = SimulatedShare("r0", ("model", "copy"), DraftBudget(max_nodes=16, max_depth=16))

    def earned(luck):
        # One with drafts: what plain decoding takes is summed up later.
        while not (planner._is_trial and planner._choice[0] and planner._step is None):
            simulated._step(planner, [share])
            planner.order([share])
        planner.choose([share], [Draft.empty(RIGHT)])
        planner._count_cruise()
        before = planner._probes._credit_s
        verdict = Verdict((), (RIGHT,), FinalKind.RECOVERED)
        usual_s = 1e-3 / planner._replaced  # of a token
        seconds = luck * usual_s
        planner.observe([share], [Draft.empty(RIGHT)], [verdict], StepTimes({}, 0.0, seconds))
        planner._count_cruise()
        return (planner._probes._credit_s - before) / usual_s

    lucky, unlucky = earned(0.5), earned(1.5)
    assert lucky > 0
    assert lucky == pytest.approx(-unlucky, rel=0.1)


def test_batches_of_sizes_that_come_back_are_planned_no_more_often_than_one_of_the_same_size():
    """Four requests that begin together end one by one: 4, 3, 2, 1, and again."""
    budget = DraftBudget(max_nodes=16, max_depth=16)

    def num_plans(sizes):
        simulated = machine(SMALL, good=0.85)
        planner = simulated.planner()
        simulated.run(planner, num_requests=4, num_steps=1000)
        before = planner._num_plans
        for size in itertools.islice(itertools.cycle(sizes), 4000):
            shares = [
                SimulatedShare(f"r{place}", ("model", "copy"), budget) for place in range(size)
            ]
            simulated._step(planner, shares)
        return planner._num_plans - before

    shrinking = [*[4] * 16, *[3] * 8, *[2] * 8, *[1] * 8]
    assert num_plans(shrinking) < 1.5 * num_plans([4])


def test_what_was_planned_for_as_many_requests_goes_on_when_they_come_back():
    """One request is worth drafting for beside this model, sixteen are not."""
    simulated = machine(SMALL, good=0.85)
    planner = simulated.planner()
    simulated.run(planner, num_steps=1)
    budget = DraftBudget(max_nodes=16, max_depth=16)

    def shares(count):
        return [SimulatedShare(f"r{place}", ("model", "copy"), budget) for place in range(count)]

    def size_for(count):
        while True:
            simulated._step(planner, shares(count))
            if not planner._is_trial:
                return planner._choice[1]

    for count in (1, 16) * 8:
        for _ in range(100):
            size_for(count)
    planned = planner._num_plans
    sizes = [size_for(count) for count in (1, 16) * 40]
    assert planner._num_plans - planned <= 16  # eighty, as often as it is another batch
    assert median(sizes[::2]) > max(sizes[1::2])


def test_a_plan_that_was_interrupted_is_made_again():
    """Ctrl-C may come while a batch of another size is planned, and decoding go on after it."""
    simulated = machine(SMALL, good=0.85)
    planner = simulated.planner()
    simulated.run(planner, num_requests=1, num_steps=50)
    budget = DraftBudget(max_nodes=16, max_depth=16)
    shares = [SimulatedShare(f"r{place}", ("model", "copy"), budget) for place in range(16)]
    plan, planner._plan = planner._plan, None  # calling it is an error
    with pytest.raises(TypeError):
        planner.order(shares)
    planner._plan = plan
    before = planner._num_plans
    planner.order(shares[:1])
    planner.order(shares)
    assert planner._num_plans > before


def test_what_may_be_saved_up_goes_by_single_steps_however_many_are_told_of_at_once():
    """Six steps that were counted together were taken for one of six times the time."""
    simulated = machine(SMALL, good=0.85)
    planner = simulated.planner()
    simulated.run(planner, num_steps=1000)
    simulated.run(planner, num_steps=200)
    step_s = simulated.ms / 200 / 1000
    assert planner._probes._step_s == pytest.approx(step_s, rel=0.5)
