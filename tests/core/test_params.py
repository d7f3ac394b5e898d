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


def test_temperatures_that_would_overflow_logits_are_refused():
    """Temperatures near zero divided logits to infinity, and the lowest id of several won."""
    with pytest.raises(ConfigError, match="temperature"):
        SamplingParams(temperature=1e-40)
    assert SamplingParams(temperature=1e-6).temperature == 1e-6
