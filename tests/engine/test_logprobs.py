"""Log-probabilities: of the tokens that were chosen, from the rows that chose them."""

import math
from functools import lru_cache

import pytest
import torch

from foretoken.assets import EMBEDDED
from foretoken.core.params import SamplingParams
from foretoken.core.verdict import Exactness
from foretoken.engine.logprobs import row_logprobs
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.loading import load_model
from tests.engines import (
    OracleDrafter,
    counting_drafter,
    counting_model,
    finish,
    make_engine,
    micro_model,
    plain_ids,
)

PROMPTS = ([5, 3, 9], [7], [2, 8, 8, 1, 4, 6, 2, 9, 9, 3, 5])


def run(target, drafters, prompts, params, **sizes):
    engine = make_engine(target, drafters, **sizes)
    requests = [engine.add_request(prompt, params) for prompt in prompts]
    finish(engine)
    return requests


@lru_cache(maxsize=1)
def bitwise_model():
    """Return a model whose rows are the same bits whatever shares their pass."""
    target = load_model(str(EMBEDDED["stories"].target), dtype="float32", device="cpu")
    assert target.info.exactness is Exactness.BITWISE
    return target


def all_logits(target: LanguageModel, token_ids):
    """Return the logits of every position of a text, from one pass without an engine."""
    cache = target.new_cache(len(token_ids))
    sequence = cache.open()
    batch = target.batch(cache, [Segment(sequence, token_ids, range(-1, len(token_ids) - 1))])
    return target.forward(batch, range(len(token_ids))).logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_logprobs_do_not_depend_on_drafts_batches_or_chunks(temperature, mode):
    target = bitwise_model()
    params = SamplingParams(
        max_new_tokens=20,
        temperature=temperature,
        top_k=9,
        repetition_penalty=1.3,
        seed=5,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=2,
        logprobs_mode=mode,
    )
    plain = [run(target, {}, [prompt], params)[0] for prompt in PROMPTS]
    truths = [request.token_ids for request in plain]
    oracle = OracleDrafter(truths, target.info.vocab_size)
    together = run(target, {"oracle": oracle}, PROMPTS, params, prefill_chunk=4)
    assert sum(request.stats.num_accepted for request in together) > 10
    for alone, request in zip(plain, together, strict=True):
        assert request.output_ids == alone.output_ids
        assert request.logprobs == alone.logprobs
        assert request.prompt_logprobs == alone.prompt_logprobs
        assert [entry.token_id for entry in request.logprobs] == request.output_ids
        assert [entry.token_id for entry in request.prompt_logprobs] == request.prompt_ids[1:]


def test_raw_logprobs_are_those_of_the_logits():
    target = micro_model("llama")
    params = SamplingParams(
        max_new_tokens=6, logprobs=4, prompt_logprobs=0, ignore_eos=True, repetition_penalty=1.5
    )
    [request] = run(target, {}, [PROMPTS[2]], params)
    expected = all_logits(target, request.token_ids).double().log_softmax(dim=-1)
    for place, entry in enumerate(request.logprobs):
        row = expected[request.num_prompt_ids + place - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-9)
        values, _ = row.topk(4)
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-9)
    for place, entry in enumerate(request.prompt_logprobs):
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-9)
        assert entry.top == ()


def test_processed_logprobs_are_those_that_the_choice_was_made_from():
    target = micro_model("llama")
    params = SamplingParams(
        max_new_tokens=12,
        temperature=0.7,
        top_k=3,
        seed=1,
        ignore_eos=True,
        logprobs=5,
        logprobs_mode="processed",
    )
    [request] = run(target, {}, [PROMPTS[0]], params)
    for entry in request.logprobs:
        finite = [value for _, value in entry.top if value > -math.inf]
        assert len(finite) == 3
        assert sum(math.exp(value) for value in finite) == pytest.approx(1)
        assert entry.logprob in finite


def test_logprobs_end_where_the_output_ends():
    target = counting_model(eos_ids=(9,))
    params = SamplingParams(max_new_tokens=50, logprobs=0)
    [request] = run(target, {"it": counting_drafter()}, [[1]], params)
    assert request.output_ids == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [entry.token_id for entry in request.logprobs] == request.output_ids


def test_neighbours_without_logprobs_get_none_and_the_same_tokens():
    target = micro_model("llama")
    wanted = SamplingParams(max_new_tokens=9, ignore_eos=True, prompt_logprobs=1)
    plain = SamplingParams(max_new_tokens=9, ignore_eos=True)
    engine = make_engine(target, {}, prefill_chunk=5)
    requests = [
        engine.add_request(prompt, params)
        for prompt, params in zip(PROMPTS, (plain, wanted, plain), strict=True)
    ]
    finish(engine)
    assert [bool(request.prompt_logprobs) for request in requests] == [False, False, False]
    longer = engine.add_request(PROMPTS[2], wanted)
    finish(engine)
    assert len(longer.prompt_logprobs) == len(PROMPTS[2]) - 1
    assert requests[2].logprobs == []
    for request in requests:
        assert request.output_ids == plain_ids(target, request.prompt_ids, plain)


def test_ties_go_to_the_lowest_id():
    entry = row_logprobs(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 3, 3)
    assert [token_id for token_id, _ in entry.top] == [1, 2, 4]
    assert entry.logprob < entry.top[-1][1]
