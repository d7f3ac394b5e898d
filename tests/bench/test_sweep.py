"""Sweeps: fresh texts, rounds as needed, records that survive, and what is concluded."""

import io
import itertools
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console

from foretoken.bench.peers.base import PeerOutput
from foretoken.bench.record import different_tokens
from foretoken.bench.sweep import run as sweep_run
from foretoken.bench.sweep.cell import as_entry, measure
from foretoken.bench.sweep.plots import write_plots
from foretoken.bench.sweep.report import print_report
from foretoken.bench.sweep.run import run_sweep
from foretoken.bench.sweep.schedule import SLICE_S, TURN_S, PausingSystem, Schedule, orders
from foretoken.bench.sweep.settings import CellKey, Kind, SweepSettings
from foretoken.bench.sweep.summary import goals, is_close, resolution, wins
from foretoken.bench.sweep.work import SweepWork, edited
from foretoken.bench.systems import HostInfo, Task, Turn
from foretoken.errors import ConfigError, ForetokenError
from foretoken.models.tokenizer import Tokenizer

STORY, EDIT, RANDOM = Kind
NUM_TOKENS = 6  # of every request of the fakes
INFO = HostInfo(version="1", dtype="float64", context_limit=128, vocab_size=257)


@pytest.fixture(scope="module")
def sweep_settings(pair):
    """Return settings of a tiny sweep in this process; keywords replace some."""

    def make(**changes):
        values = {
            "model": pair.target,
            "model_name": "target",
            "weights": ("1",),
            "drafters": (f"draft-model:path={pair.draft}", "prompt-lookup"),
            "max_nodes": (4,),
            "workloads": (RANDOM,),
            "num_prompts": 1,
            "least_seconds": 0.0,
            "max_new_tokens": 6,
            "temperatures": (0.0, 1.0),
            "batch_sizes": (1, 2),
            "rounds": 1,
            "max_rounds": 1,
            "width": 0.1,
            "seed": 0,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
        }
        return SweepSettings(**{**values, **changes})

    return make


# -- texts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_work(sweep_settings, pair):
    settings = sweep_settings(
        workloads=tuple(Kind), num_prompts=2, rounds=2, max_rounds=2, max_new_tokens=60
    )
    return settings, SweepWork(settings, Tokenizer.load(pair.target), INFO)


def test_no_prompt_ever_comes_again(all_work):
    settings, work = all_work
    # Two rounds, and two to warm up.
    tasks = [task for key in settings.cells for n in range(4) for task in work.tasks(key, n, 2)]
    assert len(tasks) == 12 * 4 * 2
    assert len({task.seed for task in tasks}) == len(tasks)
    # Stories may begin alike by chance; two random or edited texts of the same tokens never do.
    made = [task.prompt_ids + task.script for task in tasks if task.script]
    assert len(set(made)) == len(made) == 8 * 4 * 2
    begun = [task.prompt_ids for task in tasks if not task.script]
    assert len(set(begun)) > 0.8 * len(begun)


def test_the_same_settings_give_the_same_tasks(all_work, pair):
    settings, work = all_work
    again = SweepWork(settings, Tokenizer.load(pair.target), INFO)
    for key in settings.cells:
        assert work.tasks(key, 1, 2) == again.tasks(key, 1, 2)
        assert again.tasks(key, 1, 3)[:2] == work.tasks(key, 1, 2)


def test_an_edit_repeats_its_text_but_for_some_words(all_work, pair):
    settings, work = all_work
    decode = Tokenizer.load(pair.target).decode
    for key in (key for key in settings.cells if key.workload is EDIT):
        for task in work.tasks(key, 0, 2):
            assert len(task.script) == settings.max_new_tokens == task.max_new_tokens
            text, said = decode(task.prompt_ids), decode(task.script)
            words, kept = text.split(), said.split()[:-1]  # the last word may be cut
            same = sum(ours == theirs for ours, theirs in zip(words, kept, strict=False))
            assert text != said.strip()
            assert same >= len(kept) - 2


def test_random_tokens_come_from_the_whole_vocabulary(all_work):
    _, work = all_work
    key = CellKey(RANDOM, 0.0, 2)
    tasks = [task for number in range(3) for task in work.tasks(key, number, 2)]
    token_ids = [token_id for task in tasks for token_id in task.prompt_ids + task.script]
    assert len(token_ids) == 6 * 92
    # 552 draws of 257: about 227 different ones; fewer than 190 are more than 8 deviations off.
    assert len(set(token_ids)) > 190
    assert max(token_ids) < 257


def test_edited_keeps_the_number_of_words():
    text = " ".join(f"word{number}" for number in range(60))
    for seed in range(20):
        words = edited(text, seed).split(" ")
        changed = sum(f"word{number}" != word for number, word in enumerate(words))
        assert (len(words), 1 <= changed <= 5) == (60, True)
    assert edited("alone", 0) == "alone"


@pytest.mark.parametrize(
    ("changes", "has_tokenizer", "message"),
    [
        ({"max_new_tokens": 65}, True, "need a context of 130 tokens; the model's holds 128"),
        ({"workloads": (RANDOM, EDIT)}, False, "the model has no tokenizer"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused(
    sweep_settings, pair, changes, has_tokenizer, message
):
    tokenizer = Tokenizer.load(pair.target) if has_tokenizer else None
    with pytest.raises(ConfigError, match=message):
        SweepWork(sweep_settings(**changes), tokenizer, INFO)


def test_random_tokens_need_no_tokenizer(sweep_settings):
    settings = sweep_settings()
    [task] = SweepWork(settings, None, INFO).tasks(settings.cells[0], 0, 1)
    assert (len(task.prompt_ids), len(task.script)) == (32, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafters": ()}, "a sweep compares drafters; got none"),
        ({"rounds": 3, "max_rounds": 2}, "max_rounds is at least rounds, 3; got 2"),
        ({"width": 0.0}, "width is a part of a ratio, > 0; got 0.0"),
        ({"least_seconds": -1.0}, r"least_seconds is in \[0, 600\]; got -1.0"),
        ({"least_seconds": float("nan")}, "least_seconds is in"),
    ],
)
def test_settings_are_checked(sweep_settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        sweep_settings(**changes)


# -- rounds --------------------------------------------------------------------------------------


class TimedHost:
    """Takes the seconds it is told, in turn, and counts its calls; may say other tokens."""

    def __init__(self, seconds, token_id=1):
        self.seconds, self.token_id, self.num_runs = seconds, token_id, 0

    def run(self, tasks, *, batch_size, speculative):
        seconds = self.seconds[max(0, self.num_runs - 1) % len(self.seconds)]  # 0: warm-up
        self.num_runs += 1
        output = PeerOutput(token_ids=[self.token_id] * 6, seconds=seconds, num_steps=3)
        return Turn(outputs=[output] * len(tasks), unit_s=[seconds])

    def run_in_parts(self, tasks, *, num_parts, speculative):
        for _ in range(num_parts - 1):
            yield Turn(outputs=[], unit_s=[0.0])
        yield self.run(tasks, batch_size=len(tasks), speculative=speculative)


class SteadyHost:
    """Takes so many seconds for a batch, and remembers what it was asked and when."""

    def __init__(self, batch_s, calls=None, *, cpu_s=None, warm_up=0):
        self.batch_s, self.cpu_s, self.num_cold = batch_s, cpu_s, warm_up
        self.calls = [] if calls is None else calls

    def run(self, tasks, *, batch_size, speculative):
        self.calls.append((self, [task.seed for task in tasks]))
        assert len(tasks) % batch_size == 0
        num_batches = len(tasks) // batch_size
        seconds = [self.batch_s] * num_batches
        if self.num_cold:
            self.num_cold -= 1
            seconds[0] *= 50
        output = PeerOutput(token_ids=[1] * 6, seconds=0.0, num_steps=3)
        cpu_s = None if self.cpu_s is None else self.cpu_s * num_batches
        return Turn(outputs=[output] * len(tasks), unit_s=seconds, cpu_s=cpu_s)

    def run_in_parts(self, tasks, *, num_parts, speculative):
        whole = self.run(tasks, batch_size=len(tasks), speculative=speculative)
        for part in range(num_parts):
            if part:
                self.calls.append((self, []))
            yield Turn(
                outputs=whole.outputs if part == num_parts - 1 else [],
                unit_s=[seconds / num_parts for seconds in whole.unit_s],
                cpu_s=None if whole.cpu_s is None else whole.cpu_s / num_parts,
            )


class AnyWork:
    def tasks(self, key, round_number, num_prompts):
        first = 1000 * round_number
        return [
            Task(prompt_ids=(5, 6), max_new_tokens=NUM_TOKENS, temperature=0.0, seed=first + number)
            for number in range(num_prompts)
        ]


def measured(settings, key=None, **hosts):
    systems = [
        PausingSystem(name.replace("_", " "), "plain", host, is_peer=False)
        for name, host in hosts.items()
    ]
    key = key or settings.cells[0]
    rounds = measure(key, systems, AnyWork(), settings, lambda *_: None)
    return as_entry(key, rounds)


def test_a_big_model_has_no_more_work_than_asked_for():
    least = Schedule.least(batch_size=2, num_prompts=5)
    schedule = least.fitted(batch_s=3.0, least_s=1.0, num_tokens=64)
    assert schedule.num_prompts == 6  # whole batches
    assert [len(part) for part in schedule.slices(range(6))] == [2, 2, 2]
    # The others have their turns while a batch is being made, but for a step with drafts at least.
    assert (schedule.batches_per_lap, schedule.turns_per_lap) == (1, 64 // 4)
    assert least.fitted(batch_s=3.0, least_s=1.0, num_tokens=6).turns_per_lap == 1


@pytest.mark.parametrize("batch_s", [0.0004, 0.003, 0.026, 0.04, 0.07, 0.2, 0.3])
def test_a_small_model_has_work_for_the_time_asked_for(batch_s):
    least = Schedule.least(batch_size=4, num_prompts=8)
    schedule = least.fitted(batch_s, least_s=1.0, num_tokens=64)
    lap_s = schedule.batches_per_lap * batch_s
    assert 0.67 * TURN_S < lap_s / schedule.turns_per_lap < 1.5 * TURN_S
    slice_s = lap_s * schedule.laps_per_slice
    assert SLICE_S / 2 < slice_s <= 1.5 * SLICE_S
    assert 1.0 <= schedule.batches_per_round * batch_s < 1.0 + slice_s
    slices = schedule.slices(range(schedule.num_prompts))
    assert {len(schedule.laps(part)) for part in slices} == {schedule.laps_per_slice}
    assert schedule.laps_per_slice * schedule.turns_per_lap % 2 == 0


def test_every_order_comes_with_its_reverse():
    laps = orders("abcd", seed=3)
    drawn = ["".join(next(laps)) for _ in range(400)]
    assert all(sorted(order) == list("abcd") for order in drawn)
    assert drawn[1::2] == [order[::-1] for order in drawn[::2]]
    again = orders("abcd", seed=3)
    assert drawn == ["".join(next(again)) for _ in range(400)]


def test_everybody_comes_after_everybody_else():
    """In a cycle one always comes after the largest, whose work has filled the caches."""
    laps = orders("abcd", seed=0)
    turns = "".join("".join(next(laps)) for _ in range(4000))
    pairs = Counter(itertools.pairwise(turns))
    # 12 pairs share 12000 places within laps, and all 16 the 2000 before a drawn order; who is
    # last before a reverse is first in it.
    for count in (pairs[pair] for pair in itertools.permutations("abcd", 2)):
        assert 900 < count < 1350
    assert all(500 < pairs[name, name] < 750 for name in "abcd")


def test_systems_take_short_turns_with_the_same_prompts(sweep_settings):
    calls = []
    fast, slow = SteadyHost(0.1, calls), SteadyHost(0.2, calls)
    settings = sweep_settings(rounds=2, max_rounds=2, least_seconds=1.5, batch_sizes=(3,))
    entry = measured(settings, plain=fast, slow=slow)
    assert entry["systems"]["slow"]["speed_up"]["median"] == 0.5
    # A turn is two batches, a slice two turns: four slices make the second and a half full.
    assert (entry["num_rounds"], entry["num_slices"]) == (2, 2 * 4)
    assert entry["num_prompts_per_round"] == 4 * 2 * 2 * 3
    assert entry["num_tokens_per_round"] == 6 * entry["num_prompts_per_round"]
    ours = [seeds for host, seeds in calls if host is fast]
    assert ours == [seeds for host, seeds in calls if host is slow]
    seen = [seed for seeds in ours for seed in seeds]
    assert len(set(seen)) == len(seen)  # no prompt twice, warm-ups included
    places = [host is fast for host, _ in calls]
    assert all(sum(places[lap : lap + 2]) == 1 for lap in range(0, len(places), 2))


def test_a_long_batch_is_divided_so_that_others_come_in_between(sweep_settings):
    calls = []
    fast, slow = SteadyHost(0.8, calls), SteadyHost(1.6, calls)
    settings = sweep_settings(least_seconds=2.0, batch_sizes=(3,), max_new_tokens=64)
    entry = measured(settings, plain=fast, slow=slow)
    assert entry["systems"]["slow"]["speed_up"]["median"] == pytest.approx(0.5)
    # Three batches make the two seconds full, each a slice of four turns.
    assert (entry["num_prompts_per_round"], entry["num_slices"]) == (9, 3)
    assert entry["num_tokens_per_round"] == NUM_TOKENS * 9
    turns = [host is fast for host, _ in calls[2:]]  # after the first, undivided warm-up
    assert len(turns) == 2 * 4 * (3 + 3)  # with the second warm-up
    assert all(sum(turns[lap : lap + 2]) == 1 for lap in range(0, len(turns), 2))


def test_a_cold_start_does_not_shorten_the_rounds(sweep_settings):
    """The first batch compiles code; what it takes says nothing of the others."""
    settings = sweep_settings(least_seconds=0.5)
    cold = measured(settings, plain=SteadyHost(0.02, warm_up=1), plain_again=SteadyHost(0.02))
    warm = measured(settings, plain=SteadyHost(0.02), plain_again=SteadyHost(0.02))
    assert cold["num_prompts_per_round"] == warm["num_prompts_per_round"] > 1


def test_the_second_plain_engine_says_what_cannot_be_resolved(sweep_settings):
    settings = sweep_settings(rounds=2, max_rounds=2)
    hosts = {"plain": TimedHost([1.0]), "good": TimedHost([0.5]), "auto": TimedHost([1.2])}
    entry = measured(settings, **hosts, plain_again=TimedHost([1.25]))
    assert list(entry["systems"]) == ["plain", "good", "auto"]
    assert entry["plain_again"]["median"] == 0.8
    assert resolution({"cells": [entry]}) == (pytest.approx(0.2), pytest.approx(0.2))
    assert not entry["goals"]["plain"]["holds"]
    assert not entry["goals"]["plain"]["is_clear"]  # 0.94, where doing the same gives 0.8
    assert entry["goals"]["best_fixed"]["is_clear"]
    alone = measured(settings, **hosts)
    assert "plain_again" not in alone
    assert resolution({"cells": [alone]}) is None
    assert alone["goals"]["plain"]["is_clear"]


def test_plain_decoding_takes_what_its_two_engines_take_in_the_mean(sweep_settings):
    """One of them alone has its own luck, and every ratio would have it."""
    settings = sweep_settings(rounds=2, max_rounds=2)
    plain, again = SteadyHost(1.0, cpu_s=1.0), SteadyHost(1.5, cpu_s=2.0)
    hosts = {"good": SteadyHost(1.0, cpu_s=1.0), "auto": SteadyHost(1.25, cpu_s=1.5)}
    entry = measured(settings, plain=plain, **hosts, plain_again=again)
    assert entry["systems"]["good"]["speed_up"]["median"] == 1.25
    assert entry["best_fixed"] == "good"  # which the first engine alone would not have said
    goal = entry["goals"]["plain"]
    assert (goal["median"], goal["cpu"]["median"]) == (1.0, 1.0)
    assert entry["plain_again"]["seconds"] == [1.5, 1.5]
    assert entry["systems"]["plain"]["seconds"] == [1.0, 1.0]


def test_processor_time_is_told_beside_the_walls(sweep_settings):
    """A neighbour who takes the processor makes a turn longer, not its processor time."""
    plain, auto = SteadyHost(1.0, cpu_s=1.0), SteadyHost(1.25, cpu_s=1.0)
    entry = measured(sweep_settings(), plain=plain, other=SteadyHost(2.0, cpu_s=2.0), auto=auto)
    goal = entry["goals"]["plain"]
    assert (goal["median"], goal["cpu"]["median"]) == (0.8, 1.0)
    assert (goal["holds"], goal["holds_by_cpu"]) == (False, True)
    assert entry["systems"]["auto"]["cpu_seconds"] == [1.0]
    uncounted = measured(sweep_settings(), plain=SteadyHost(1.0), auto=SteadyHost(1.0))
    assert "cpu" not in uncounted["goals"]["plain"]
    assert "cpu_seconds" not in uncounted["systems"]["auto"]


def test_rounds_end_when_the_ratios_are_known(sweep_settings):
    settings = sweep_settings(rounds=3, max_rounds=9)
    plain = TimedHost([2.0, 4.0, 3.0])  # paired ratios do not care for a machine that is slower
    entry = measured(settings, plain=plain, slow=TimedHost([4.0, 8.0, 6.0]))
    assert entry["num_rounds"] == 3
    assert plain.num_runs == 4  # with the warm-up
    ratio = entry["systems"]["slow"]["speed_up"]
    assert (ratio["median"], ratio["interval_95"], ratio["against"]) == (0.5, [0.5, 0.5], "plain")
    assert (entry["best_fixed"], "goals" in entry) == ("plain", False)


def test_noise_asks_for_more_rounds_up_to_a_limit(sweep_settings):
    settings = sweep_settings(rounds=2, max_rounds=7)
    noisy = [1.0, 2.0, 1.1, 1.7, 0.9, 1.4, 1.2]
    entry = measured(settings, plain=TimedHost([2.0]), noisy=TimedHost(noisy))
    assert entry["num_rounds"] == 7
    assert entry["systems"]["noisy"]["seconds"] == noisy
    wide = sweep_settings(rounds=2, max_rounds=7, width=9.0)
    entry = measured(wide, plain=TimedHost([2.0]), noisy=TimedHost(noisy))
    assert entry["num_rounds"] == 2


def test_what_cannot_be_the_best_has_no_turns_in_further_rounds(sweep_settings):
    settings = sweep_settings(rounds=5, max_rounds=8)
    noisy = [1.0, 1.2, 0.9, 1.1, 0.95]  # of which no number of rounds is enough
    hosts = {"near": TimedHost(noisy), "far": TimedHost([4.0]), "auto": TimedHost([1.0])}
    again = TimedHost([2.0])
    entry = measured(settings, plain=TimedHost([2.0]), **hosts, plain_again=again)
    assert entry["num_rounds"] == 8
    runs = {name: host.num_runs - 1 for name, host in hosts.items()}  # without the warm-up
    assert runs == {"near": 8, "far": 5, "auto": 8}
    assert again.num_runs - 1 == 8
    assert entry["systems"]["far"]["seconds"] == [4.0] * 5
    assert entry["systems"]["far"]["speed_up"]["median"] == 0.5
    assert entry["best_fixed"] == "near"
    # Which may be the first engine that decodes plainly, too.
    plain = {"plain": TimedHost(noisy), "plain_again": TimedHost(noisy)}
    entry = measured(settings, **plain, far=TimedHost([4.0]), auto=TimedHost(noisy[::-1]))
    assert (len(entry["systems"]["far"]["seconds"]), entry["num_rounds"]) == (5, 8)


def test_auto_is_held_against_plain_and_the_best(sweep_settings):
    settings = sweep_settings(rounds=2, max_rounds=2)
    hosts = {"plain": TimedHost([2.0]), "good": TimedHost([1.0]), "bad": TimedHost([4.0])}
    entry = measured(settings, **hosts, auto=TimedHost([1.1]))
    assert entry["best_fixed"] == "good"
    over_plain, over_best = entry["goals"]["plain"], entry["goals"]["best_fixed"]
    assert (over_plain["median"], over_plain["holds"]) == (pytest.approx(1.8182), True)
    assert (over_best["median"], over_best["holds"]) == (pytest.approx(0.90909), False)
    assert over_plain["is_clear"]
    assert over_best["is_clear"]
    record = {"cells": [entry]}
    assert wins(record) == {"good": 1}
    assert [title for title, _ in goals(record)] == [
        "auto is at least 0.98 × plain",
        "auto is at least 0.95 × best fixed",
    ]


def test_a_goal_within_the_noise_is_not_clear(sweep_settings):
    settings = sweep_settings(rounds=5, max_rounds=5)
    plain, auto = TimedHost([1.0]), TimedHost([1.0, 1.2, 0.8, 1.1, 0.9])
    entry = measured(settings, plain=plain, other=TimedHost([9.0]), auto=auto)
    assert entry["best_fixed"] == "plain"
    assert entry["goals"]["plain"]["holds"]
    assert not entry["goals"]["plain"]["is_clear"]


def test_a_best_method_may_be_one_of_several(sweep_settings):
    settings = sweep_settings(rounds=5, max_rounds=5)
    near, far = TimedHost([1.0, 0.8, 1.1, 0.9, 1.2]), TimedHost([1.6])
    best = TimedHost([0.98])
    assert is_close(measured(settings, plain=TimedHost([2.0]), best=best, near=near))
    assert not is_close(measured(settings, plain=TimedHost([2.0]), best=best, far=far))


def test_other_tokens_are_found(sweep_settings):
    hosts = {"plain": TimedHost([1.0]), "wrong": TimedHost([1.0], token_id=2)}
    [difference] = different_tokens({"cells": [measured(sweep_settings(), **hosts)]})
    assert (difference["system"], difference["token"], difference["text"]) == ("wrong", 0, [5, 6])


# -- whole sweeps --------------------------------------------------------------------------------


def whole(sweep_settings):
    return sweep_settings(
        workloads=tuple(Kind), batch_sizes=(2,), max_new_tokens=40, rounds=2, max_rounds=2
    )


@pytest.fixture(scope="module")
def record(sweep_settings):
    return run_sweep(whole(sweep_settings), ["foretoken", "bench", "sweep"])


def test_every_method_is_measured_in_every_cell(record):
    cells = record["cells"]
    assert [(it["workload"], it["temperature"], it["batch_size"]) for it in cells] == [
        (kind, temperature, 2) for kind in Kind for temperature in (0.0, 1.0)
    ]
    for cell in cells:
        assert list(cell["systems"]) == ["plain", "draft-model", "prompt-lookup", "auto"]
        assert all(sum(it["cpu_seconds"]) > 0 for it in cell["systems"].values())
        assert cell["plain_again"]["against"] == "plain"
        assert cell["num_tokens_per_round"] == 80
        assert cell["systems"]["plain"]["tokens_per_step"] == 1
        assert all(len(it["seconds"]) == 2 for it in cell["systems"].values())
    assert different_tokens(record) == []
    assert record["target"]["dtype"] == "float32"


def test_kinds_of_text_are_what_they_claim(record):
    """The draft is the target, so it knows all but the scripts; copying knows the edits alone."""
    steps = {
        (cell["workload"], name): cell["systems"][name]["tokens_per_step"]
        for cell in record["cells"]
        if cell["temperature"] == 0
        for name in ("draft-model", "prompt-lookup")
    }
    assert steps["story", "draft-model"] > 2
    assert steps["edit", "prompt-lookup"] > 2 > steps["edit", "draft-model"]
    assert steps["random", "prompt-lookup"] < 1.2
    assert steps["random", "draft-model"] < 1.2


def test_the_report_has_a_table_per_text_and_the_conclusions(record):
    out = io.StringIO()
    print_report(record, Console(file=out, width=120))
    text = out.getvalue()
    assert "story, greedy: speed of plain decoding [95 %]" in text
    assert "random, temperature 1: speed of plain decoding" in text
    assert "Which fixed method is best" in text
    assert "best fixed method: " in text
    assert "of 6 cells" in text
    assert "auto is at least 0.98 × plain: " in text
    assert text.count("plain, second engine") == text.count("auto, processor time") == 6
    assert "two engines that both decode plainly differ by up to" in text


def test_the_report_says_where_processor_time_says_otherwise(record):
    changed = json.loads(json.dumps(record))
    for cell in changed["cells"]:
        goal = cell["goals"]["plain"]
        goal["holds_by_cpu"] = not goal["holds"]
    out = io.StringIO()
    print_report(changed, Console(file=out, width=300))
    [line] = [line for line in out.getvalue().splitlines() if "0.98 × plain" in line]
    assert line.endswith("; processor time says otherwise in 6")


def test_all_methods_share_one_target_and_plain_has_no_drafters(sweep_settings, monkeypatch):
    engines = []

    class Watched(sweep_run.ForetokenHost):
        def __init__(self, spec, target):
            super().__init__(spec, target)
            engines.append(self._llm.engine)

    monkeypatch.setattr(sweep_run, "ForetokenHost", Watched)
    run_sweep(sweep_settings(temperatures=(0.0,), batch_sizes=(1,)), ["foretoken"])
    plain, model, again, lookup, auto = engines
    assert len({id(engine.parts.target) for engine in engines}) == 1
    assert len({id(engine.cache) for engine in engines}) == 5
    assert plain.drafters == again.drafters == {}
    assert "draft-model" in model.drafters.keys() & auto.drafters.keys()
    assert "prompt-lookup" in lookup.drafters.keys() & auto.drafters.keys()


def test_the_picture_is_drawn(record, tmp_path):
    pytest.importorskip("matplotlib")
    [path] = write_plots(record, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


class StopError(Exception):
    pass


def test_a_sweep_goes_on_where_it_was_cut_off(sweep_settings, tmp_path):
    def stop_in_the_third_cell(progress):
        if progress.done == 2:
            raise StopError

    with pytest.raises(StopError):
        run_sweep(sweep_settings(), ["foretoken"], tmp_path, stop_in_the_third_cell)
    before = json.loads((tmp_path / "record.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert len(before["cells"]) == 2
    seen = []
    record = run_sweep(sweep_settings(), ["foretoken"], tmp_path, seen.append)
    assert record["cells"][:2] == before["cells"]
    assert len(record["cells"]) == 4
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert [(it.done, it.total) for it in seen if it.is_resumed] == [(2, 4)]
    assert not any("batch 1, round" in it.detail for it in seen if "temperature 0" in it.detail)


def test_a_whole_record_needs_no_model(sweep_settings, record, tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr("foretoken.bench.sweep.run.load_model", None)
    assert run_sweep(whole(sweep_settings), ["foretoken"], tmp_path) == record


def test_a_record_of_other_settings_is_not_mixed_with(sweep_settings, tmp_path):
    settings = sweep_settings(temperatures=(0.0,), batch_sizes=(1,))
    first = run_sweep(settings, ["foretoken"], tmp_path)
    other = sweep_settings(temperatures=(0.0,), batch_sizes=(1,), seed=5)
    with pytest.raises(ConfigError, match="is of another run: seed 0, now 5"):
        run_sweep(other, ["foretoken"], tmp_path)
    record = run_sweep(other, ["foretoken"], tmp_path, begins_anew=True)
    assert record["settings"]["seed"] == 5
    assert first["settings"]["seed"] == 0


def test_a_record_of_an_earlier_format_is_not_mixed_with(sweep_settings, record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({**record, "format": 1}))
    with pytest.raises(ConfigError, match=r"has format 1, which .* this version writes 4"):
        run_sweep(whole(sweep_settings), ["foretoken"], tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"what": "foretoken bench"}'])
def test_what_is_no_record_of_a_sweep_is_refused(sweep_settings, tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ConfigError, match=r"record\.json .* cannot be continued"):
        run_sweep(sweep_settings(), ["foretoken"], tmp_path)


def test_a_method_that_fails_ends_the_sweep_with_its_record(sweep_settings, tmp_path, monkeypatch):
    from foretoken.bench import foretoken_host

    calls = []
    run = foretoken_host.ForetokenHost.run

    def failing(self, tasks, **how):
        calls.append(how)
        if len(calls) > 12:  # a cell is 5 systems, once to warm up and once to count
            raise ForetokenError("broken", hint="mend it")
        return run(self, tasks, **how)

    monkeypatch.setattr(foretoken_host.ForetokenHost, "run", failing)
    with pytest.raises(ForetokenError, match="broken"):
        run_sweep(sweep_settings(), ["foretoken"], tmp_path)
    assert len(json.loads((tmp_path / "record.json").read_text())["cells"]) == 1


def test_progress_names_cell_round_and_method(sweep_settings):
    seen = SimpleNamespace(details=[])
    run_sweep(
        sweep_settings(temperatures=(0.0,), batch_sizes=(2,)),
        ["foretoken"],
        report=lambda progress: seen.details.append(progress.detail),
    )
    assert "loading auto" in seen.details
    assert "random, temperature 0, batch 2, round 1 of 1 to 1: prompt-lookup" in seen.details
    assert seen.details[-1] == "done"


def test_the_time_that_is_left_goes_by_cells_measured_now(monkeypatch):
    """Cells that were found took no time of this run."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("foretoken.bench.sweep.run.time.monotonic", lambda: now.seconds)
    left = sweep_run._TimeLeft(num_found=4, num_all=10)
    left.start()
    assert left.after(4) is None
    now.seconds += 30.0
    assert left.after(6) == 15.0 * 4
