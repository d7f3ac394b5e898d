"""Sampling parameters: every bad value is refused with a message that names it."""

import dataclasses
import json

import pytest

from foretoken.core.params import SamplingParams
from foretoken.errors import ConfigError, UnknownNameError

NAN, INFINITY = float("nan"), float("inf")
BEYOND_FLOAT = 10**400

BAD_VALUES = {
    "max_new_tokens": [0, -1, 2.0, "8", True, None],
    "top_k": [-1, 1.5, "40", False, None],
    "seed": [-1, 2**64, 1.0, "7", True],
    "ignore_eos": [1, "true", None],
    "temperature": [-0.1, NAN, INFINITY, "hot", None, True, BEYOND_FLOAT, [1.0]],
    "top_p": [0, 0.0, -0.5, 1.01, NAN, "all", None],
    "min_p": [-0.01, 1.01, NAN, "none", None],
    "repetition_penalty": [0, -1, NAN, INFINITY, "1.1", None],
    "frequency_penalty": [-2.1, 2.1, NAN, "0", None],
    "presence_penalty": [-2.1, 2.1, NAN, "0", None],
    "stop": [None, 5, "", [""], ["a", ""], ["a", 3], b"end", {"a": 1}],
    "logit_bias": [
        None,
        [1, 2],
        "1",
        {-1: 1.0},
        {"-1": 1.0},
        {"one": 1.0},
        {1.5: 1.0},
        {1: NAN},
        {1: INFINITY},
        {1: "much"},
        {1: None},
        {1: BEYOND_FLOAT},
    ],
    "stop_token_ids": [None, 5, "5", [-1], [True], [1.0], ["2"], [[1]], {"a": 1}],
    "sequence_bias": [
        None,
        5,
        "bias",
        [[1, 2]],
        [[[], 1.0]],
        [[[-1], 1.0]],
        [[[True], 1.0]],
        [[[1], "much"]],
        [[[1], True]],
        [[[1], NAN]],
        [[[1], -INFINITY]],
        [[[1], BEYOND_FLOAT]],
        [[[1], 1.0, 2]],
        {1: 2.0},
    ],
    "no_repeat_ngram_size": [-1, 2.0, "2", True, None],
    "bad_words_ids": [None, 3, [3], [[]], [[-1]], [[True]], [["a"]], [[1.0]], "bad"],
    "min_new_tokens": [-1, 1.0, "1", True, None],
    "allowed_token_ids": [[], (), 3, "3", [-3], [False], [0.5]],
    "suppress_tokens": [None, 3, [-3], [True], ["a"], [[3]]],
    "logits_processors": [None, 3, "f", [3], [None]],
    "top_h": [0, 0.0, -1, 1.01, NAN, "0.4", True],
    "typical_p": [0, 0.0, 1.01, -1, NAN, "0.4", None, True],
    "epsilon_cutoff": [1, 1.0, -0.1, NAN, "0.1", None, True],
    "eta_cutoff": [1, 1.0, -0.1, NAN, "0.1", None, True],
    "json_schema": ["", "{", "3", "[]", 3, [], NAN, {1: {1}}],
    "regex": ["", 3, b"a", ["a"]],
    "lark": ["", 3, b"a", ["a"]],
    "logprobs": [-1, 1.0, "1", True],
    "prompt_logprobs": [-1, 1.0, "1", True],
    "logprobs_mode": ["", "Raw", None, 1, True],
}
# The outermost values that are still allowed.
GOOD_VALUES = {
    "max_new_tokens": [1, 10**9],
    "top_k": [0, 1, 10**9],
    "seed": [None, 0, 2**64 - 1],
    "ignore_eos": [True, False],
    "temperature": [0, 0.0, 1, 2.5],
    "top_p": [1, 1.0, 1e-9],
    "min_p": [0, 0.0, 1, 1.0],
    "repetition_penalty": [0.1, 1, 3.0],
    "frequency_penalty": [-2, 0, 2.0],
    "presence_penalty": [-2.0, 0, 2],
    "stop": [(), [], "end", ["end", "\n"], ("a",)],
    "logit_bias": [{}, {0: 1}, {"5": -100.0}],
    "stop_token_ids": [(), [], [0], (1, 2), {3}],
    "sequence_bias": [(), [], [[[0], 1]], [((1, 2), -0.5)], {(3, 4): 1.0}],
    "no_repeat_ngram_size": [0, 1, 10**9],
    "bad_words_ids": [(), [], [[0]], ((1, 2), (3,))],
    "min_new_tokens": [0, 1, 256],
    "allowed_token_ids": [None, [0], (1, 2), {3}],
    "suppress_tokens": [(), [], [0], (1, 2)],
    "logits_processors": [(), [], max, [max, min]],
    "top_h": [None, 1e-9, 1, 1.0],
    "typical_p": [1, 1.0, 1e-9],
    "epsilon_cutoff": [0, 0.0, 0.999],
    "eta_cutoff": [0, 0.0, 0.999],
    "json_schema": [None, "{}", "true", {}, {"type": "object"}, True],
    "regex": [None, "a+"],
    "lark": [None, 'start: "a"'],
    "logprobs": [None, 0, 1, 10**9],
    "prompt_logprobs": [None, 0, 1, 10**9],
    "logprobs_mode": ["raw", "processed"],
}


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}={str(value)[:20]}")
        for name, values in table.items()
        for value in values
    ]


def test_every_parameter_is_tested():
    names = {item.name for item in dataclasses.fields(SamplingParams)}
    assert names == BAD_VALUES.keys() == GOOD_VALUES.keys()


@pytest.mark.parametrize(("name", "value"), cases(BAD_VALUES))
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} .*; got ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.hint


@pytest.mark.parametrize(("name", "value"), cases(GOOD_VALUES))
def test_outermost_values_are_allowed(name, value):
    SamplingParams(**{name: value})


def test_defaults_are_plain_greedy():
    params = SamplingParams()
    assert params.is_greedy
    assert params.stop == ()
    assert params.seed is None


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0, True), (0.0, True), (1e-6, False)])
def test_greedy_is_temperature_zero(temperature, is_greedy):
    assert SamplingParams(temperature=temperature).is_greedy is is_greedy


def test_one_stop_text_stands_for_itself():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)


def test_values_come_from_json():
    text = '{"temperature": 1, "stop": ["a", "b"], "logit_bias": {"42": -1.5}, "seed": 7}'
    params = SamplingParams.from_mapping(json.loads(text))
    assert params == SamplingParams(temperature=1, stop=("a", "b"), logit_bias={42: -1.5}, seed=7)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("temprature", "temperature"), ("topk", "top_k"), ("max_tokens", "max_new_tokens")],
)
def test_unknown_key_suggests_the_nearest(key, nearest):
    with pytest.raises(UnknownNameError, match=f"unknown sampling parameter '{key}'") as caught:
        SamplingParams.from_mapping({key: 1})
    assert caught.value.hint == f"did you mean {nearest!r}?"


def test_unknown_key_unlike_any_lists_all():
    with pytest.raises(UnknownNameError) as caught:
        SamplingParams.from_mapping({"zzz": 1})
    assert "top_p" in caught.value.hint


def test_parameters_are_frozen():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0
    bias[3] = 9.0
    assert params.logit_bias == {3: 1.0}, "the caller's mapping is copied"


def test_sequences_are_stored_as_tuples():
    params = SamplingParams.from_mapping(
        json.loads(
            '{"bad_words_ids": [[1, 2], [3], [3]], "sequence_bias": [[[4, 5], 1]],'
            ' "stop_token_ids": [6, 6], "allowed_token_ids": [7], "suppress_tokens": [8]}'
        )
    )
    assert params.bad_words_ids == ((1, 2), (3,))
    assert params.sequence_bias == (((4, 5), 1.0),)
    assert (params.stop_token_ids, params.allowed_token_ids) == ((6,), (7,))
    assert list(params.named_token_ids()) == [
        ("stop_token_ids", 6),
        ("allowed_token_ids", 7),
        ("suppress_tokens", 8),
        *(("bad_words_ids", token_id) for token_id in (1, 2, 3)),
        ("sequence_bias", 4),
        ("sequence_bias", 5),
    ]


def test_a_parsed_schema_is_written_out():
    schema = {"type": "object", "required": ["a"]}
    assert json.loads(SamplingParams(json_schema=schema).json_schema) == schema


def test_one_processor_stands_for_itself():
    assert SamplingParams(logits_processors=max).logits_processors == (max,)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, ["min_new_tokens", "max_new_tokens"]),
        ({"regex": "a", "lark": "start: /a/"}, ["regex", "lark"]),
        ({"json_schema": "{}", "regex": "a"}, ["json_schema", "regex"]),
        (
            {"allowed_token_ids": [1, 2], "bad_words_ids": [[1], [2], [3, 4]]},
            ["allowed_token_ids", "bad_words_ids"],
        ),
        (
            {"allowed_token_ids": [1, 2], "suppress_tokens": [1, 2]},
            ["allowed_token_ids", "suppress_tokens"],
        ),
        (
            {"allowed_token_ids": [1, 2], "suppress_tokens": [1], "bad_words_ids": [[2]]},
            ["allowed_token_ids", "suppress_tokens", "bad_words_ids"],
        ),
        (
            {"allowed_token_ids": [1], "stop_token_ids": [1], "min_new_tokens": 1},
            ["allowed_token_ids", "stop_token_ids", "min_new_tokens"],
        ),
    ],
)
def test_contradictions_name_both_parameters(values, names):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**values)
    assert all(name in str(caught.value) for name in names)
    assert caught.value.hint


@pytest.mark.parametrize(
    "values",
    [
        {"min_new_tokens": 8, "max_new_tokens": 8},
        {"allowed_token_ids": [1, 2], "bad_words_ids": [[1], [2, 2]]},
        {"allowed_token_ids": [1, 2], "suppress_tokens": [1]},
        {"allowed_token_ids": [1], "stop_token_ids": [1]},
        {"allowed_token_ids": [1, 2], "stop_token_ids": [1], "min_new_tokens": 1},
    ],
)
def test_what_leaves_a_token_is_no_contradiction(values):
    SamplingParams(**values)


@pytest.mark.parametrize(("allowed", "refused"), [(1e-6, 1e-40), (1e6, 1e300)])
def test_temperatures_that_would_overflow_are_refused(allowed, refused):
    """Near zero they divided logits to infinity, and the lowest id of several won."""
    with pytest.raises(ConfigError, match="temperature"):
        SamplingParams(temperature=refused)
    assert SamplingParams(temperature=allowed).temperature == allowed
