"""Timers around an engine: they add up, and they leave nothing behind."""

import time

import pytest

from foretoken import LLM, SamplingParams
from foretoken.bench.instrument import timed_phases
from foretoken.bench.phases import PHASES

PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(pair):
    # Trees of a given shape grow level by level: their passes can be seen from outside.
    drafter = f"draft-model:path={pair.draft},expansion=1-1-1-1"
    return LLM(pair.target, drafters=drafter, max_nodes=4)


def test_phases_add_up_to_the_total(llm):
    with timed_phases(llm) as phases:
        start_s = time.perf_counter()
        llm.generate("hello", PARAMS)
        elapsed_s = time.perf_counter() - start_s
    seconds = phases.as_dict()
    assert tuple(seconds) == PHASES
    assert sum(seconds.values()) == pytest.approx(phases.total_s)
    assert phases.total_s >= elapsed_s
    assert all(value > 0 for value in seconds.values())


def test_passes_are_counted_by_their_rows(llm):
    with timed_phases(llm) as phases:
        [output] = llm.generate("hello", PARAMS)
    num_passes = sum(map(len, phases.target_ms.values()))
    assert num_passes == output.stats.num_steps - 1  # the first held the prompt
    assert max(phases.target_ms) <= 5
    assert sum(map(len, phases.draft_ms.values())) > 0
    in_passes_s = sum(map(sum, phases.target_ms.values())) / 1000
    assert in_passes_s == pytest.approx(phases.target_s)
    assert sum(map(sum, phases.draft_ms.values())) / 1000 <= phases.draft_s


def test_plain_decoding_has_passes_of_one_row_and_no_drafting(llm):
    with timed_phases(llm) as phases:
        llm.generate("hello", PARAMS, drafters=())
    assert list(phases.target_ms) == [1]
    assert phases.draft_s == 0


def test_nothing_stays_behind(llm):
    parts = llm.engine.parts
    owners = [parts.target, parts.verifier, *llm.engine.drafters.values()]
    before = [dict(vars(owner)) for owner in owners]
    before_text = llm.generate("hello", PARAMS)[0].text
    with pytest.raises(KeyError), timed_phases(llm):
        raise KeyError
    after = [dict(vars(owner)) for owner in owners]
    assert [list(values) for values in after] == [list(values) for values in before]
    assert llm.generate("hello", PARAMS)[0].text == before_text


def test_timers_of_somebody_else_are_put_back(llm):
    target = llm.engine.parts.target
    own = target.forward
    target.forward = own
    try:
        with timed_phases(llm):
            assert target.forward is not own
        assert target.forward is own
    finally:
        del target.forward
