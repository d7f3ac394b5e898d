"""Log-probabilities under every control: those of plain decoding, to the last bit.

The target is a table, whose rows are the same bits whatever shares a pass.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.drafters.forced import ForcedDrafter
from foretoken.drafters.suffix import SuffixDrafter, SuffixOptions
from tests.engines import OracleDrafter, check_idle, make_draft_model, make_host, random_table
from tests.properties.test_controls import (
    ALWAYS,
    EOS_IDS,
    GREEDY_ONES,
    HEAT,
    HISTORY,
    PROMPTS,
    SAMPLED_ONES,
    SHAPES,
    SIZES,
    VOCAB_SIZE,
    controlled_engine,
    lookup,
    params_of,
    plain,
)
from tests.properties.test_same_tokens import Case, run

TARGET = random_table(VOCAB_SIZE, seed=3, eos_ids=EOS_IDS)
DRAFT = random_table(VOCAB_SIZE, seed=3, spread=1.7)
WANTED = st.fixed_dictionaries(
    {
        "logprobs": st.integers(0, 4),
        "prompt_logprobs": st.none() | st.integers(0, 3),
        "logprobs_mode": st.sampled_from(["raw", "processed"]),
    }
)


def told(request):
    return request.output_ids, request.logprobs, request.prompt_logprobs, request.finish_reason


def check_same_logprobs(cases, **sizes):
    expected = [plain(TARGET, case) for case in cases]
    truths = [request.token_ids for request in expected]
    host = make_host(TARGET, max_requests=4)
    drafters = {
        "best": make_draft_model(TARGET, DRAFT, host=host, min_gain=0.05, max_depth=4),
        "expansion": make_draft_model(TARGET, DRAFT, host=host, expansion=(2, 1, 2)),
        "prompt-lookup": lookup(),
        "suffix": SuffixDrafter.create(SuffixOptions(), host),
        "forced": ForcedDrafter(),
        "oracle": OracleDrafter(truths, VOCAB_SIZE),
    }
    engine = controlled_engine(TARGET, drafters, **sizes)
    requests = run(engine, cases)
    for request, alone in zip(requests, expected, strict=True):
        assert told(request) == told(alone)
        assert [entry.token_id for entry in request.logprobs] == request.output_ids
    check_idle(engine)
    return requests


def test_forced_tokens_are_drafted_and_have_logprobs():
    """After 1 the grammar leaves no choice for five tokens."""
    values = {"max_new_tokens": 8, "seed": 0, "logprobs": 2, "regex": "with forced tokens"}
    case = Case([1], params_of(values), ["forced"], 0)
    [request] = check_same_logprobs([case], max_nodes=8, prefill_chunk=4, max_requests=1)
    assert request.output_ids[:5] == [2, 3, 4, 5, 6]
    assert request.stats.accepted_by["forced"] >= 5


@pytest.mark.parametrize("name", [*HISTORY, *SHAPES])
@settings(max_examples=5)
@given(PROMPTS, st.fixed_dictionaries({**ALWAYS, "temperature": HEAT}), WANTED, st.data(), SIZES)
def test_each_control_alone(name, prompt_ids, values, wanted, data, sizes):
    values = {**values, **wanted, name: data.draw({**HISTORY, **SHAPES}[name])}
    if name in HISTORY and data.draw(st.booleans()):
        values["temperature"] = 0
    labels = data.draw(st.sampled_from([["oracle"], ["best", "suffix"], ["expansion"], ["forced"]]))
    check_same_logprobs([Case(prompt_ids, params_of(values), labels, 0)], **sizes)


@st.composite
def cases(draw):
    labels = st.sampled_from(["best", "expansion", "prompt-lookup", "suffix", "forced", "oracle"])
    found = []
    for _ in range(draw(st.integers(1, 3))):
        params = params_of(draw(GREEDY_ONES | SAMPLED_ONES))
        found.append(
            Case(
                draw(PROMPTS),
                replace(params, **draw(WANTED)),
                draw(st.lists(labels, unique=True)),
                draw(st.integers(0, 4)),
            )
        )
    return found


@settings(max_examples=60)
@given(cases(), SIZES)
def test_random_controls_in_batches(wanted, sizes):
    check_same_logprobs(wanted, **sizes)
