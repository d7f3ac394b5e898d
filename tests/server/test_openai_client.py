"""The official client, unchanged, is served as its maker's own service would."""

import asyncio
import json
from contextlib import closing

import httpx
import openai
import pytest

USER = [{"role": "user", "content": "Once upon a time"}]
FIXED = {"model": "stories", "seed": 5, "max_tokens": 20}


@pytest.fixture(scope="module")
def client(api):
    with openai.OpenAI(
        base_url=f"{api.base_url}/v1", api_key="not-needed", max_retries=0, timeout=30
    ) as made:
        yield made


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "stories"
    assert client.models.retrieve("stories") == model


def test_completions_streamed_and_whole(client):
    asked = {**FIXED, "prompt": "Once upon a time", "logprobs": 2}
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(it.text for chunk in chunks for it in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    tokens = [token for chunk in chunks for it in chunk.choices for token in it.logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens
    assert whole.choices[0].finish_reason == "length"


def test_chat_streamed_and_whole(client):
    asked = {**FIXED, "messages": USER, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    [choice] = whole.choices
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == choice.message.content
    entries = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert entries == choice.logprobs.content
    assert len(entries) == whole.usage.completion_tokens


def test_the_client_gathers_a_chat_stream(client):
    # Short of its end the client would not parse a message.
    asked = {**FIXED, "messages": USER, "n": 2, "max_tokens": 200, "stop": ["."]}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        gathered = stream.get_final_completion()
    whole = client.chat.completions.create(**asked)
    assert [it.message.content for it in gathered.choices] == [
        it.message.content for it in whole.choices
    ]


def test_an_answer_can_be_the_next_message(client):
    """The client sends a message of its own type with all the fields that were null."""
    first = client.chat.completions.create(**FIXED, messages=USER).choices[0].message
    again = client.chat.completions.create(**FIXED, messages=[*USER, first, *USER])
    assert again.usage.prompt_tokens > 20


def test_fields_beyond_openais(client):
    answer = client.chat.completions.create(
        **FIXED,
        messages=USER,
        extra_body={"top_k": 1, "speculation": {"drafters": ["suffix"], "details": True}},
    )
    [choice] = answer.choices
    tokens = choice.foretoken["tokens"]
    assert "".join(token["text"] for token in tokens) == choice.message.content
    assert answer.foretoken["exactness"] == "bitwise"
    greedy = client.chat.completions.create(**FIXED, messages=USER, temperature=0)
    assert choice.message.content == greedy.choices[0].message.content


def test_a_schema_and_a_prediction(client):
    schema = {
        "type": "object",
        "properties": {"age": {"enum": [5, 6]}},
        "required": ["age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        **{**FIXED, "max_tokens": 100},
        messages=USER,
        response_format={"type": "json_schema", "json_schema": {"name": "age", "schema": schema}},
        prediction={"type": "content", "content": '{"age": 5}'},
    )
    assert json.loads(answer.choices[0].message.content) in ({"age": 5}, {"age": 6})
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens >= 0
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_stop_and_bias(client):
    answer = client.completions.create(
        **{**FIXED, "max_tokens": 60}, prompt="Once upon a time", temperature=0, stop=[" girl"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert " girl" not in answer.choices[0].text
    [text] = {
        client.completions.create(**FIXED, prompt="A", logit_bias={"40": 100}, n=1).choices[0].text
    }
    assert len(set(text)) == 1


@pytest.mark.parametrize(
    ("changes", "kind", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"maxtokens": 5}}, openai.BadRequestError, "maxtokens"),
    ],
)
def test_errors_are_the_clients_own(client, changes, kind, param):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**FIXED, "messages": USER, **changes})
    assert caught.value.param == param
    assert caught.value.request_id


def test_an_error_midway_reaches_the_reader(client):
    asked = {"allowed_token_ids": [40, 41], "no_repeat_ngram_size": 1}
    stream = client.chat.completions.create(**FIXED, messages=USER, stream=True, extra_body=asked)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.type == "invalid_request_error"


def test_request_ids_go_both_ways(client):
    given = client.with_options(default_headers={"X-Request-Id": "mine-1"})
    answers = [given.completions.create(**FIXED, prompt="One day") for _ in range(2)]
    assert [answer._request_id for answer in answers] == ["mine-1", "mine-1"]
    first, second = (answer.id for answer in answers)
    assert first.startswith("cmpl-mine-1")
    assert first != second
    assert client.completions.create(**FIXED, prompt="One day")._request_id


def test_many_asynchronous_clients(api, client):
    async def ask_all():
        async with openai.AsyncOpenAI(
            base_url=f"{api.base_url}/v1", api_key="not-needed", max_retries=0
        ) as many:
            calls = [
                many.completions.create(**{**FIXED, "seed": seed}, prompt="One day")
                for seed in range(20)
            ]
            return await asyncio.gather(*calls)

    for seed, answer in enumerate(asyncio.run(ask_all())):
        alone = client.completions.create(**{**FIXED, "seed": seed}, prompt="One day")
        assert answer.choices[0].text == alone.choices[0].text


def test_leaving_a_stream_frees_its_place(api, client):
    asked = {**FIXED, "max_tokens": 400, "temperature": 0}
    for _ in range(10):
        with closing(client.completions.create(**asked, prompt="One day", stream=True)) as stream:
            next(iter(stream))
    answer = httpx.get(f"{api.base_url}/health")
    assert answer.status_code == 200
    assert client.completions.create(**FIXED, prompt="One day").usage.completion_tokens == 20
