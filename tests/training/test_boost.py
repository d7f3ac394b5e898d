"""Boost-tuning: what a window is, what is dropped, what the next model is trained on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from foretoken import SamplingParams
from foretoken.errors import ConfigError
from foretoken.models.trainable import load_trainable
from foretoken.training import boost
from foretoken.training.boost import (
    IGNORED,
    PoolConfig,
    PoolTrainer,
    all_windows,
    check_fit,
    choice_ranks,
    first_choices,
    labelled_batch,
    window_hits,
)
from foretoken.training.corpus import Example, collect, seeded
from foretoken.training.folder import RunFolder
from foretoken.training.loop import LoopConfig
from tests.fakes import greedy_ids

WINDOW = 3
CONFIG = PoolConfig(size=3, window=WINDOW, num_steps=6, batch_size=4, learning_rate=0.003, seed=0)
PROMPTS = [(token_id, token_id + 9) for token_id in range(12)]


class CrashError(Exception):
    """Stands for a crash."""


@pytest.fixture(scope="module")
def examples(target, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    params = seeded(SamplingParams(max_new_tokens=8), 0, len(PROMPTS))
    return collect(target, PROMPTS, params, path, stage="")


def trainer(examples, start, folder, config=CONFIG, **more):
    return PoolTrainer(examples, config, start, RunFolder(folder, {}), target="big", **more)


def marks(text):
    return torch.tensor([letter == "x" for letter in text])


# -- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "windows"),
    [("xxxxxx", "xx"), ("xx.xxx", ".x"), ("xxx.", "x."), ("xxxx", "xx"), ("x", "x"), (".xx", ".")],
)
def test_a_window_is_covered_when_all_its_tokens_are(hits, windows):
    assert torch.equal(window_hits(marks(hits), WINDOW), marks(windows))


def test_every_token_is_in_a_window():
    examples = [Example((1,), tuple(range(1, length + 1))) for length in (1, 3, 4, 7)]
    assert [len(windows) for windows in all_windows(examples, WINDOW)] == [1, 1, 2, 3]


def test_covered_means_that_the_greedy_continuation_is_the_window(models, examples):
    """The pass over the target's text decides what generating from every prefix would."""
    model = load_trainable(models.start)
    hits = first_choices(model, examples)
    num_covered = 0
    for example, hit in zip(examples, hits, strict=True):
        for place, is_covered in enumerate(window_hits(hit, 1).tolist()):
            prefix = example.prompt_ids + example.output_ids[:place]
            [said] = greedy_ids(model.module, prefix, 1)
            assert is_covered == (said == example.output_ids[place])
            num_covered += is_covered
    assert 0 < num_covered < sum(map(len, hits))


def test_the_target_covers_all_its_own_greedy_windows(models, examples):
    hits = first_choices(load_trainable(models.target), examples)
    assert all(bool(hit.all()) for hit in hits)


def test_ranks_count_the_tokens_before_and_ties_go_to_the_lowest_id(models, monkeypatch):
    model = load_trainable(models.start)
    logits = torch.zeros(1, 3, model.vocab_size)
    logits[0, 0, [4, 9]] = torch.tensor([2.0, 1.0])
    monkeypatch.setattr(model, "logits", lambda _ids: logits)
    [ranks] = choice_ranks(model, [Example((1,), (9, 5))])
    assert ranks.tolist() == [1, 5]  # behind 4; then behind 0 to 4, which are as likely


def test_scoring_one_text_at_a_time_gives_the_same(models, examples, monkeypatch):
    model = load_trainable(models.start)
    mixed = [*examples, Example((1, 2, 3, 4), (5,))]
    together = choice_ranks(model, mixed)
    monkeypatch.setattr(boost, "SCORING_LOGITS", 1)
    alone = choice_ranks(model, mixed)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_only_tokens_of_windows_that_are_left_have_labels():
    examples = [Example((1, 2), (3, 4, 5, 6)), Example((7,), (8, 9))]
    token_ids, labels = labelled_batch(
        examples, [marks(".x"), marks("x")], WINDOW, torch.device("cpu")
    )
    assert token_ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0]]
    no = IGNORED
    assert labels.tolist() == [[no, no, no, no, 6], [8, 9, no, no, no]]


# -- pools ---------------------------------------------------------------------------------------


def test_a_later_model_is_trained_on_what_is_left(models, examples, tmp_path, monkeypatch):
    seen = []
    batch = boost.labelled_batch

    def watched(texts, left, *rest):
        seen.append(list(zip(texts, left, strict=True)))
        return batch(texts, left, *rest)

    monkeypatch.setattr(boost, "labelled_batch", watched)
    pool = trainer(examples, models.start, tmp_path)
    members = pool.boosted()
    left = all_windows(examples, WINDOW)
    for number, member in enumerate(members):
        steps = seen[CONFIG.num_steps * number : CONFIG.num_steps * (number + 1)]
        wanted = dict(zip(examples, left, strict=True))
        for text, windows in (pair for step in steps for pair in step):
            assert windows.any()
            assert torch.equal(windows, wanted[text])
        assert member.record["num_windows_left"] == sum(int(w.sum()) for w in left)
        left = pool.drop_covered(left, member.path)
    num_left = [member.record["num_windows_left"] for member in members]
    assert num_left == sorted(num_left, reverse=True)
    assert num_left[0] == members[0].record["num_windows"] > num_left[1]


def test_a_pool_ends_when_nothing_is_left(models, examples, tmp_path):
    """The target itself, hardly moved, says all of its own windows."""
    config = PoolConfig(
        size=3, window=WINDOW, num_steps=1, batch_size=4, learning_rate=1e-9, seed=0
    )
    pool = trainer(examples, models.target, tmp_path, config)
    members = pool.boosted()
    assert [member.path.name for member in members] == ["draft-1"]
    assert pool.control(members) == members


def test_the_control_drops_nothing_and_starts_with_the_same_model(models, examples, tmp_path):
    pool = trainer(examples, models.start, tmp_path)
    boosted = pool.boosted()
    control = pool.control(boosted)
    assert control[0] is boosted[0]
    num_windows = boosted[0].record["num_windows"]
    assert [member.record["num_windows_left"] for member in control] == [num_windows] * 3
    assert {member.record["num_steps"] for member in [*boosted, *control]} == {6}
    weights = [load_file(member.path / "model.safetensors") for member in control]
    assert not same(weights[0], weights[1])
    assert not same(weights[1], weights[2])


@pytest.mark.parametrize("stop", [("training draft-1", 4), ("training draft-2", 5)])
def test_an_interrupted_pool_ends_with_the_same_bits(
    models, examples, tmp_path, stop, monkeypatch, progress
):
    monkeypatch.setattr(
        boost, "LoopConfig", lambda **values: LoopConfig(**values, num_checkpoint_steps=3)
    )
    whole = trainer(examples, models.start, tmp_path / "whole").boosted()

    def on_progress(report):
        if (report.stage, report.done) == stop:
            raise CrashError

    with pytest.raises(CrashError):
        trainer(examples, models.start, tmp_path / "cut", on_progress=on_progress).boosted()
    resumed = trainer(
        examples, models.start, tmp_path / "cut", on_progress=progress.append
    ).boosted()
    for one, other in zip(whole, resumed, strict=True):
        assert one.record == other.record
        for name in ("model.safetensors", "config.json", "README.md"):
            assert (one.path / name).read_bytes() == (other.path / name).read_bytes()
    found = [report.stage for report in progress if report.is_resumed]
    assert found == [f"training draft-{n}" for n in range(1, int(stop[0][-1]) + 1)]
    steps = [report.done for report in progress if report.stage == stop[0] and report.detail]
    assert steps == [4, 5, 6]
    assert list(tmp_path.rglob("*.checkpoint")) == []


def test_a_member_is_a_model_directory_with_card_and_record(models, examples, tmp_path):
    member = trainer(examples, models.start, tmp_path).boosted()[1]
    card = (member.path / "README.md").read_text()
    assert "number 2" not in card
    assert "draft-2 of a pool of 3" in card
    assert "--drafter draft-model:path=draft-1 --drafter draft-model:path=draft-2" in card
    assert str(tmp_path) not in card
    assert json.loads((member.path / "training_record.json").read_text()) == member.record
    assert load_trainable(member.path).vocab_size == load_trainable(models.start).vocab_size


def test_texts_longer_than_the_models_context_are_refused(models):
    model = load_trainable(models.short)
    check_fit(model, 16)
    with pytest.raises(ConfigError, match="may have 17 tokens; the model to train takes 16"):
        check_fit(model, 17)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)
