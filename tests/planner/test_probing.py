"""Drafters that are tried beside those in use: when, for whom, and at what price."""

import pytest

from foretoken.core.draft import DraftBudget
from foretoken.planner.probing import PROBING_SHARE, Probes
from tests.planner.simulation import Machine, SimulatedDrafter, SimulatedShare
from tests.planner.test_adaptive import SMALL, machine

BUDGET = DraftBudget(max_nodes=16, max_depth=16)


def shares(count, drafters=("model", "copy")):
    return [SimulatedShare(f"r{place}", drafters, BUDGET) for place in range(count)]


def test_trials_stay_under_their_share_and_take_turns():
    probes, spent_s, tried = Probes(["a", "b", "c"]), 0.0, []
    for _ in range(5000):
        probes.earn(0.001)
        label = probes.pick({"a"}, {"a", "b", "c"})
        if label is not None:
            tried.append(label)
            probes.pay(0.0008, label)
            spent_s += 0.0008
    assert spent_s <= PROBING_SHARE * 5.0 + 0.006
    assert "a" not in tried
    assert abs(tried.count("b") - tried.count("c")) <= 1


def test_what_was_saved_up_for_long_is_not_spent_at_once():
    """Hours in which nothing was tried paid for seconds in which every third plan was a trial."""

    def spent_s(num_idle):
        probes, spent_s = Probes(["a"]), 0.0
        probes.earn(0.001 * num_idle, num_idle)
        for _ in range(1000):
            probes.earn(0.001)
            if probes.has_credit:
                probes.pay(0.004)
                spent_s += 0.004
        return spent_s

    assert spent_s(1) <= PROBING_SHARE * 1.0 + 0.004 + 0.004
    assert spent_s(1_000_000) <= PROBING_SHARE * 1.0 + 0.016 + 0.004


def test_where_no_plan_has_changed_for_long_less_is_spent():
    """A third after 9000 steps; a change of plan brings back all of it."""
    probes, spent_s = Probes(["a"]), 0.0

    def share_of(num_steps):
        nonlocal spent_s
        spent_s = 0.0
        for _ in range(num_steps):
            probes.earn(0.001)
            if probes.has_credit:
                probes.pay(0.001)
                spent_s += 0.001
        return spent_s / (0.001 * num_steps)

    share_of(400)  # until what there is to begin with is spent
    probes.end_calm()
    assert share_of(1000) == pytest.approx(PROBING_SHARE, rel=0.15)
    assert share_of(8000) < 0.6 * PROBING_SHARE
    assert share_of(10_000) == pytest.approx(PROBING_SHARE / 3, rel=0.05)
    probes.end_calm()
    assert share_of(1000) == pytest.approx(PROBING_SHARE, rel=0.1)


def test_trials_that_change_nothing_become_rarer():
    probes, tried = Probes(["a", "b"]), []
    for step in range(65):
        probes.earn(1.0)
        if probes.pick({"a"}, {"a", "b"}) is not None:
            tried.append(step)
    assert tried == [0, 2, 6, 14, 30, 46, 62]  # but not rarer and rarer: texts change
    assert probes.pick({"b"}, {"a", "b"}) is not None  # "a" now
    assert probes.pick({"a"}, {"a", "b"}) == "b"  # as after any other change


def test_a_drafter_that_no_request_may_have_is_not_tried():
    probes = Probes(["a", "b"])
    probes.earn(1.0)
    assert probes.pick(set(), {"b"}) == "b"
    assert probes.pick(set(), set()) is None


def test_a_drafter_is_tried_for_a_few_requests_in_turn():
    probes, tried = Probes(["a"]), []
    for _ in range(100):
        probes.earn(1.0)
        probes.choose(set(), shares(10, ("a",)))
        if probes.label is not None:
            tried.append([it.request_id for it in shares(10, ("a",)) if probes.order(it, BUDGET)])
    assert tried[:3] == [
        ["r0", "r1", "r2", "r3"],
        ["r4", "r5", "r6", "r7"],
        ["r0", "r1", "r8", "r9"],
    ]


def test_the_same_requests_have_it_again_if_it_had_to_read_first():
    probes, everybody = Probes(["a"]), shares(10, ("a",))
    probes.earn(1.0)
    probes.choose(set(), everybody)
    probes.is_wasted = True
    probes.choose(set(), everybody)
    assert [it.request_id for it in everybody if probes.order(it, BUDGET)] == [
        f"r{n}" for n in range(4)
    ]


def test_a_drafter_that_had_to_read_first_drafts_again_in_the_very_next_step():
    """It did so a plan later, had missed as much again, and so on for ever.

    Plans of plain decoding are left out where there is no credit to try anything.
    """
    simulated = machine(SMALL, good=0.02, copy=SimulatedDrafter(0.0))
    planner, batch, seen = simulated.planner(), shares(16), 0
    for _ in range(3000):
        was_wasted = planner._probes.is_wasted
        if was_wasted:
            planner._probes.pay(1.0)
        before = [drafter.num_proposed for drafter in simulated.drafters.values()]
        simulated._step(planner, batch)
        if was_wasted:
            seen += 1
            assert before != [drafter.num_proposed for drafter in simulated.drafters.values()]
    assert seen


def test_what_no_request_may_have_is_not_tried():
    """`reference` serves only requests that bring one; a step beside it is one like all others."""
    drafters = {"model": SimulatedDrafter(0.7, level_ms=0.15), "ask": SimulatedDrafter(0.9)}
    simulated = Machine(SMALL, drafters)
    planner, tried = simulated.planner(), set()
    for _ in range(3000):
        simulated._step(planner, shares(2, ("model",)))
        tried.add(planner._choice[0])
    assert tried == {(), ("model",)}


def test_a_trial_beside_plain_decoding_is_for_a_few_requests_in_turn():
    """For all of them a draft model read all that it had missed: the dearest part of a trial."""
    simulated = machine(SMALL, good=0.3)
    planner = simulated.planner()
    simulated.run(planner, num_requests=16, num_steps=300)
    batch, tried = shares(16), []
    for _ in range(3000):
        simulated._step(planner, batch)
        if planner._is_trial and planner._step is not None:
            tried.append([key for key, (_, size) in planner._choices.items() if size])
    assert len(tried) > 4
    assert {len(some) for some in tried} <= {1, 2, 3, 4}  # a plan may have fewer nodes
    assert len({request_id for some in tried for request_id in some}) > 8
