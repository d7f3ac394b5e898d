"""Promise P1: the tokens are those of plain decoding, whatever drafts and whoever else runs.

Everything is float64 on the reference path, where passes of different shapes agree to about
1e-14 of a logit, so that no choice depends on the shape of the batch.
"""

import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from tests.engines import (
    OracleDrafter,
    check_books,
    check_idle,
    make_draft_model,
    make_engine,
    make_host,
    micro_config,
    micro_model,
    plain_ids,
)
from tests.fakes import build_module

FAMILIES = ("llama", "gpt2", "gemma2", "mistral", "qwen3", "gpt_neox")
VOCAB_SIZE = 61
EOS_IDS = (7, 19)
MAX_REQUESTS = 3

SAMPLED = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.4, 1.0, 1.7])},
    optional={
        "top_k": st.integers(1, 70),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 0.5),
    },
)
CONTROLS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 9),
        "seed": st.integers(0, 2**64 - 1),
        "ignore_eos": st.sampled_from([True, True, False]),
    },
    optional={
        "repetition_penalty": st.floats(0.6, 2.0),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-6, 6), max_size=4),
    },
)
PARAMS = st.builds(
    lambda controls, sampling: SamplingParams(**controls, **sampling),
    CONTROLS,
    st.just({}) | SAMPLED,
)
# Few different tokens, so that prompt lookup finds something.
PROMPTS = st.lists(st.integers(0, 5) | st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)


@dataclass(frozen=True)
class Case:
    """One request: what it asks, which drafters it wants, at which step it joins."""

    prompt_ids: list
    params: SamplingParams
    drafters: list
    joins_at: int


def cases(labels):
    case = st.builds(
        Case,
        PROMPTS,
        PARAMS,
        st.lists(st.sampled_from(labels), unique=True, max_size=len(labels)),
        st.integers(0, 4),
    )
    return st.lists(case, min_size=1, max_size=MAX_REQUESTS)


SIZES = {
    "max_nodes": st.sampled_from([0, 1, 2, 5, 8, 13]),
    "prefill_chunk": st.integers(1, 24),
    "max_requests": st.integers(1, MAX_REQUESTS),
}


def run(engine, wanted):
    """Add each request at its step, run to the end, check the books after each step."""
    requests, waiting, step = [None] * len(wanted), set(range(len(wanted))), 0
    while waiting or engine.num_unfinished:
        for index in sorted(waiting):
            if wanted[index].joins_at <= step:
                case = wanted[index]
                requests[index] = engine.add_request(
                    case.prompt_ids, case.params, drafters=case.drafters
                )
                waiting.remove(index)
        engine.step()
        check_books(engine)
        step += 1
    return requests


def check_same_tokens(target, wanted, drafters, **sizes):
    expected = [plain_ids(target, case.prompt_ids, case.params) for case in wanted]
    truths = [case.prompt_ids + ids for case, ids in zip(wanted, expected, strict=True)]
    engine = make_engine(target, {**drafters, "oracle": OracleDrafter(truths, VOCAB_SIZE)}, **sizes)
    requests = run(engine, wanted)
    assert [request.output_ids for request in requests] == expected
    check_idle(engine)


@settings(max_examples=500)
@given(st.sampled_from(FAMILIES), cases(["prompt-lookup", "oracle"]), st.fixed_dictionaries(SIZES))
def test_tokens_are_those_of_plain_decoding(family, wanted, sizes):
    target = micro_model(family, eos_ids=EOS_IDS)
    drafters = {"prompt-lookup": PromptLookupDrafter(PromptLookupOptions())}
    check_same_tokens(target, wanted, drafters, **sizes)


@settings(max_examples=100)
@given(
    st.sampled_from(FAMILIES),
    st.sampled_from(["llama", "gpt2"]),
    cases(["best", "expansion", "prompt-lookup", "oracle"]),
    st.fixed_dictionaries(SIZES),
    st.sampled_from([(1, 1, 1), (2, 2), (3, 1, 1, 1)]),
    st.integers(1, 5),
)
def test_tokens_are_those_of_plain_decoding_with_draft_models(
    family, other_family, wanted, sizes, expansion, width
):
    target = micro_model(family, eos_ids=EOS_IDS)
    host = make_host(target, max_requests=MAX_REQUESTS)
    near, far = micro_model(family, blur=0.15), micro_model(other_family, seed=9)
    drafters = {
        "best": make_draft_model(target, near, host=host, width=width, min_gain=0.05, max_depth=4),
        "expansion": make_draft_model(target, far, host=host, expansion=expansion),
        "prompt-lookup": PromptLookupDrafter(PromptLookupOptions(min_ngram=1, max_ngram=2)),
    }
    check_same_tokens(target, wanted, drafters, **sizes)


def test_drafts_are_accepted_often_enough_for_these_tests_to_mean_something():
    target = micro_model("llama")
    near = make_draft_model(target, micro_model("llama", blur=0.15), min_gain=0.05)
    engine = make_engine(target, {"best": near})
    shares = []
    for seed in range(6):
        params = SamplingParams(max_new_tokens=30, temperature=0.7, seed=seed)
        request = engine.add_request([1, 2, 3, 4 + seed], params)
        while engine.num_unfinished:
            engine.step()
        shares.append(request.stats.num_accepted / request.stats.num_tokens)
    assert 0.2 < sum(shares) / len(shares) < 0.95


# -- the race, written a second time ---------------------------------------------------------

MASK = 2**64 - 1


def splitmix(state):
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def exponential(seed, position, token_id):
    """Return the variate of one token, from integers and `math` alone."""
    key = splitmix(splitmix(seed) ^ splitmix(~position & MASK))
    # A token's key is the splitmix64 output number `token_id` from state 0.
    token_key = splitmix((token_id * 0x9E3779B97F4A7C15) & MASK)
    mixed = token_key ^ key
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    mixed ^= mixed >> 31
    return -math.log(((mixed >> 12) + 0.5) / 2**52)


def softmax(logits):
    highest = max(logits.values())
    weights = {token_id: math.exp(value - highest) for token_id, value in logits.items()}
    total = sum(weights.values())
    return {token_id: weight / total for token_id, weight in weights.items()}


def controlled(logits, token_ids, num_prompt_ids, params):
    """Return the logits of tokens after bias and penalties."""
    logits = dict(enumerate(logits))
    for token_id, value in params.logit_bias.items():
        logits[token_id] += value
    for token_id in set(token_ids):
        value, penalty = logits[token_id], params.repetition_penalty
        logits[token_id] = value * penalty if value < 0 else value / penalty
    output_ids = token_ids[num_prompt_ids:]
    for token_id in set(output_ids):
        logits[token_id] -= params.presence_penalty
        logits[token_id] -= params.frequency_penalty * output_ids.count(token_id)
    return logits


def warped(logits, params):
    """Return the probabilities that are left after temperature, top-k, top-p and min-p."""
    logits = {token_id: value / params.temperature for token_id, value in logits.items()}
    ranked = sorted(logits, key=lambda token_id: -logits[token_id])
    if params.top_k:
        logits = {token_id: logits[token_id] for token_id in ranked[: params.top_k]}
    probs, kept, mass = softmax(logits), {}, 0.0
    for token_id in sorted(probs, key=lambda token_id: -probs[token_id]):
        if mass >= params.top_p:
            break
        kept[token_id] = logits[token_id]
        mass += probs[token_id]
    probs = softmax(kept)
    floor = params.min_p * max(probs.values())
    return softmax({token_id: kept[token_id] for token_id in kept if probs[token_id] >= floor})


def race(logits, token_ids, num_prompt_ids, params, seed):
    """Return the target's choice, computed without torch and without this package."""
    scores = controlled(logits, token_ids, num_prompt_ids, params)
    if params.temperature == 0:
        return max(scores, key=lambda token_id: (scores[token_id], -token_id))
    probs = warped(scores, params)
    position = len(token_ids)
    return min(probs, key=lambda token_id: exponential(seed, position, token_id) / probs[token_id])


@settings(max_examples=200)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
    st.integers(1, 12),
    PARAMS,
)
def test_one_choice_equals_the_race_written_a_second_time(key, token_ids, num_prompt_ids, params):
    generator = torch.Generator().manual_seed(key)
    logits = torch.randn(VOCAB_SIZE, generator=generator, dtype=torch.float64) * 2
    num_prompt_ids = min(num_prompt_ids, len(token_ids))
    sampler = Sampler(params, params.seed, num_prompt_ids)
    expected = race(logits.tolist(), token_ids, num_prompt_ids, params, params.seed)
    assert sampler.choose(logits, token_ids) == expected
    # The last tokens may as well be a draft's path.
    assert sampler.choose(logits, token_ids[:1], token_ids[1:]) == expected


@settings(max_examples=25)
@given(st.sampled_from(FAMILIES), PROMPTS, PARAMS)
def test_output_equals_the_race_over_the_logits_of_transformers(family, prompt_ids, params):
    target = micro_model(family, eos_ids=EOS_IDS)
    module = build_module(micro_config(family), attn_implementation="eager")
    token_ids = list(prompt_ids)
    with torch.inference_mode():
        for _ in range(params.max_new_tokens):
            logits = module(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            token_ids.append(race(logits.tolist(), token_ids, len(prompt_ids), params, params.seed))
            if token_ids[-1] in EOS_IDS and not params.ignore_eos:
                break
    assert plain_ids(target, prompt_ids, params) == token_ids[len(prompt_ids) :]
