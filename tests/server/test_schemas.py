"""What the API takes: every parameter of the sampler, every field of OpenAI's, and nothing else."""

import dataclasses
import re
from pathlib import Path

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from foretoken.core.noise import derive_seed
from foretoken.core.params import SamplingParams
from foretoken.errors import ConfigError
from foretoken.server import params as api_params
from foretoken.server.errors import RENAMED, FieldError
from foretoken.server.schemas import ChatRequest, CompletionRequest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "server-api.md"
MODELS = {"completions": CompletionRequest, "chat": ChatRequest}
MINIMAL = {
    "completions": {"model": "m", "prompt": "Once"},
    "chat": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
}
kinds = pytest.mark.parametrize("kind", MODELS)


def parsed(kind="completions", **fields):
    return MODELS[kind].model_validate({**MINIMAL[kind], **fields})


def wishes(**changes):
    values = {"max_tokens": 9, "default_tokens": 16, "max_tokens_param": "x", "logprobs": None}
    return api_params.Wishes(**{**values, **changes})


def sampling(body):
    return api_params.sampling_params(body, wishes(), 9)


@kinds
def test_every_parameter_of_the_sampler_that_is_data_is_a_field(kind):
    names = {item.name for item in dataclasses.fields(SamplingParams)} - {"logits_processors"}
    names = {RENAMED.get(name, name) for name in names}
    assert names <= set(MODELS[kind].model_fields)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("completions", completion_create_params.CompletionCreateParamsBase),
        ("chat", chat_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openai_is_known(kind, theirs):
    names = set(theirs.__annotations__) | {"stream"}
    assert names <= set(MODELS[kind].model_fields)


@kinds
def test_every_field_is_on_the_page(kind):
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)`", page))
    assert set(MODELS[kind].model_fields) <= named


def test_defaults_are_those_of_openai():
    assert sampling(parsed()) == SamplingParams(temperature=1.0, max_new_tokens=9)


def test_null_means_the_default():
    named = {
        name: None for name in CompletionRequest.model_fields if name not in ("model", "prompt")
    }
    assert sampling(parsed(**named)) == sampling(parsed())


def test_fields_reach_the_sampler():
    fields = {
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logit_bias": {"5": -1.5},
        "sequence_bias": [[[7, 8], 2]],
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[9], [1, 2]],
        "allowed_token_ids": [4, 5, 6],
        "regex": "a+",
        "suppress_tokens": [6],
        "temperature": 0.5,
        "top_h": 0.9,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
        "prompt_logprobs": 2,
        "logprobs_mode": "processed",
    }
    body = parsed(**fields, min_tokens=2)
    assert sampling(body) == SamplingParams.from_mapping(
        {**fields, "min_new_tokens": 2, "max_new_tokens": 9}
    )
    left = {item.name for item in dataclasses.fields(SamplingParams)} - set(fields)
    assert left == {
        *("max_new_tokens", "min_new_tokens", "seed", "logprobs", "logits_processors"),
        *("json_schema", "lark"),  # at most one grammar
    }


def test_minus_one_turns_top_k_off():
    assert sampling(parsed(top_k=-1)).top_k == 0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, '{"type": "object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": False, "schema": {"type": "integer"}},
                }
            },
            '{"type": "integer"}',
        ),
        ({"json_schema": {"type": "null"}}, '{"type": "null"}'),
        ({"json_schema": True}, "true"),
        ({"json_schema": {}, "response_format": {"type": "text"}}, "{}"),
    ],
)
def test_grammars(fields, expected):
    assert sampling(parsed(**fields)).json_schema == expected


def test_two_grammars_contradict_each_other():
    body = parsed(json_schema={}, response_format={"type": "json_object"})
    with pytest.raises(FieldError, match="both given"):
        sampling(body)
    with pytest.raises(ConfigError, match="at most one of"):
        sampling(parsed(regex="a", response_format={"type": "json_object"}))


def bounds():
    """Yield each number of the schema with a bound of its range, as fields of a body."""
    properties = CompletionRequest.model_json_schema()["properties"]
    for name, described in properties.items():
        for option in described.get("anyOf", [described]):
            for key in ("minimum", "maximum"):
                if key in option and hasattr(SamplingParams, name):
                    yield pytest.param({name: option[key]}, id=f"{name} {key}")


@pytest.mark.parametrize("fields", list(bounds()))
def test_the_sampler_takes_the_bounds_of_the_schema(fields):
    sampling(parsed(**fields))


@kinds
@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_what_is_not_served_may_be_left_out_in_any_way(kind, value):
    name = {"completions": "suffix", "chat": "tools"}[kind]
    parsed(kind, **{name: value})


@kinds
@pytest.mark.parametrize("value", [0, 1, True, "x", [1], {"a": 1}])
def test_what_is_not_served_is_refused(kind, value):
    name = {"completions": "suffix", "chat": "tools"}[kind]
    with pytest.raises(ValidationError, match="not served"):
        parsed(kind, **{name: value})


@kinds
@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier", "prompt_cache_key"])
@pytest.mark.parametrize("value", ["x", {"a": "b"}, True, 5])
def test_what_changes_nothing_is_taken(kind, name, value):
    assert sampling(parsed(kind, **{name: value})) == sampling(parsed(kind))


def test_seeds_of_choices_are_derived():
    assert list(api_params._seeds(5, 3)) == [5, derive_seed(5, 1), derive_seed(5, 2)]
    assert list(api_params._seeds(-1, 1)) == [2**64 - 1]
    assert list(api_params._seeds(2**64 + 5, 1)) == [5]
    first, second = (list(api_params._seeds(None, 2)) for _ in range(2))
    assert len({*first, *second}) == 4  # two of four equal by chance: below 1e-18


def test_many_wrong_entries_are_refused_at_once():
    """One error per entry would be a list as long as the body."""
    bodies = [
        {"logit_bias": {f"{place}x": 1 for place in range(200_000)}},
        {"prompt": ["a"] * 100_000 + [5]},
        {"allowed_token_ids": [-1] * 200_000},
        {"suppress_tokens": list(range(200_000))},
        {f"field{place}": 1 for place in range(200_000)},
    ]
    for fields in bodies:
        with pytest.raises(ValidationError) as caught:
            parsed(**fields)
        assert len(caught.value.errors()) < 10
