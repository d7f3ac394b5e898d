"""P1 and P2 through the wire: what clients get is what plain decoding alone says, to the bit.

Expected tokens and log-probabilities come from another engine, without drafts and without a
prefix cache, one request at a time.
"""

import asyncio
import json
from contextlib import closing
from types import SimpleNamespace

import httpx
import pytest

from foretoken import LLM, SamplingParams
from foretoken.core.noise import derive_seed
from foretoken.server.app import create_app
from foretoken.server.settings import ServerSettings
from tests.server.conftest import MODEL_NAME, START_S, Gate, served, wait_until

PROMPTS = ("Once upon a time", "One day, Tom and his dog went to the park. " * 3)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
SAMPLED = {"temperature": 0.9, "seed": 11}
CASES = {
    "greedy": {"temperature": 0},
    "greedy with penalties": {
        "temperature": 0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {"13": -2.5, "15": 1.0},
    },
    "greedy n-grams": {"temperature": 0, "no_repeat_ngram_size": 2, "min_new_tokens": 20},
    "sampled": SAMPLED,
    "sampled cut": {**SAMPLED, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    "sampled typical": {**SAMPLED, "typical_p": 0.7, "eta_cutoff": 0.001, "top_h": 0.8},
    "sampled stop": {**SAMPLED, "stop": ["the", "."], "stop_token_ids": [50]},
    "sampled schema": {**SAMPLED, "json_schema": SCHEMA},
    "sampled regex": {**SAMPLED, "regex": "[a-zäöü ]{5,40}", "presence_penalty": 0.4},
    "processed": {**SAMPLED, "top_k": 9, "bad_words_ids": [[13]], "logprobs_mode": "processed"},
}
VARIANTS = [(stream, enabled) for stream in (False, True) for enabled in (True, False)]
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def plain():
    """An engine of its own, beside the server's."""
    with closing(LLM("stories", drafters="none", prefix_caching=False, max_requests=1)) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(plain):
    """Return what plain decoding alone gives for a case and a prompt, each computed once."""
    known = {}

    def compute(case, prompt, **changes):
        key = case, prompt, *changes.items()
        if key not in known:
            values = {"max_new_tokens": NUM_TOKENS, "logprobs": 2, **CASES[case], **changes}
            [known[key]] = plain.generate(prompt, SamplingParams.from_mapping(values))
        return known[key]

    return compute


@pytest.fixture(scope="module", params=[True, False], ids=["prefix cache", "no prefix cache"])
def roomy(request):
    """A server on which 40 requests run at once, with a prefix cache and without."""
    settings = ServerSettings(model_name=MODEL_NAME, port=0, drain_s=5.0)
    options = {"prefix_caching": request.param, "max_requests": 40}
    with (
        closing(LLM(MODEL_NAME, **options)) as llm,
        served(create_app(llm, settings), settings) as running,
        httpx.Client(base_url=running.base_url, timeout=START_S) as client,
    ):
        yield SimpleNamespace(llm=llm, server=running, client=client, shares=request.param)


def body_of(case, prompt, *, stream, enabled):
    fields = dict(CASES[case])
    if "min_new_tokens" in fields:
        fields["min_tokens"] = fields.pop("min_new_tokens")
    if "json_schema" in fields:
        schema = {"name": "x", "schema": fields.pop("json_schema")}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {
        "model": "stories",
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "logprobs": 2,
        "stream": stream,
        "speculation": {"enabled": enabled, "details": True},
        **fields,
    }


def read(answer):
    """Return text, token ids, log-probabilities and finish reason of an answer of either kind."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        choices = answer.json()["choices"]
    else:
        parts = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
        assert parts.pop() == "[DONE]"
        choices = [choice for part in parts for choice in json.loads(part)["choices"]]
    return (
        "".join(choice["text"] for choice in choices),
        [token["id"] for choice in choices for token in choice["foretoken"]["tokens"]],
        [value for choice in choices for value in choice["logprobs"]["token_logprobs"]],
        [sorted(top.values()) for it in choices for top in it["logprobs"]["top_logprobs"]],
        choices[-1]["finish_reason"],
    )


def wanted(output):
    """Return the same of plain decoding's output."""
    reason = "length" if output.finish_reason.value == "length" else "stop"
    tops = [
        sorted(dict([*entry.top, (entry.token_id, entry.logprob)]).values())
        for entry in output.logprobs
    ]
    return (
        output.text,
        output.token_ids,
        [entry.logprob for entry in output.logprobs],
        [[max(value, -9999.0) for value in top] for top in tops],
        reason,
    )


def ask_all(server, asked, when_sent=lambda: None):
    """Return the answers to calls that are all made at once; tell when they are on their way."""
    bodies = [body_of(case, prompt, stream=s, enabled=e) for case, prompt, s, e in asked]
    limits = httpx.Limits(max_connections=len(bodies))

    async def ask():
        async with httpx.AsyncClient(
            base_url=server.base_url, limits=limits, timeout=60, trust_env=False
        ) as client:
            calls = [client.post("/v1/completions", json=body) for body in bodies]
            answers, _ = await asyncio.gather(asyncio.gather(*calls), asyncio.to_thread(when_sent))
            return answers

    return asyncio.run(ask())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("stream", "enabled"), VARIANTS)
def test_alone(http, expected, case, stream, enabled):
    for prompt in PROMPTS:
        body = body_of(case, prompt, stream=stream, enabled=enabled)
        found = read(http.post("/v1/completions", json=body))
        assert found == wanted(expected(case, prompt))


def test_amid_many_others(api, expected):
    """All cases and variants at once, more than run at a time."""
    asked = [
        (case, prompt, stream, enabled)
        for case in CASES
        for prompt in PROMPTS
        for stream, enabled in VARIANTS
    ]
    assert len(asked) == 80
    for (case, prompt, _, _), answer in zip(asked, ask_all(api, asked), strict=True):
        assert read(answer) == wanted(expected(case, prompt))


def test_in_steps_with_many_others(roomy, expected, monkeypatch):
    """Each runs amid more than 32 others; the first come may have a step to themselves."""
    gate = Gate(roomy.llm.engine)
    monkeypatch.setattr(roomy.llm.engine, "step", gate.step)
    asked = [
        (case, prompt, stream, enabled)
        for case in CASES
        for (stream, enabled), prompt in zip(VARIANTS, PROMPTS + PROMPTS[::-1], strict=True)
    ]
    thread = roomy.server.engine_thread
    gate.close()
    answers = ask_all(
        roomy.server,
        asked,
        when_sent=lambda: (
            wait_until(lambda: thread.num_running + thread.num_waiting == len(asked)),
            gate.open(),
        ),
    )
    assert roomy.llm.engine.max_requests == len(asked) == 40
    assert max(map(len, gate.members)) > 33
    for (case, prompt, _, _), answer in zip(asked, answers, strict=True):
        assert read(answer) == wanted(expected(case, prompt))


@pytest.mark.parametrize("case", ["greedy", "sampled cut", "sampled schema"])
def test_with_a_prefix_that_was_said_before(roomy, expected, case):
    """A prompt comes again, then goes on with what the model said, as a conversation does."""
    prompt, num_cached = PROMPTS[1], []
    for _ in range(3):
        body = body_of(case, prompt, stream=False, enabled=True)
        answer = roomy.client.post("/v1/completions", json=body)
        assert read(answer) == wanted(expected(case, prompt))
        num_cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        if len(num_cached) == 2:
            prompt += answer.json()["choices"][0]["text"]
    assert all(num_cached[1:]) if roomy.shares else not any(num_cached)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_what_their_seeds_say(http, expected, stream):
    body = body_of("sampled", PROMPTS[0], stream=stream, enabled=True)
    answer = http.post("/v1/completions", json={**body, "n": 3})
    texts = ["", "", ""]
    chunks = [answer.text] if not stream else answer.text.split("\n\n")[:-2]
    for chunk in chunks:
        for choice in json.loads(chunk.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
    seeds = [derive_seed(11, index) for index in range(3)]
    assert texts == [expected("sampled", PROMPTS[0], seed=seed).text for seed in seeds]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_says_what_its_rendered_prompt_says(http, plain, stream):
    text = "user: Once upon a time\nassistant:"
    ids = plain.tokenizer.encode(text, adds_special=False)
    params = SamplingParams(max_new_tokens=NUM_TOKENS, logprobs=0, top_p=0.9, **SAMPLED)
    [output] = plain.generate([ids], params)
    body = {
        "model": "stories",
        "messages": [{"role": "user", "content": "Once upon a time"}],
        "max_completion_tokens": NUM_TOKENS,
        "logprobs": True,
        "top_p": 0.9,
        "stream": stream,
        **SAMPLED,
    }
    answer = http.post("/v1/chat/completions", json=body)
    chunks = [answer.text] if not stream else answer.text.split("\n\n")[:-2]
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    said = [choice.get("message") or choice["delta"] for choice in choices]
    assert "".join(part.get("content", "") for part in said) == output.text
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert [entry["logprob"] for entry in entries] == [it.logprob for it in output.logprobs]


@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_are_those_of_plain_decoding(http, plain, echo):
    """Also for a prompt whose beginning is cached, whose rows would not be computed again."""
    prompt = PROMPTS[1]
    params = SamplingParams(max_new_tokens=2, prompt_logprobs=1, logprobs=1)
    [output] = plain.generate(prompt, params)
    body = {"model": "stories", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    body |= {"echo": True, "logprobs": 1} if echo else {"prompt_logprobs": 1}
    for _ in range(2):
        [choice] = http.post("/v1/completions", json=body).json()["choices"]
        expected_values = [entry.logprob for entry in output.prompt_logprobs]
        if echo:
            expected_values += [entry.logprob for entry in output.logprobs]
            assert choice["logprobs"]["token_logprobs"] == [None, *expected_values]
        else:
            assert [it["logprob"] for it in choice["prompt_logprobs"]] == expected_values
