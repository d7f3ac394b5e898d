"""A run from prompts to a verified draft model: resumable, and clear about what is wrong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from foretoken import LLM, SamplingParams
from foretoken.errors import ConfigError, ModelError, RequestError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.trainable import load_trainable
from foretoken.training.draft.distil import Pace
from foretoken.training.draft.run import DraftMachine, DraftSettings, run_draft
from tests.fakes import VOCAB_SIZE
from tests.training.conftest import save_tiny
from tests.training.disks import small_disk

PROMPTS = [[token_id, token_id + 9, 4] for token_id in range(8)]
MACHINE = DraftMachine(device="cpu")
STAGES = ["collect", "design", "initialise", "pace", "distil", "forecast", "verify", "export"]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A target that has layers to prune."""
    return save_tiny(tmp_path_factory.mktemp("big") / "target", seed=5, num_hidden_layers=3)


@pytest.fixture
def settings(big):
    return DraftSettings(
        model=str(big),
        num_prompts=10,
        max_new_tokens=6,
        shape="layers=1",
        steps=60,
        batch_size=4,
        precision="float32",
    )


def run(settings, output, **more):
    return run_draft(settings, PROMPTS, output, machine=MACHINE, **more)


@pytest.fixture(scope="module")
def finished(big, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = DraftSettings(
        model=str(big),
        num_prompts=10,
        max_new_tokens=6,
        shape="layers=1",
        steps=60,
        batch_size=4,
        precision="float32",
    )
    return folder, run(settings, folder, provenance={"command": "x"})


def draft_weights(folder):
    return load_trainable(folder / "draft").module.state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# -- what comes out ------------------------------------------------------------------------------


def test_the_draft_is_a_model_directory_of_the_shape(finished, big):
    folder, _ = finished
    draft, target = load_trainable(folder / "draft"), load_trainable(big)
    assert DraftShape.of(draft.config) == replace(DraftShape.of(target.config), layers=1)
    text = (folder / "draft" / "README.md").read_text()
    assert "# Draft model for target" in text
    assert "tokens per step, forecast and served" in text
    assert "| outputs other than plain decoding's | 0 |" in text
    assert "{" not in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "corpus.jsonl", "draft", "prompts.jsonl", "report.json", "settings.json", "stages.json"
    ]  # fmt: skip


def test_served_with_the_draft_the_target_says_the_same(finished, big):
    params = [SamplingParams(max_new_tokens=9), SamplingParams(temperature=0.9, seed=3)]
    plain = LLM(str(big), drafters="none").generate(PROMPTS[:2], params)
    llm = LLM(str(big), drafters=f"draft-model:path={finished[0] / 'draft'}")
    drafted = llm.generate(PROMPTS[:2], params)
    assert [it.token_ids for it in drafted] == [it.token_ids for it in plain]
    assert sum(it.stats.num_steps for it in drafted) < sum(it.stats.num_steps for it in plain)


def test_the_report(finished, tmp_path):
    folder, report = finished
    assert report == json.loads((folder / "report.json").read_text())
    assert list(report["seconds"]) == STAGES
    assert report["command"] == "x"
    assert str(folder) not in json.dumps(report)
    assert report["design"]["chosen_by"] == "the user"
    assert report["initialise"]["num_parameters"] < 10_000
    assert report["collect"]["num_held_out_texts"] == 4
    distilled = report["distil"]
    assert distilled["num_steps"] == 60
    assert distilled["last_loss"] < distilled["first_loss"]
    held_out = distilled["held_out"]
    assert held_out["after"]["overlap"] > held_out["before"]["overlap"]
    assert report["verify"]["draft"]["num_different"] == 0
    # The target's arithmetic is exact, and so is a replay: the forecast of steps is, too.
    forecast = report["forecast"]["draft"]["tokens_per_step"]["value"]
    assert forecast == pytest.approx(report["verify"]["draft"]["tokens_per_step"], abs=5e-5)


def test_more_drafters_are_served_beside_it(settings, models, tmp_path):
    machine = DraftMachine(device="cpu", against={"lookup": "prompt-lookup"})
    report = run_draft(settings, PROMPTS, tmp_path / "run", machine=machine)
    assert list(report["verify"]) == ["plain", "draft", "lookup"]
    assert set(report["forecast"]) == {"plain", "draft", "lookup"}


def test_a_draft_of_fewer_tokens_from_scratch_on_policy(settings, big, tmp_path):
    chosen = replace(
        settings,
        shape=f"layers=2,hidden=8,heads=2,kv_heads=2,head_dim=4,vocab={VOCAB_SIZE // 2}",
        method="scratch",
        on_policy=0.5,
        loss="tvd++",
        temperature=0.8,
        steps=8,
    )
    report = run(chosen, tmp_path / "run")
    assert load_trainable(tmp_path / "run" / "draft").vocabulary.size == VOCAB_SIZE // 2
    assert report["verify"]["draft"]["num_different"] == 0


def test_without_a_shape_the_study_chooses(settings, tmp_path, monkeypatch):
    from foretoken.training.draft import maker

    plain, asked = maker.run_study, []

    def small_study(model, examples, study, *more):
        asked.append(study)
        small = replace(
            study,
            shapes=("layers=1", "layers=2"),
            rounds=1,
            timed_steps=2,
            num_trained=2,
            num_steps=2,
            lookahead=2,
        )
        return plain(model, examples, small, *more)

    monkeypatch.setattr(maker, "run_study", small_study)
    chosen = replace(settings, shape=None, loss="jsd", temperature=0.5, steps=3, seed=2)
    report = run(chosen, tmp_path / "run")
    assert report["design"]["chosen_by"] == "the shape study"
    draft = load_trainable(tmp_path / "run" / "draft")
    assert str(DraftShape.of(draft.config)) == report["design"]["shape"]
    [study] = asked
    assert (study.loss, study.temperature, study.seed, study.method) == ("jsd", 0.5, 2, "prune")


def test_a_time_budget_sets_the_steps_once(settings, tmp_path):
    report = run(replace(settings, steps=None, minutes=0.01), tmp_path / "run")
    pace = report["pace"]
    measured = Pace(pace["first_s"], pace["later_s"], pace["num_first"])
    assert pace["num_steps"] == measured.steps_within(0.6)
    assert report["distil"]["num_steps"] == pace["num_steps"]


# -- stopped and started again -------------------------------------------------------------------


class CrashError(Exception):
    """Stands for a crash."""


def stop_at(stage, done=1):
    def on_progress(progress):
        if progress.stage == stage and progress.done == done and not progress.is_resumed:
            raise CrashError

    return on_progress


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        ("writing prompts", 2),
        ("collecting outputs", 5),
        ("initialising", 0),
        ("initialising", 1),
        ("distilling", 55),
        ("distilling", 60),
        ("serving a few texts", 1),
        ("forecasting", 2),
        ("serving", 3),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    settings, finished, tmp_path, stage, done
):
    with pytest.raises(CrashError):
        run(settings, tmp_path / "run", on_progress=stop_at(stage, done))
    assert not (tmp_path / "run" / "report.json").exists()
    report = run(settings, tmp_path / "run")
    assert same(draft_weights(finished[0]), draft_weights(tmp_path / "run"))
    wanted = finished[1]["distil"]
    assert report["distil"] == wanted


def test_a_stop_while_the_draft_is_distilled_does_not_start_it_anew(settings, tmp_path, progress):
    with pytest.raises(CrashError):
        run(settings, tmp_path / "run", on_progress=stop_at("distilling", 55))
    run(settings, tmp_path / "run", on_progress=progress.append)
    steps = [it.done for it in progress if it.stage == "distilling" and not it.is_resumed]
    assert steps == list(range(51, 61))


def test_a_finished_run_does_nothing_again(settings, finished, tmp_path, progress):
    shutil.copytree(finished[0], tmp_path / "run")
    again = run(
        settings, tmp_path / "run", on_progress=progress.append, provenance={"command": "x"}
    )
    assert again == finished[1]
    assert all(it.is_resumed for it in progress)
    assert [it.stage for it in progress] == ["writing prompts", "collecting outputs", *STAGES[1:]]


def test_other_settings_are_refused(settings, finished):
    with pytest.raises(ConfigError, match=r'run with other settings: loss "forward-kl", now "tv"'):
        run(replace(settings, loss="tv"), finished[0])


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_prompts": 0},
        {"max_new_tokens": 0},
        {"steps": 0},
        {"batch_size": -1},
        {"minutes": 0.0},
        {"learning_rate": float("inf")},
        {"temperature": -1.0},
        {"on_policy": -0.1},
        {"seed": -1},
        {"precision": "int8"},
    ],
)
def test_wrong_settings_name_themselves(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DraftSettings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"loss": "mse"}, "no loss 'mse'"), ({"method": "guess"}, "begins by prune or scratch")],
)
def test_wrong_names_list_the_right_ones(wrong, message):
    with pytest.raises(ConfigError, match=message):
        DraftSettings(**wrong)


@pytest.mark.parametrize("shape", ["layers=9", "depth=2", "layers=none"])
def test_a_shape_that_is_none_is_refused_before_anything_is_written(settings, tmp_path, shape):
    with pytest.raises(ConfigError):
        run(replace(settings, shape=shape), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_target_that_is_not_there(settings, tmp_path):
    with pytest.raises((ModelError, ConfigError)):
        run(replace(settings, model=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_that_do_not_fit(settings, tmp_path):
    with pytest.raises(RequestError):
        run_draft(settings, [[1], [VOCAB_SIZE + 1]], tmp_path / "run", machine=MACHINE)
    with pytest.raises(ConfigError, match="there are 1 prompts"):
        run_draft(settings, [[1]], tmp_path / "run", machine=MACHINE)


def test_a_comma_in_the_folders_name_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="has a comma"):
        run(settings, tmp_path / "a,b")


def test_a_full_disk_stops_and_the_run_goes_on_when_there_is_room(settings, finished, tmp_path):
    with small_disk(20_000), pytest.raises(ConfigError, match="cannot be written") as caught:
        run(settings, tmp_path / "run")
    assert "goes on" in caught.value.hint
    run(settings, tmp_path / "run")
    assert same(draft_weights(finished[0]), draft_weights(tmp_path / "run"))


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(settings, tmp_path, monkeypatch):
    from foretoken.training.draft import distil as algorithm

    plain, calls = algorithm.distil_loss, []

    def spoiled(*arguments):
        calls.append(1)
        return plain(*arguments) * (torch.nan if len(calls) > 55 else 1.0)

    monkeypatch.setattr(algorithm, "distil_loss", spoiled)
    with pytest.raises(ConfigError, match=r"loss of step 56 is nan.*step 50 is kept"):
        run(settings, tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "draft.checkpoint", weights_only=True)
    assert len(kept["losses"]) == 50
