"""A run from prompts to report: resumable, and clear about what is wrong."""

import json

import pytest

from foretoken.assets import EMBEDDED
from foretoken.errors import ConfigError, ModelError, RequestError
from foretoken.training.boost_run import BoostSettings, run_boost
from tests.fakes import VOCAB_SIZE

PROMPTS = [[token_id, token_id + 9, 4] for token_id in range(8)]


def settings(models, **changes):
    values = {
        "model": str(models.target),
        "start": str(models.start),
        "pool_size": 2,
        "num_prompts": 10,
        "max_new_tokens": 6,
        "window": 2,
        "steps": 3,
        "batch_size": 4,
    }
    return BoostSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pool"
    return folder, run_boost(settings(models), PROMPTS, folder, provenance={"command": "x"})


def test_the_report_says_what_was_done(finished, models):
    folder, report = finished
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["command"] == "x"
    assert report["settings"]["model"] == "target"
    assert report["settings"]["start"] == "start"
    corpus = report["corpus"]
    assert corpus["num_held_out_texts"] == 4
    assert corpus["num_texts"] + corpus["num_left_out"] == 10
    assert [member["num_steps"] for member in report["members"]] == [3, 3]
    assert [pool["size"] for pool in report["held_out"]["pools"]] == [1, 2]
    assert "control" not in report["held_out"]["pools"][0]
    assert set(report["held_out"]["largest_pool_minus"]) == {"one model", "control"}
    assert str(models.target.parent) not in json.dumps(report)


def test_the_folder_holds_the_pool_and_the_control(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "settings.json", "prompts.jsonl", "corpus.jsonl", "draft-1", "draft-2", "control",
        "report.json",
    }  # fmt: skip
    assert [path.name for path in (folder / "control").iterdir()] == ["draft-2"]


def test_the_same_settings_train_nothing_again(finished, models, progress):
    folder, report = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = run_boost(
        settings(models),
        PROMPTS,
        folder,
        on_progress=progress.append,
        provenance={"command": "x"},
    )
    assert again == report
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    resumed = [report.stage for report in progress if report.is_resumed]
    assert resumed == [
        "writing prompts", "collecting outputs", "training draft-1", "training draft-2",
        "training control/draft-2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 3}, "window 2, now 3"),
        ({"seed": 7}, "seed 0, now 7"),
        ({"has_control": False}, "has_control true, now false"),
    ],
)
def test_other_settings_are_refused(finished, models, changes, message):
    with pytest.raises(ConfigError, match=f"run with other settings: {message}"):
        run_boost(settings(models, **changes), PROMPTS, finished[0])


def test_other_prompts_are_refused(finished, models):
    with pytest.raises(ConfigError, match="prompts_fingerprint"):
        run_boost(settings(models), PROMPTS[::-1], finished[0])


def test_without_control_there_is_none(models, tmp_path):
    report = run_boost(settings(models, has_control=False), PROMPTS, tmp_path / "pool")
    assert report["control_members"] == []
    assert set(report["held_out"]["largest_pool_minus"]) == {"one model"}
    assert not (tmp_path / "pool" / "control").exists()


def test_a_pool_of_one_is_compared_with_nothing(models, tmp_path):
    report = run_boost(settings(models, pool_size=1), PROMPTS, tmp_path / "pool")
    assert len(report["members"]) == 1
    assert report["control_members"] == [report["members"][0]]
    assert report["held_out"]["largest_pool_minus"] == {}


# -- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool_size": 0},
        {"num_prompts": 0},
        {"max_new_tokens": 0},
        {"window": 0},
        {"steps": 0},
        {"batch_size": -1},
        {"epochs": 0.0},
        {"learning_rate": float("inf")},
        {"temperature": -1.0},
        {"seed": -1},
    ],
)
def test_wrong_settings_name_themselves(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BoostSettings(**wrong)


def test_where_models_start(models, tmp_path):
    assert BoostSettings().start_directory() == EMBEDDED["stories"].draft
    assert BoostSettings(start=str(tmp_path)).start_directory() == tmp_path
    with pytest.raises(ConfigError, match="no included draft model for") as caught:
        BoostSettings(model=str(models.target)).start_directory()
    assert "--start DIR" in caught.value.hint
    with pytest.raises(ModelError, match="nowhere' does not exist"):
        BoostSettings(start="nowhere").start_directory()


def test_another_vocabulary_is_refused(models, tmp_path):
    with pytest.raises(
        ModelError, match=f"draft {VOCAB_SIZE + 3} tokens, target {VOCAB_SIZE}"
    ) as c:
        run_boost(settings(models, start=str(models.stranger)), PROMPTS, tmp_path / "pool")
    assert "of the target's own family" in c.value.hint
    assert list(tmp_path.iterdir()) == []


def test_texts_must_fit_both_models(models, tmp_path):
    with pytest.raises(RequestError):
        run_boost(settings(models), [*PROMPTS, [1] * 200], tmp_path / "long")
    short = settings(models, start=str(models.short), num_prompts=4, max_new_tokens=20)
    with pytest.raises(ConfigError, match="the model to train takes 16"):
        run_boost(short, PROMPTS, tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_one_prompt_is_not_enough(models, tmp_path):
    with pytest.raises(ConfigError, match="there are 1 prompts"):
        run_boost(settings(models), PROMPTS[:1], tmp_path / "pool")


def test_prompts_that_are_all_held_out_leave_nothing(models, tmp_path):
    with pytest.raises(ConfigError, match="no text is left to train on"):
        run_boost(settings(models, num_prompts=1), [PROMPTS[0]] * 2, tmp_path / "pool")


def test_a_folder_that_a_drafter_cannot_name_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="has a comma"):
        run_boost(settings(models), PROMPTS, tmp_path / "a,b")
