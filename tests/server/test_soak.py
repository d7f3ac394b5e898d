"""The soak: half a minute of random load on a real process, and that it would find what is wrong.

FORETOKEN_SOAK_SECONDS is how long the load lasts; by default it is short. In so little time memory
still settles, so that only large leaks are found: some 30 KiB per call.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "server_soak.py"
SECONDS = float(os.environ.get("FORETOKEN_SOAK_SECONDS", "25"))
GROWTH_LIMIT_MIB = 12

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@pytest.fixture
def soak(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("server_soak")


@pytest.fixture
def traffic(soak):
    """The module of its calls."""
    return importlib.import_module("soak_traffic")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished soak: its process, its record and its picture."""
    folder = tmp_path_factory.mktemp("soak")
    output, picture = folder / "soak.json", folder / "soak.png"
    options = ["--minutes", str(SECONDS / 60), "--interval", "0.5"]
    options += ["--growth-limit", str(GROWTH_LIMIT_MIB)]
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--output", output, "--picture", picture],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS + 300,
    )
    return process, json.loads(output.read_text(encoding="utf-8")), picture


def test_half_a_minute_leaves_nothing_behind(done):
    process, result, picture = done
    assert result["failures"] == [], process.stdout
    assert process.returncode == 0, process.stderr
    assert result["is_complete"]
    assert result["end"]["held"]["damage"] == ""
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_load_is_of_all_kinds(done):
    _, result, _ = done
    kinds = {name.partition(":")[0] for name in result["outcomes"]}
    forms = {f"{kind} {form}" for kind in ("text", "chat") for form in ("stream", "whole")}
    assert kinds == forms | {"bad", "fixed", "at the end"}
    results = {name.partition(": ")[2] for name in result["outcomes"]}
    assert results > {"200", "400", "429", "left"}
    assert result["num_compared"] > 8


def samples(sizes, interval_s=5.0):
    return [
        {"s": index * interval_s, "rss_mib": size, "files": 14, "threads": 10}
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "growth_mib"),
    [
        ([300.0] * 100, 0.0),
        # Fast growth during the warm-up, the first fifth, is none.
        ([100.0 + 10 * index for index in range(20)] + [300.0] * 80, 0.0),
        # A peak now and then is none either.
        ([300.0 + 50 * (index % 10 == 3) for index in range(100)], 0.0),
        # A small and steady one is, also under noise that is larger.
        ([300.0 + 0.1 * index for index in range(100)], 7.9),
        ([300.0 + 0.1 * index + (-1) ** index for index in range(100)], 7.9),
    ],
)
def test_growth_is_what_stays(soak, sizes, growth_mib):
    trend = soak.memory_trend(samples(sizes), limit_mib=8.0)
    assert trend["growth_mib"] == pytest.approx(growth_mib, abs=0.2)
    assert trend["warm_up_s"] == pytest.approx(99, abs=1)


@pytest.mark.parametrize(("last_s", "warm_up_s"), [(24, 12), (120, 60), (250, 60), (3600, 720)])
def test_short_runs_warm_up_for_up_to_half_of_them(soak, last_s, warm_up_s):
    trend = soak.memory_trend(samples([300.0] * (last_s // 2 + 1), interval_s=2.0), limit_mib=8.0)
    assert trend["warm_up_s"] == pytest.approx(warm_up_s)


CHANGES = {
    "calls ended otherwise than they should": {"num_unexpected": 1},
    "no call was answered": {"num_tokens": 0},
    "fixed calls got other answers": {"num_different": 1},
    "fixed calls were not compared": {"num_compared": 0},
    "the server complained": {"complaints": ["Traceback"]},
    "memory grew": {"memory": {"growth_mib": 8.1, "growth_limit_mib": 8.0}},
    "files stayed open": {"files_before_and_after": [14, 15]},
    "streams were cut at the end": {"streams_ended_of_4": 3},
    "the exit code is not 0": {"exit_code": 1},
    "the engine still held something": {"held": {"damage": "", "blocks": 1}},
}


@pytest.mark.parametrize("failure", CHANGES)
def test_each_failure_is_found(soak, done, failure):
    changes = CHANGES[failure]
    _, result, _ = done
    at_end = {**result["end"], **{key: changes[key] for key in changes if key in result["end"]}}
    changed = {**result, **changes, "end": at_end}
    assert soak.failures_of(changed) == [failure]


def test_growing_threads_are_found(soak, done):
    _, result, _ = done
    rising = [{**item, "threads": 10 + index} for index, item in enumerate(result["samples"])]
    assert soak.failures_of({**result, "samples": rising}) == ["threads became more"]


def test_the_fixed_calls_are_compared_to_the_bit(traffic):
    choice = {
        "index": 0,
        "text": "a",
        "logprobs": {"token_logprobs": [-0.5]},
        "foretoken": {"tokens": [{"id": 5, "text": "a", "source": "suffix"}]},
    }
    other = {**choice, "foretoken": {"tokens": [{"id": 5, "text": "a", "source": ""}]}}
    comparable = traffic.comparable
    assert comparable(choice) == comparable(other)  # who guessed is chance
    for change in (
        {"text": "b"},
        {"logprobs": {"token_logprobs": [-0.5000001]}},
        {"foretoken": {"tokens": [{"id": 6, "text": "a", "source": "suffix"}]}},
    ):
        assert comparable(choice) != comparable({**choice, **change})
