"""`bench speed`: what is counted and concluded from turns, and whole runs of tiny models."""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from foretoken.bench.record import different_tokens
from foretoken.bench.speed.cell import Rounds, as_entry
from foretoken.bench.speed.lanes import Turn
from foretoken.bench.speed.picture import interpolated, picture
from foretoken.bench.speed.plots import write_plots
from foretoken.bench.speed.report import as_markdown, conclusions, print_report
from foretoken.bench.speed.run import run_speed
from foretoken.bench.speed.settings import SpeedSettings, Way
from foretoken.bench.workloads import Workload, WorkloadPrompt
from foretoken.errors import ConfigError, ModelError
from foretoken.planner.in_flight import TickReport
from tests.cli.conftest import save_model
from tests.looped import looped_module

LOOPS, NUM_TOKENS = 3, 9
PLAIN = Way("shared", "plain")
SHALLOW, DEEP = Way("shallow", "plain"), Way("deep", "plain")
EAGER, LAZY = Way("shared", "eager", 1), Way("shared", "lazy", 1)
QUALITY = {
    name: {"bits_per_character": bits, "agreement": [0.8, 0.9, 1.0], "num_tokens": 10}
    for name, bits in (("shared", [2.0, 1.8, 1.6]), ("shallow", [1.9]), ("deep", [1.5]))
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A looped model, and a plain one, with the tokenizer of the tiny test models."""
    folder = tmp_path_factory.mktemp("speed")
    plain = save_model(folder / "plain", seed=0)
    looped = looped_module(0, loops=LOOPS, group=1, vocab=257)
    looped.save_pretrained(folder / "looped")
    for file in (folder / "plain").glob("*token*"):
        shutil.copy(file, folder / "looped")
    return {"shared": str(folder / "looped"), "shallow": plain}


@pytest.fixture(scope="module")
def speed_settings(models):
    """Return settings of a tiny run; keywords replace some."""

    def make(**changes):
        texts = ("hello there", "once upon a time")
        prompts = [WorkloadPrompt(prompt=text, place=f"line {n}") for n, text in enumerate(texts)]
        values = {
            "models": models,
            "names": dict.fromkeys(("shared", "shallow", "deep"), "tiny"),
            "weights": {"shared": "1"},
            "quality": {},
            "workload": Workload("test", tuple(prompts)),
            "max_prompt_tokens": 8,
            "exit_loops": (1, 2),
            "checks": ("eager", "lazy"),
            "loopspec": {},
            "max_new_tokens": NUM_TOKENS,
            "temperatures": (0.0, 1.0),
            "batch_sizes": (1, 2),
            "rounds": 2,
            "seed": 0,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
        }
        return SpeedSettings(**{**values, **changes})

    return make


# -- what is counted -----------------------------------------------------------------------------


def turn(seconds, num_ticks=0, reports=(), token_id=7, num_prompts=1):
    return Turn(
        output_ids=[[token_id] * NUM_TOKENS] * num_prompts,
        decode_s=[seconds] * num_prompts,
        num_ticks=[num_ticks] * num_prompts,
        reports=list(reports),
    )


def ticks(count, settled, num_rows=2, tick_s=0.001):
    """Return reports of ticks, the tokens' settling depths spread over them."""
    return [
        TickReport(1, num_rows, 10, tick_s, [settled[n]] if n < len(settled) else [])
        for n in range(count)
    ]


def measured(**turns):
    """Return the entry of a cell with one round."""
    ways = {"plain": PLAIN, "eager": EAGER, "lazy": LAZY, "shallow": SHALLOW, "deep": DEEP}
    rounds = Rounds([ways[name] for name in turns], LOOPS, 1, 0.0)
    rounds.turns.append({ways[name].name: given for name, given in turns.items()})
    return as_entry(rounds), rounds


def test_ticks_are_counted_from_one_token_to_the_next():
    """Eight tokens by ticks; three settle at once, three at depth 2, two at the end: 15 ticks.

    The last one's three ticks to the end are followed by no other token.
    """
    settled = [(1, 1)] * 3 + [(2, 2)] * 3 + [(3, 3)] * 2
    entry, _ = measured(plain=turn(0.024), eager=turn(0.018, 18, ticks(18, settled)))
    way = entry["systems"]["eager e=1"]
    assert way["ticks_per_token"] == pytest.approx(15 / 7, rel=1e-4)
    assert way["settle"] == [0.375, 0.375, 0.25]
    assert way["agreement"] == 0.375
    assert way["ticks_per_token_of_the_model"] == pytest.approx(1.875)
    assert (way["tick_ms"], way["rows"]) == (1.0, {"mean": 2.0, "most": 2})
    assert way["most_rows_allowed"] == 3
    assert way["speed_up"]["median"] == pytest.approx(24 / 18, rel=1e-4)
    predicted = 3.0 * 8 / (1.875 * 7 + 3)
    assert way["predicted_speed_up"] == pytest.approx(predicted, rel=1e-4)
    assert way["measured_over_predicted"] == pytest.approx(24 / 18 / predicted, rel=1e-4)
    assert entry["systems"]["shared plain"]["token_ms"]["median"] == 3.0


def test_the_lazy_check_goes_by_agreement():
    settled = [(1, 1)] * 6 + [(2, 3)] * 2
    entry, _ = measured(plain=turn(0.024), lazy=turn(0.018, 15, ticks(15, settled)))
    way = entry["systems"]["lazy e=1"]
    assert way["agreement"] == 0.75
    assert way["ticks_per_token_of_the_model"] == pytest.approx(0.75 + 0.25 * 3)
    assert "settle" not in way


def test_eager_is_held_against_lazy_and_wishes_are_answered():
    reports = ticks(12, [(1, 1)] * 8)
    entry, _ = measured(
        plain=turn(0.024), eager=turn(0.010, 10, reports), lazy=turn(0.012, 12, reports)
    )
    assert entry["eager_over_lazy"]["1"]["median"] == pytest.approx(1.2)
    lines = list(conclusions({"cells": [entry]}))
    assert "wanted 1.1: yes" in next(line for line in lines if "eager check" in line)
    assert any("agreement 1.00, speed-up 2.40; wanted 2" in line for line in lines)
    slower, _ = measured(
        plain=turn(0.024), eager=turn(0.013, 10, reports), lazy=turn(0.013, 12, reports)
    )
    lines = list(conclusions({"cells": [slower]}))
    assert "wanted 1.1: no" in next(line for line in lines if "eager check" in line)
    assert any("speed-up 1.85; wanted 2 where it is at least 0.8: no" in line for line in lines)


def test_other_tokens_are_found():
    wrong = turn(0.01, 10, token_id=8)
    entry, _ = measured(plain=turn(0.024), eager=wrong)
    [difference] = different_tokens({"cells": [entry]})
    assert (difference["system"], difference["token"]) == ("eager e=1", 0)
    entry, _ = measured(plain=turn(0.024), eager=turn(0.01, 10))
    assert different_tokens({"cells": [entry]}) == []


def test_ratios_are_paired_in_rounds():
    rounds = Rounds([PLAIN, EAGER], LOOPS, 1, 0.0)
    for slow in (1.0, 2.0, 0.5):  # a machine that changes does not change ratios
        rounds.turns.append({"shared plain": turn(0.02 * slow), "eager e=1": turn(0.01 * slow)})
    ratio = rounds.ratio("eager e=1", "shared plain")
    assert (ratio["median"], ratio["interval_95"], ratio["rounds"]) == (2.0, [2.0, 2.0], [2.0] * 3)


# -- the picture ---------------------------------------------------------------------------------


def drawn(speed_settings, shared_s, shallow_s=0.010, deep_s=0.030):
    _, rounds = measured(
        plain=turn(0.030), eager=turn(shared_s), shallow=turn(shallow_s), deep=turn(deep_s)
    )
    return picture(speed_settings(quality=QUALITY), rounds)


def test_the_claim_holds_where_latency_is_equal_and_quality_better(speed_settings):
    found = drawn(speed_settings, shared_s=0.0104)
    verdict = found["verdict"]
    assert verdict["latency_over_shallow"] == pytest.approx(1.04)
    assert verdict["bits_below_shallow"] == pytest.approx(0.3)
    assert verdict["is_as_fast_as_shallow"]
    assert verdict["is_better_at_equal_latency"]
    assert [point["name"] for point in found["points"]] == [
        *("shared plain", "shallow plain", "deep plain", "shared, SPEED (eager e=1)")
    ]


def test_a_slower_model_is_held_against_unshared_ones_of_its_latency(speed_settings):
    """At 0.027 s the line between the two unshared ones is at 1.54 bits, below the shared 1.6."""
    verdict = drawn(speed_settings, shared_s=0.027)["verdict"]
    assert not verdict["is_as_fast_as_shallow"]
    assert verdict["bits_of_unshared_at_this_latency"] == pytest.approx(1.5384, abs=1e-3)
    assert not verdict["is_better_at_equal_latency"]
    between = drawn(speed_settings, shared_s=0.014)["verdict"]
    assert not between["is_as_fast_as_shallow"]
    assert between["is_better_at_equal_latency"]


def test_latencies_beyond_what_was_measured_have_the_nearer_ones_quality():
    assert interpolated([1.0, 0.5, 3.0], 1.9, 1.5) == 1.9
    assert interpolated([1.0, 5.0, 3.0], 1.9, 1.5) == 1.5
    assert interpolated([1.0, np.sqrt(3.0), 3.0], 1.9, 1.5) == pytest.approx(1.7)
    assert interpolated([3.0, 2.0, 1.0], 1.9, 1.5) == 1.5


def test_without_quality_there_is_no_picture(speed_settings):
    _, rounds = measured(plain=turn(0.03), eager=turn(0.01))
    assert picture(speed_settings(), rounds) is None


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(speed_settings):
    quality = {name: QUALITY[name] for name in ("shared", "shallow")}
    return run_speed(speed_settings(quality=quality), ["foretoken", "bench", "speed"])


def test_every_way_is_measured_in_every_cell(record):
    cells = record["cells"]
    assert [(it["temperature"], it["batch_size"]) for it in cells] == [
        *((0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2))
    ]
    for cell in cells:
        assert list(cell["systems"]) == [
            *("shared plain", "eager e=1", "lazy e=1", "eager e=2", "lazy e=2"),
            *("auto", "loopspec", "shallow plain"),
        ]
        for way in cell["systems"].values():
            assert np.shape(way["unit_s"]) == (2, 2 // cell["batch_size"])
        for exit_loop, most in ((1, 3), (2, 2)):
            way = cell["systems"][f"eager e={exit_loop}"]
            assert way["most_rows_allowed"] == most
            assert way["rows"]["most"] <= most * cell["batch_size"]
            assert exit_loop <= way["ticks_per_token"] <= LOOPS
    assert different_tokens(record) == []
    assert record["models"]["shared"]["loops"] == LOOPS
    assert set(record["costs"]) == {"tick_ms", "pass_ms"}
    json.dumps(record)


def test_what_was_counted_is_what_the_model_says(record):
    """By the very depths that were seen; rows at the end of an output are fewer: within a tick."""
    for cell in record["cells"]:
        for way in cell["systems"].values():
            if "ticks_per_token_of_the_model" in way and cell["batch_size"] == 1:
                difference = way["ticks_per_token"] - way["ticks_per_token_of_the_model"]
                # The last token's own depth is not part of what is counted.
                assert abs(difference) * (NUM_TOKENS - 2) <= LOOPS


def test_the_report_says_it_all(record):
    out = io.StringIO()
    print_report(record, Console(file=out, width=120))
    text, markdown = out.getvalue(), as_markdown(record)
    for part in (
        "Speed, greedy, 2 prompts at once",
        "Measured against the cost model, temperature 1",
        "Quality against latency",
        "Conclusions",
        "at equal latency the shared model with SPEED is the better one:",
    ):
        assert part in text
        assert part in markdown
    assert "| eager e=1 |" in markdown


def test_pictures_are_drawn(record, tmp_path):
    pytest.importorskip("matplotlib")
    paths = write_plots(record, tmp_path)
    assert [path.name for path in paths] == ["quality_latency.png", "cost_model.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_models_without_loops_are_refused(speed_settings, models):
    settings = speed_settings(models={"shared": models["shallow"]})
    with pytest.raises(ModelError, match="runs each of its layers once"):
        run_speed(settings, ["foretoken"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checks": ("never",)}, "checks are eager and lazy; got 'never'"),
        ({"max_new_tokens": 1}, "at least 2, since the first is the prompt's own; got 1"),
    ],
)
def test_settings_are_checked(speed_settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        speed_settings(**changes)


def test_prompts_have_to_fit(speed_settings):
    with pytest.raises(ConfigError, match="no prompt of workload test fits"):
        run_speed(speed_settings(max_new_tokens=5000), ["foretoken"])
