"""/v1/completions through the wire: forms of prompts, choices, echoes, log-probabilities, usage."""

import pytest

PROMPT = "Once upon a time"


def completions_of(client):
    """Return what answers a completion with a server's client."""

    def post(**fields):
        body = {"model": "stories", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


@pytest.fixture
def complete(http):
    return completions_of(http)


@pytest.fixture
def complete_steadily(steady):
    return completions_of(steady)


def test_prompts_in_all_forms_say_the_same(complete, llm):
    ids = llm.encode(PROMPT)
    expected = complete()["choices"][0]["text"]
    for prompt in ([PROMPT], ids, [ids]):
        [choice] = complete(prompt=prompt)["choices"]
        assert choice["text"] == expected


def test_several_prompts_with_several_choices(complete):
    prompts = [PROMPT, "One day"]
    answer = complete(prompt=prompts, n=2, temperature=1, seed=3, echo=True)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice, prompt in zip(choices, (PROMPT, PROMPT, "One day", "One day"), strict=True):
        assert choice["text"].startswith(prompt)
    assert choices[0]["text"] != choices[1]["text"]
    seeds = answer["foretoken"]["seeds"]
    assert seeds == [3, seeds[1], 3, seeds[1]]
    # Each choice can be had alone, by its seed.
    [alone] = complete(prompt="One day", temperature=1, seed=seeds[1], echo=True)["choices"]
    assert alone["text"] == choices[3]["text"]


def test_a_prompt_counts_once_in_usage(complete, llm):
    answer = complete(prompt=[PROMPT, "One day"], n=2, max_tokens=3, ignore_eos=True)
    num_prompt = len(llm.encode(PROMPT)) + len(llm.encode("One day"))
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == num_prompt + 12


def test_sixteen_tokens_by_default(complete):
    assert complete(max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_the_end_of_the_context_is_a_bound(complete, llm):
    prompt = [5] * (llm.info.context_limit - 3)
    answer = complete(prompt=prompt, max_tokens=100, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_are_columns_along_the_text(complete, echo):
    answer = complete(logprobs=2, echo=echo)
    [choice] = answer["choices"]
    columns = choice["logprobs"]
    num_tokens = answer["usage"]["total_tokens" if echo else "completion_tokens"]
    assert {len(column) for column in columns.values()} == {num_tokens}
    begin = 1 if echo else 0
    assert (columns["tokens"][0] == "<|bos|>") == echo
    assert (columns["token_logprobs"][0] is None) == echo
    ends = [*columns["text_offset"][1:], len(choice["text"])]
    for place in range(begin, num_tokens):
        start, token = columns["text_offset"][place], columns["tokens"][place]
        assert choice["text"][start : ends[place]] == token
        top = columns["top_logprobs"][place]
        assert top[token] == columns["token_logprobs"][place]
        assert 2 <= len(top) <= 3  # the token itself is there even if it is not among the likeliest


def test_logprobs_of_a_banned_token_are_numbers(complete):
    """Minus infinity is none that JSON can say."""
    answer = complete(logprobs=20, logprobs_mode="processed", allowed_token_ids=[40, 41])
    for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
        assert min(top.values()) == -9999.0


def test_prompt_logprobs(complete, llm):
    prompt_ids = llm.encode(PROMPT)
    [choice] = complete(prompt_logprobs=1)["choices"]
    assert [entry["token"] for entry in choice["prompt_logprobs"]] == [
        llm.tokenizer.decode([token_id]) for token_id in prompt_ids[1:]
    ]
    assert all(len(entry["top_logprobs"]) == 1 for entry in choice["prompt_logprobs"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_tokens": 2}, "length"),
        ({"stop": " there"}, "stop"),
        ({"stop_token_ids": list(range(100, 2048)), "max_tokens": 50}, "stop"),
        ({"regex": " [a-z]{2}"}, "stop"),
    ],
)
def test_finish_reasons(complete, fields, reason):
    [choice] = complete(**fields)["choices"]
    assert choice["finish_reason"] == reason
    assert " there" not in choice["text"] or "stop" not in fields


def test_details_say_who_guessed_each_token(complete_steadily):
    answer = complete_steadily(max_tokens=20, speculation={"details": True})
    [choice] = answer["choices"]
    tokens = choice["foretoken"]["tokens"]
    assert "".join(token["text"] for token in tokens) == choice["text"]
    [stats] = answer["foretoken"]["stats"]
    assert sum(bool(token["source"]) for token in tokens) == stats["num_accepted"] > 0
    assert answer["foretoken"]["exactness"] == "bitwise"


def test_speculation_can_be_chosen(complete_steadily):
    answers = {
        name: complete_steadily(max_tokens=20, speculation=speculation)
        for name, speculation in {
            "all": None,
            "off": {"enabled": False},
            "one": {"drafters": ["draft-model"]},
            "two": {"max_nodes": 2},
            "none": {"max_nodes": 0},
        }.items()
    }
    stats = {name: answer["foretoken"]["stats"][0] for name, answer in answers.items()}
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) == 1
    assert stats["off"]["num_draft_tokens"] == stats["none"]["num_draft_tokens"] == 0
    assert stats["all"]["num_draft_tokens"] > 0
    assert set(stats["one"]["drafted_by"]) == {"draft-model"}
    assert stats["two"]["num_draft_tokens"] <= 2 * stats["two"]["num_steps"]


def test_a_long_prompt_is_cached_for_the_next_request(complete, llm):
    prompt = llm.encode("Tom had a red ball. " * 20)
    num_before = complete(prompt=prompt)["usage"]["prompt_tokens_details"]["cached_tokens"]
    num_after = complete(prompt=prompt)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert num_before < num_after < len(prompt)
