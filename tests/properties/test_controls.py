"""Promise P2: every control says the same under speculation as in plain decoding.

Speculative tokens, reasons to end and errors are compared with those of Foretoken's plain
decoding, and its greedy tokens with those of `generate` of transformers with the same controls.
Everything is float64 on the reference path, as in `test_same_tokens`.
"""

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foretoken.core.params import SamplingParams
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.request import FinishReason
from foretoken.errors import ConfigError
from foretoken.planner.plan import Plan
from foretoken.verifiers.coupled import CoupledVerifier
from tests.controls import CyclicGrammar, history_controls, their_processors, warper_controls
from tests.engines import (
    KV_TOKENS,
    OracleDrafter,
    check_idle,
    make_draft_model,
    make_host,
    micro_config,
    micro_model,
)
from tests.fakes import build_module
from tests.properties.test_same_tokens import Case, run

VOCAB_SIZE = 61
EOS_IDS = (7, 19)
MAX_REQUESTS = 3


def lean_on_the_past(input_ids, scores):
    """A user's processor that looks at the whole history."""
    return scores - (torch.arange(scores.shape[1]) == input_ids.sum() % 7) * 3.0


def dislike_five(input_ids, scores):
    """A user's processor that fails where a token has come."""
    if input_ids[0, -1] == 5:
        raise ValueError("five")
    return scores


HISTORY = {
    **history_controls(VOCAB_SIZE),
    "ignore_eos": st.booleans(),
    # Stands for a grammar of token ids, for one that has dead ends, for one that forces tokens.
    "regex": st.sampled_from(["cyclic", "with dead ends", "with forced tokens"]),
    "logits_processors": st.sampled_from(
        [(lean_on_the_past,), (dislike_five,), (lean_on_the_past, dislike_five)]
    ),
}
HEAT = st.sampled_from([0.4, 1.0, 1.7])
SHAPES = warper_controls()
ALWAYS = {"max_new_tokens": st.integers(8, 12), "seed": st.integers(0, 2**64 - 1)}
GREEDY_ONES = st.fixed_dictionaries(ALWAYS, optional=HISTORY)
SAMPLED_ONES = st.fixed_dictionaries(
    {**ALWAYS, "temperature": HEAT}, optional={**HISTORY, **SHAPES}
)
# Few different tokens, so that n-grams and sequences of tokens come again.
PROMPTS = st.lists(st.integers(0, 5) | st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20)
SIZES = st.fixed_dictionaries(
    {
        "max_nodes": st.sampled_from([0, 1, 2, 5, 8, 13]),
        "prefill_chunk": st.integers(1, 24),
        "max_requests": st.integers(1, MAX_REQUESTS),
    }
)


def params_of(values):
    """Return the parameters, or pass over a contradiction."""
    try:
        return SamplingParams(**values)
    except ConfigError:
        assume(False)


def compile_grammar(params, num_prompt_ids):
    if params.regex is None:
        return None
    return CyclicGrammar(
        VOCAB_SIZE,
        dead_ends=(5, 11) if params.regex == "with dead ends" else (),
        forcing=range(1, 6) if params.regex == "with forced tokens" else (),
    )


def controlled_engine(target, drafters, *, max_nodes, **sizes):
    return Engine(
        target,
        target.new_cache(KV_TOKENS),
        drafters,
        CoupledVerifier(),
        Plan(max_nodes=max_nodes),
        compile_grammar=compile_grammar,
        config=EngineConfig(**sizes),
    )


def ending(request):
    return request.output_ids, request.finish_reason, str(request.error)


def plain(target, case):
    engine = controlled_engine(target, {}, max_nodes=0, max_requests=1, prefill_chunk=4096)
    request = engine.add_request(case.prompt_ids, case.params)
    while engine.num_unfinished:
        engine.step()
    return request


def check_same_endings(target, wanted, drafters, **sizes):
    expected = [plain(target, case) for case in wanted]
    truths = [request.token_ids for request in expected]
    drafters = {**drafters, "oracle": OracleDrafter(truths, VOCAB_SIZE)}
    engine = controlled_engine(target, drafters, **sizes)
    requests = run(engine, wanted)
    assert list(map(ending, requests)) == list(map(ending, expected))
    check_idle(engine)
    return requests


def lookup():
    return PromptLookupDrafter(PromptLookupOptions(min_ngram=1, max_ngram=2))


@pytest.mark.parametrize(
    ("name", "is_greedy"),
    [*((name, True) for name in HISTORY), *((name, False) for name in (*HISTORY, *SHAPES))],
)
@settings(max_examples=6)
@given(PROMPTS, st.fixed_dictionaries({**ALWAYS, "temperature": HEAT}), st.data(), SIZES)
def test_each_control_alone_under_trees(name, is_greedy, prompt_ids, values, data, sizes):
    values = {**values, name: data.draw({**HISTORY, **SHAPES}[name])}
    if is_greedy:
        values["temperature"] = 0
    case = Case(prompt_ids, params_of(values), ["oracle", "prompt-lookup"], 0)
    target = micro_model("llama", eos_ids=EOS_IDS)
    check_same_endings(target, [case], {"prompt-lookup": lookup()}, **sizes)


@st.composite
def batches(draw, labels):
    """Requests that join at different steps, each with controls and drafters of its own."""
    return [
        Case(
            draw(PROMPTS),
            params_of(draw(GREEDY_ONES | SAMPLED_ONES)),
            draw(st.lists(st.sampled_from(labels), unique=True)),
            draw(st.integers(0, 4)),
        )
        for _ in range(draw(st.integers(1, MAX_REQUESTS)))
    ]


@settings(max_examples=80)
@given(
    st.sampled_from(["llama", "gpt2"]),
    batches(["best", "expansion", "prompt-lookup", "oracle"]),
    SIZES,
    st.sampled_from([(1, 1, 1), (2, 2)]),
)
def test_random_controls_in_batches_with_draft_models(family, wanted, sizes, expansion):
    """Drafts are masked as the target is; a request that fails ends alone, where plain fails."""
    target = micro_model(family, eos_ids=EOS_IDS)
    host = make_host(target, max_requests=MAX_REQUESTS)
    drafters = {
        "best": make_draft_model(
            target, micro_model(family, blur=0.15), host=host, min_gain=0.05, max_depth=4
        ),
        "expansion": make_draft_model(
            target, micro_model("llama", seed=9), host=host, expansion=expansion
        ),
        "prompt-lookup": lookup(),
    }
    check_same_endings(target, wanted, drafters, **sizes)


def test_drafts_of_controlled_requests_are_accepted():
    """Else nothing above would be speculative: here the draft model agrees more often than not."""
    target = micro_model("llama")
    drafter = make_draft_model(target, micro_model("llama", blur=0.02), min_gain=0.05)
    engine = controlled_engine(
        target, {"best": drafter}, max_nodes=8, max_requests=1, prefill_chunk=64
    )
    params = SamplingParams(
        max_new_tokens=40,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        bad_words_ids=[[1], [2, 3]],
        regex="cyclic",
        logits_processors=[lean_on_the_past],
    )
    request = engine.add_request([1, 2, 3], params)
    while engine.num_unfinished:
        engine.step()
    assert request.finish_reason is FinishReason.LENGTH
    assert request.stats.num_accepted > 0.5 * request.stats.num_tokens


def test_a_failure_ends_its_own_request_alone():
    target = micro_model("llama")
    fine = SamplingParams(max_new_tokens=6)
    wanted = [
        Case([1, 2, 3], fine, ["oracle"], 0),
        Case([4, 5], SamplingParams(logits_processors=[dislike_five]), ["oracle"], 0),
        Case([1, 9], SamplingParams(suppress_tokens=list(range(VOCAB_SIZE))), ["oracle"], 1),
        Case([6], fine, ["oracle"], 2),
    ]
    sizes = {"max_nodes": 5, "prefill_chunk": 24, "max_requests": 4}
    requests = check_same_endings(target, wanted, {}, **sizes)
    reasons = [request.finish_reason.value for request in requests]
    assert reasons == ["length", "error", "error", "length"]
    assert "(dislike_five) raised ValueError: five" in str(requests[1].error)
    assert "no token is left to choose after 2 tokens" in str(requests[2].error)


@settings(max_examples=40)
@given(PROMPTS, st.fixed_dictionaries(ALWAYS, optional=history_controls(VOCAB_SIZE)))
def test_greedy_tokens_are_those_of_generate(prompt_ids, values):
    """With transformers' own model, loop and processors, the two of OpenAI included."""
    for name in ("stop_token_ids", "frequency_penalty", "presence_penalty"):
        values.pop(name, None)
    params = params_of(values)
    target = micro_model("llama", eos_ids=EOS_IDS)
    request = plain(target, Case(prompt_ids, params, [], 0))
    assume(request.error is None)  # generate goes on where no token is left
    module = build_module(micro_config("llama"), attn_implementation="eager")
    config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=list(EOS_IDS),
        pad_token_id=0,
        bos_token_id=None,
        use_cache=False,
    )
    with torch.inference_mode():
        output = module.generate(
            torch.tensor([prompt_ids]),
            generation_config=config,
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
            logits_processor=their_processors(params, len(prompt_ids), EOS_IDS),
        )
    assert request.token_ids == output[0].tolist()
