"""What an operator may choose, and when a full queue has room again."""

import dataclasses

import pytest

from foretoken import ConfigError
from foretoken.server.settings import ServerSettings, is_loopback
from foretoken.server.turnover import WINDOW_S, Turnover

GOOD = ServerSettings(model_name="stories")


def test_defaults_are_careful():
    assert (GOOD.host, GOOD.is_loopback) == ("127.0.0.1", True)
    assert (GOOD.cors_origins, GOOD.log_prompts) == ((), False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name", ""),
        ("model_name", " "),
        ("host", ""),
        ("port", -1),
        ("port", 65_536),
        ("port", True),
        ("port", "80"),
        ("max_queue", -1),
        ("max_queue", 1.5),
        ("max_choices", 0),
        ("max_body_bytes", 0),
        ("max_grammar_bytes", 0),
        ("max_connections", 0),
        ("max_connections", 1.5),
        ("read_timeout_s", 0),
        ("read_timeout_s", None),
        ("read_timeout_s", float("inf")),
        ("max_new_tokens_limit", 0),
        ("deadline_s", 0),
        ("deadline_s", -1.0),
        ("deadline_s", float("nan")),
        ("deadline_s", float("inf")),
        ("drain_s", -0.1),
        ("drain_s", float("nan")),
        ("drain_s", None),
        ("cors_origins", ("app.example",)),
        ("cors_origins", ("https://app.example/path",)),
        ("log_format", "xml"),
    ],
)
def test_wrong_values_are_named(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is .*; got ") as caught:
        dataclasses.replace(GOOD, **{name: value})
    assert caught.value.hint == f"change {name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0),
        ("max_queue", 0),
        ("deadline_s", 0.5),
        ("deadline_s", 1),
        ("drain_s", 0),
        ("cors_origins", ("*", "http://localhost:3000")),
        ("log_format", "json"),
    ],
)
def test_bounds_are_allowed(name, value):
    assert getattr(dataclasses.replace(GOOD, **{name: value}), name) == value


@pytest.mark.parametrize(
    "key", ["", "short", "with space in it", "umläut-12345", "line\nbreak-1", 7]
)
def test_a_key_that_no_header_can_carry(key):
    with pytest.raises(ConfigError, match="an API key has at least 8") as caught:
        dataclasses.replace(GOOD, api_keys=("good-key-123", key))
    assert str(key) not in str(caught.value) or key in ("", 7)
    assert "good-key" not in str(caught.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.1", "localhost", "LocalHost.", "a.localhost", "::1", "[::1]"]
)
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "127.0.0.1.nip.example", "1.1"],
)
def test_not_loopback(host):
    assert not is_loopback(host)


# -- turnover ----------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def turnover(clock):
    return Turnover(clock)


def finish(turnover, clock, num, every_s):
    for _ in range(num):
        clock.now_s += every_s
        turnover.count_finish()


def test_the_wait_follows_the_rate(turnover, clock):
    finish(turnover, clock, 21, every_s=2.0)  # 21 in 40 s, and the next one is on its way
    assert turnover.retry_after_s(1, 100, busy_s=10.0) == 2
    turnover = Turnover(clock)
    finish(turnover, clock, 21, every_s=2.0)
    assert turnover.retry_after_s(5, 100, busy_s=10.0) == 10


def test_nobody_is_told_less_than_a_second(turnover, clock):
    finish(turnover, clock, 50, every_s=0.001)
    assert turnover.retry_after_s(1, 10, busy_s=0.01) == 1


def test_before_the_first_finish_it_takes_as_long_again(turnover):
    assert turnover.retry_after_s(1, 16, busy_s=7.0) == 7


def test_nothing_is_known_at_all(turnover):
    assert turnover.retry_after_s(1, 16, busy_s=0.0) == 1


def test_those_turned_away_are_spread(turnover, clock):
    finish(turnover, clock, 21, every_s=2.0)
    waits = [turnover.retry_after_s(1, 8, busy_s=10.0) for _ in range(10)]
    assert waits == sorted(waits)
    assert waits[0] == 2
    assert len(set(waits)) >= 6
    assert waits[-1] == 15  # all eight have finished by then
    clock.now_s += 30.0  # what was promised has come
    finish(turnover, clock, 1, every_s=0.0)
    assert turnover.retry_after_s(1, 8, busy_s=10.0) <= 4


def test_old_finishes_say_nothing(turnover, clock):
    finish(turnover, clock, 5, every_s=0.1)
    clock.now_s += WINDOW_S + 1
    assert turnover.retry_after_s(1, 4, busy_s=3.0) == 3
