"""`foretoken tune`: what is predicted from replays, what is measured, and what follows."""

import dataclasses
import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from foretoken.bench.tune.lab import Lab, Run
from foretoken.bench.tune.plots import write_plots
from foretoken.bench.tune.predict import Calibration, observe, predict
from foretoken.bench.tune.record import decide, make_record, winning_plan
from foretoken.bench.tune.report import markdown, print_report
from foretoken.bench.tune.run import Tuner
from foretoken.bench.tune.settings import (
    AUTO,
    PLAIN,
    PLAIN_SETUP,
    Candidate,
    TunePrompt,
    TuneSettings,
    auto_plan,
    candidates,
)
from foretoken.core.params import SamplingParams
from foretoken.drafters import DRAFTERS
from foretoken.engine.llm import LLM
from foretoken.engine.stats import RequestStats
from foretoken.engine.step_log import DraftRecord, StepRecord
from foretoken.errors import ConfigError, UnknownNameError
from foretoken.models.loading import load_model
from foretoken.planner.base import StepTimes
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_measure import measure_cost
from foretoken.planner.plan import Plan

TEXTS = ["the end of the end of the", "once upon", "a b a b a b"]


@pytest.fixture(autouse=True)
def _quick_costs(monkeypatch):
    """Measure as few passes as possible: their times are not tested here."""
    monkeypatch.setattr("foretoken.bench.tune.run.COST_BUDGET_S", 0.01)


@pytest.fixture(scope="module")
def make_settings(pair):
    def make(**changes):
        params = changes.pop("params", SamplingParams(max_new_tokens=10))
        specs = changes.pop("specs", ("prompt-lookup", f"draft-model:path={pair.draft}"))
        prompts = [TunePrompt(prompt=text, params=params, place="test") for text in TEXTS]
        values = {
            "model": pair.target,
            "model_name": "target",
            "source": "test",
            "prompts": tuple(prompts),
            "candidates": candidates(specs, pair.target),
            "auto": auto_plan(specs),
            "max_nodes": (1, 3, 6),
            "batch_size": 1,
            "rounds": 2,
            "seed": 5,
            "dtype": "float64",
            "device": "cpu",
            "threads": 1,
        }
        return TuneSettings(**{**values, **changes})

    return make


@pytest.fixture(scope="module")
def tuned(make_settings):
    """Return a finished tuning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foretoken.bench.tune.run.COST_BUDGET_S", 0.01)
        return Tuner(make_settings()).run()


@pytest.fixture(scope="module")
def record(tuned):
    return make_record(tuned, ["foretoken", "tune"])


# -- predictions -------------------------------------------------------------------------------


def step(num_rows, *, draft_s, pass_s, other_s, num_tokens=1, has_prompt=False):
    times = StepTimes(draft_s={"d": draft_s}, pass_s=pass_s, total_s=draft_s + pass_s + other_s)
    draft = DraftRecord(request_id="r", nodes=(), num_tokens=num_tokens)
    return StepRecord(
        drafts=(draft,),
        num_rows=num_rows,
        num_keys=10,
        num_requests=1,
        has_prompt=has_prompt,
        times=times,
    )


def run_of(steps, *, outside_s=None):
    num_tokens = sum(it.num_tokens for it in steps)
    stats = RequestStats(num_tokens=num_tokens, num_steps=len(steps))
    total_s = sum(it.times.total_s for it in steps)
    return Run(
        steps=steps,
        stats=[stats],
        output_ids=[[0] * num_tokens],
        unit_s=[] if outside_s is None else [total_s + outside_s],
    )


def pass_ms(num_rows, num_keys, num_requests):
    return 2.0 + 0.5 * num_rows + 0.01 * num_keys * num_requests


LIVE = run_of(
    [
        step(9, draft_s=0.004, pass_s=0.090, other_s=0.002, has_prompt=True),
        step(4, draft_s=0.002, pass_s=0.0082, other_s=0.002, num_tokens=3),
        step(4, draft_s=0.002, pass_s=0.0082, other_s=0.002, num_tokens=2),
    ],
    outside_s=0.003,
)
PLAYED = run_of(
    [
        step(9, draft_s=0.002, pass_s=0.0, other_s=0.001, has_prompt=True),
        step(4, draft_s=0.001, pass_s=0.0, other_s=0.0005, num_tokens=3),
        step(4, draft_s=0.001, pass_s=0.0, other_s=0.0005, num_tokens=2),
    ]
)


def test_calibration_is_live_over_replayed():
    it = Calibration.of(LIVE, PLAYED, pass_ms)
    assert it.draft == pytest.approx(2.0)
    assert it.other == pytest.approx(3.0)
    assert it.target == pytest.approx(8.2 / (2.0 + 2.0 + 0.1))
    assert it.outside_s == pytest.approx(0.001)


def test_a_calibrated_replay_of_the_same_steps_takes_what_live_took():
    calibration = Calibration.of(LIVE, PLAYED, pass_ms)
    predicted = predict(PLAYED, pass_ms, calibration, prompt_s=0.090)
    assert predicted.total_s == pytest.approx(sum(LIVE.unit_s))
    assert predicted.tokens_per_s == pytest.approx(6 / sum(LIVE.unit_s))
    assert observe(LIVE).total_s == pytest.approx(sum(LIVE.unit_s))
    assert observe(LIVE).target_s == pytest.approx(predicted.target_s)


def test_other_sizes_follow_their_own_steps_and_the_curve():
    calibration = Calibration(draft=2.0, other=3.0, target=1.5, outside_s=0.001)
    larger = run_of(
        [
            step(9, draft_s=0.002, pass_s=0.0, other_s=0.001, has_prompt=True),
            step(8, draft_s=0.003, pass_s=0.0, other_s=0.001, num_tokens=5),
        ]
    )
    predicted = predict(larger, pass_ms, calibration, prompt_s=0.09)
    assert predicted.prompt_s == 0.09
    assert predicted.target_s == pytest.approx(0.001 * 1.5 * (2.0 + 4.0 + 0.1))
    assert predicted.draft_s == pytest.approx(2.0 * 0.005)
    assert predicted.other_s == pytest.approx(3.0 * 0.002 + 2 * 0.001)
    assert predicted.step_ms == pytest.approx(1000 * (predicted.total_s - 0.09) / 2)


def test_live_steps_that_differ_are_compared_on_average():
    """A target that is not bitwise may say something else live, in more steps."""
    longer = run_of(
        [*LIVE.steps, step(4, draft_s=0.002, pass_s=0.0082, other_s=0.002)], outside_s=0.004
    )
    it = Calibration.of(longer, PLAYED, pass_ms)
    assert it.draft == pytest.approx(3 / 4 * 0.010 / 0.004)
    assert it.target == pytest.approx(8.2 / 4.1)


# -- what is considered ------------------------------------------------------------------------


def test_candidates_are_named_apart():
    specs = ("prompt-lookup", "prompt-lookup:max_ngram=2", "suffix")
    found = candidates(specs, "anything")
    assert [it.name for it in found] == ["prompt-lookup", "prompt-lookup#2", "suffix"]
    assert found[1].setup(4).plan == Plan(
        drafters=("prompt-lookup:max_ngram=2",), max_nodes=4, adaptive=False
    )


def test_without_names_what_suits_the_model_is_considered():
    names = [it.name for it in candidates((), "stories")]
    assert names[:2] == ["prompt-lookup", "suffix"]
    assert names[-1] == "draft-model"
    assert all(name in DRAFTERS for name in names)
    draft = candidates((), "stories")[-1]
    assert "max_nodes" not in draft.spec  # sizes are what is to be found out
    assert "draft-model" not in [it.name for it in candidates((), "some/model")]
    assert auto_plan(()).drafters == ("auto",)
    assert auto_plan(("suffix",)) == Plan(drafters=("suffix",), adaptive=True)


def test_unknown_drafters_and_no_sizes_are_refused(make_settings):
    with pytest.raises(UnknownNameError, match="prompt-lokup"):
        candidates(("prompt-lokup",), "stories")
    with pytest.raises(ConfigError, match="integers >= 1"):
        Tuner(make_settings(max_nodes=()))


def test_prompts_that_do_not_fit_are_left_out(make_settings):
    settings = make_settings()
    long = TunePrompt(prompt="x" * 500, params=SamplingParams(), place="test")
    lab = Lab(dataclasses.replace(settings, prompts=(long, *settings.prompts)))
    assert len(lab.prompts) == 3
    assert [it.seed for it in lab.prompts] == [6, 7, 8]  # by place, whatever is left out
    with pytest.raises(ConfigError, match="no prompt of test fits"):
        Lab(dataclasses.replace(settings, prompts=(long,)))


# -- the whole of it ---------------------------------------------------------------------------


def test_every_way_says_what_plain_decoding_says(tuned):
    assert tuned.is_finished
    names = [it.setup.name for it in tuned.measured]
    assert names[0] == PLAIN
    assert names[-1] == AUTO
    assert len(names) == 4
    for it in tuned.measured:
        assert len(it.rounds) == 2
        for run in it.rounds:
            assert run.output_ids == tuned.plain.output_ids
            assert len(run.unit_s) == len(TEXTS)


def test_replays_take_the_steps_of_the_rounds(tuned):
    sizes = {size.setup.name: size for it in tuned.candidates for size in it.sizes}
    for it in tuned.measured[1:-1]:
        played = sizes[it.setup.name].run
        for run in it.rounds:
            assert [stats.num_steps for stats in run.stats] == [
                stats.num_steps for stats in played.stats
            ]
            assert run.tokens_per_step == played.tokens_per_step


def test_the_choice_is_the_greatest_prediction(tuned):
    rates = {PLAIN: tuned.plain_prediction.tokens_per_s}
    for it in tuned.candidates:
        for size in it.sizes:
            rates[size.setup.name] = size.prediction.tokens_per_s
    assert tuned.chosen.name == max(rates, key=rates.get)
    assert len(rates) == 1 + 2 * 3


def test_sampled_batches_say_the_same_and_replay_the_same(make_settings):
    params = SamplingParams(max_new_tokens=8, temperature=0.7, top_k=20)
    result = Tuner(make_settings(params=params, batch_size=2, rounds=1, max_nodes=(4,))).run()
    assert [len(it.rounds[0].unit_s) for it in result.measured] == [2] * 4
    for it in result.measured:
        assert it.rounds[0].output_ids == result.plain.output_ids
    for known, it in zip(result.candidates, result.measured[1:-1], strict=True):
        assert known.sizes[0].run.tokens_per_step == it.rounds[0].tokens_per_step


def test_drafters_that_need_the_target_run_live(make_settings):
    result = Tuner(make_settings(specs=("token-recycling",), rounds=1, max_nodes=(2, 4))).run()
    [known] = result.candidates
    assert known.calibration is None
    assert known.num_changed == 0
    assert [len(size.run.unit_s) for size in known.sizes] == [3, 3]
    entry = make_record(result, ["foretoken", "tune"])["candidates"][0]
    assert entry["how"] == "live"
    assert "calibration" not in entry


class VirtualMachine:
    """A clock that only passes of models move, so that times are exact and tests not slow.

    A pass of the target takes 6 ms and 0.5 ms a row. One of the draft model takes 0.5 ms and 0.1 ms
    a row, and 0.5 ms more after one of the target, which has taken its place in the caches: so
    replays look better than life. Looking at the clock takes 20 µs, which stands for the rest.
    """

    def __init__(self):
        self.now_s = 0.0
        self.was_target = False

    def clock(self):
        self.now_s += 20e-6
        return self.now_s

    def load(self, role, *arguments, **more):
        model = load_model(*arguments, **more)
        forward = model.forward

        def timed(batch, rows, **options):
            ms = 6 + 0.5 * batch.num_rows
            if role == "draft":
                ms = 0.5 + 0.1 * batch.num_rows + 0.5 * self.was_target
            self.now_s += ms / 1000
            self.was_target = role == "target"
            return forward(batch, rows, **options)

        model.forward = timed
        return model


@pytest.fixture
def virtual_machine(monkeypatch):
    machine = VirtualMachine()
    for place in ("foretoken.engine.step", "foretoken.planner.adaptive"):
        monkeypatch.setattr(f"{place}.perf_counter", machine.clock)
    monkeypatch.setattr(
        "foretoken.bench.tune.lab.time", SimpleNamespace(perf_counter=machine.clock)
    )
    monkeypatch.setattr(
        "foretoken.bench.tune.run.measure_cost",
        lambda model, **more: measure_cost(model, **more, clock=machine.clock),
    )
    for role, place in (("target", "bench.tune.lab"), ("draft", "drafters.draft_model")):
        monkeypatch.setattr(f"foretoken.{place}.load_model", partial(machine.load, role))
    return machine


@pytest.mark.usefixtures("virtual_machine")
def test_predictions_hold(make_settings):
    """What the report promises: 10 % for the chosen way, 20 % for the others."""
    settings = make_settings(params=SamplingParams(max_new_tokens=16), rounds=1)
    record = make_record(Tuner(settings).run(), ["foretoken", "tune"])
    curve = CostCurve.from_dict(record["cost_ms"]["target"])
    assert curve.pass_ms(4, 16) == pytest.approx(8.0, rel=0.02)
    plain, *drafting, auto = record["measured"]
    for it in drafting:
        assert abs(it["error"]) < (0.1 if it["name"] == record["predicted_best"] else 0.2)
        assert it["error_with_drift"] == pytest.approx(it["error"], abs=1e-3)
    # The draft model is the target itself: its first guesses are all right.
    assert record["predicted_best"] == record["winner"]
    assert record["winner"].startswith("draft-model")
    assert auto["tokens_per_s"]["median"] > plain["tokens_per_s"]["median"]
    # A replay alone would have been too good.
    calibration = record["candidates"][1]["calibration"]
    assert calibration["draft"] > 1.05
    assert calibration["target"] == pytest.approx(1.0, rel=0.05)


def test_the_plan_is_taken_by_llm_and_says_the_same(tuned, record, tmp_path, pair):
    path = tmp_path / "plan.json"
    for name in ("prompt-lookup ≤3", "draft-model ≤6", PLAIN, AUTO):
        plan = winning_plan(tuned, name)
        path.write_text(json.dumps(dataclasses.asdict(plan)))
        loaded = Plan.load(path)
        assert loaded == plan
        llm = LLM(
            pair.target,
            drafters=loaded.drafters,
            max_nodes=loaded.max_nodes,
            adaptive=loaded.adaptive,
            dtype="float64",
        )
        [output] = llm.generate(TEXTS[0], SamplingParams(max_new_tokens=10))
        assert output.token_ids == tuned.plain.output_ids[0]
        llm.close()
    assert winning_plan(tuned, record["winner"]) is not None
    assert winning_plan(tuned, None) is None


def test_the_record_is_json_and_names_no_folder(record, pair):
    text = json.dumps(record, allow_nan=False)
    assert str(Path(pair.target).parent) not in text
    assert record["is_finished"]
    assert record["settings"]["drafters"] == ["prompt-lookup", "draft-model:path=draft"]
    measured = {entry["name"]: entry for entry in record["measured"]}
    assert measured[PLAIN]["error"] == 0
    best = measured[record["candidates"][0]["best"]]
    error = best["predicted_speed_up"] / best["speed_up"]["median"] - 1
    assert best["error"] == pytest.approx(error, abs=1e-3)


def test_a_perfect_draft_model_is_seen_as_one(record):
    """The pair on disk is one model twice, so every first guess is taken, at every depth."""
    draft = record["candidates"][1]
    first = draft["acceptance_by_depth"]["1"]
    assert first["rate"] == 1.0
    assert first["count"] > 3
    assert draft["acceptance_by_rank"]["0"]["rate"] == 1.0
    assert draft["best_static_tree"]["expected_tokens_per_step"] == pytest.approx(
        draft["best_static_tree"]["depth"] + 1
    )


def test_report_for_terminal_and_markdown_say_the_same(record):
    text = io.StringIO()
    print_report(record, Console(file=text, width=200))
    shown, written = text.getvalue(), markdown(record, ["cost.png"])
    for report in (shown, written):
        assert record["verdict"] in report
        assert "prompt-lookup ≤3" in report
        assert "What was measured" in report
    assert "![cost](cost.png)" in written
    rows = [line for line in written.splitlines() if line.startswith("| draft-model ≤")]
    assert len(rows) == 3 + any("draft-model" in it["name"] for it in record["measured"])


def test_pictures_are_drawn(record, tmp_path):
    pytest.importorskip("matplotlib")
    paths = write_plots(record, tmp_path)
    assert [path.name for path in paths] == ["cost.png", "acceptance.png", "predicted.png"]
    assert all(path.stat().st_size > 5_000 for path in paths)


# -- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "count", "num_candidates", "verdict"),
    [
        ("loading the model", 1, 0, "Interrupted before anything was known."),
        ("recording outputs", 3, 0, "Interrupted before anything was known."),
        ("replaying draft-model", 2, 1, "is predicted to make"),
        ("measuring", 5, 2, "is predicted to make"),
        ("measuring", 14, 2, "Interrupted; so far: "),
    ],
)
def test_what_is_finished_stands_when_interrupted(
    make_settings, tmp_path, stage, count, num_candidates, verdict
):
    pytest.importorskip("matplotlib")
    seen = SimpleNamespace(count=0)

    def interrupt(progress):
        seen.count += progress.stage == stage
        if seen.count == count:
            raise KeyboardInterrupt

    tuner = Tuner(make_settings())
    with pytest.raises(KeyboardInterrupt):
        tuner.run(interrupt)
    record = make_record(tuner.result, ["foretoken", "tune"])
    assert not record["is_finished"]
    assert len(record["candidates"]) == num_candidates
    assert verdict in record["verdict"]
    assert (winning_plan(tuner.result, record["winner"]) is None) == ("before" in verdict)
    json.dumps(record, allow_nan=False)
    print_report(record, Console(file=io.StringIO()))
    markdown(record)
    write_plots(record, tmp_path)


# -- the verdict -------------------------------------------------------------------------------


def entry(name, median, low, high):
    return {"name": name, "speed_up": {"median": median, "interval_95": [low, high]}}


def finished():
    return SimpleNamespace(is_finished=True)


def test_the_fastest_way_is_recommended_if_it_beats_plain_beyond_doubt():
    measured = [{"name": PLAIN}, entry("a ≤4", 1.4, 1.3, 1.5), entry("b ≤2", 2.0, 1.6, 2.4)]
    assert decide(measured, finished()) == (
        "b ≤2",
        "Speculate with b ≤2: 2.00 times plain decoding's tokens per second [1.60, 2.40].",
    )


def test_plain_decoding_is_recommended_where_drafts_do_not_pay():
    slower = [{"name": PLAIN}, entry("a ≤4", 0.8, 0.7, 0.9)]
    winner, verdict = decide(slower, finished())
    assert winner == PLAIN
    assert verdict.startswith("Do not speculate: nothing is faster than plain decoding; the best")
    doubtful = [{"name": PLAIN}, entry("a ≤4", 1.1, 0.9, 1.3)]
    winner, verdict = decide(doubtful, finished())
    assert winner == PLAIN
    assert "nothing is beyond doubt faster" in verdict


def test_a_candidate_is_a_value():
    assert Candidate(name="a", spec="a").setup(2) == Candidate(name="a", spec="a").setup(2)
    assert PLAIN_SETUP.plan.node_limit == 0
