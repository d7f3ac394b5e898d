"""A run from texts to a measured model: what it leaves, and that kills do no harm."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from foretoken.errors import ConfigError, ModelError
from foretoken.models.loops import LoopShape
from foretoken.models.trainable import compile_layers, load_trainable
from foretoken.training.looped.documents import Split
from foretoken.training.looped.run import run_looped
from tests.training.conftest import save_tiny


class KilledError(Exception):
    """Stands for a kill."""


def kill_at(done):
    def on_progress(progress):
        if progress.stage == "training" and progress.done == done and not progress.is_resumed:
            raise KilledError

    return on_progress


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_and_says_what_it_knows(settings, split, tmp_path, like):
    report = run_looped(settings(steps=60), split, tmp_path / "run", provenance={"command": "x"})
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert report["command"] == "x"
    assert report["settings"]["model"] == Path(like).name
    assert str(tmp_path) not in json.dumps(report)
    assert report["texts"]["num_held_out_characters"] == sum(map(len, split.held_out))
    assert report["build"]["num_layers"] == 3
    assert report["build"]["num_stored"] == 1
    train = report["train"]
    assert train["num_steps"] == 60
    # A uniform guess among 257 bytes costs 5.5 nats; 3.9 at first and 1.6 at last were seen.
    assert train["first_loss"] > 3
    assert train["last_loss"] < 2
    history = report["history"]
    assert [entry["step"] for entry in history] == list(range(2, 61, 2))
    bits = [entry["bits_per_character"][-1] for entry in history]
    assert bits[-1] < 0.5 * bits[0]

    # The last word is about the model as it was saved.
    saved = load_trainable(tmp_path / "run" / "model")
    assert LoopShape.of(saved.config) == LoopShape(prelude=0, group=1, loops=3, coda=0)
    measured = report["measure"]
    # A token is a byte; the first of each text is given, and nothing ends them in this model.
    assert measured["num_tokens"] == sum(len(text) - 1 for text in split.held_out)
    assert len(measured["bits_per_character"]) == len(measured["agreement"]) == 3
    assert measured["agreement"][-1] == 1
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| 3 | {measured['bits_per_character'][-1]:.3f} | 100.0% |" in card
    assert "drafter speed" in card


@pytest.mark.parametrize("done", [1, 2, 3, 5, 6])
def test_killed_and_resumed_it_ends_with_the_same_bits(settings, split, tmp_path, done):
    """Steps 2, 4 and 6 have checkpoints; at each, the kill comes behind it."""
    whole = run_looped(settings(), split, tmp_path / "whole")
    with pytest.raises(KilledError):
        run_looped(settings(), split, tmp_path / "killed", on_progress=kill_at(done))
    assert not (tmp_path / "killed" / "report.json").exists()
    torch.manual_seed(99)  # another process starts with other random numbers
    resumed = run_looped(settings(), split, tmp_path / "killed")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert resumed["measure"] == whole["measure"]
    assert [it["step"] for it in resumed["history"]] == [2, 4, 6]


def test_killed_between_the_last_checkpoint_and_its_model(settings, split, tmp_path, monkeypatch):
    from foretoken.training.looped import run as module

    whole = run_looped(settings(), split, tmp_path / "whole")
    saved = []

    def save(model, folder, card):
        saved.append(folder)
        if len(saved) == 3:  # of steps 2, 4 and 6
            raise KilledError
        original(model, folder, card)

    original = module.save_trainable
    monkeypatch.setattr(module, "save_trainable", save)
    with pytest.raises(KilledError):
        run_looped(settings(), split, tmp_path / "killed")
    assert not same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    monkeypatch.undo()
    assert run_looped(settings(), split, tmp_path / "killed")["measure"] == whole["measure"]
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_finished_run_is_not_done_again(settings, split, tmp_path):
    first = run_looped(settings(), split, tmp_path / "run")
    stages = []
    again = run_looped(
        settings(), split, tmp_path / "run", on_progress=lambda it: stages.append(it.is_resumed)
    )
    assert again == first
    assert all(stages)


@pytest.mark.parametrize(("kind", "num_layers"), [("shallow", 4), ("deep", 8)])
def test_plain_kinds_are_llamas_to_compare_with(settings, split, tmp_path, kind, num_layers):
    shape = {"prelude": 1, "group": 2, "loops": 3, "coda": 1}
    report = run_looped(settings(kind=kind, **shape, steps=2), split, tmp_path / "run")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert module.config.model_type == "llama"
    assert module.config.num_hidden_layers == report["build"]["num_layers"] == num_layers
    assert report["build"]["num_stored"] == num_layers
    assert len(report["measure"]["agreement"]) == 1
    assert "drafter speed" not in (tmp_path / "run" / "model" / "README.md").read_text()


def test_shallow_and_shared_have_as_many_parameters(settings, split, tmp_path):
    reports = [
        run_looped(settings(kind=kind, steps=1), split, tmp_path / kind)
        for kind in ("shared", "shallow")
    ]
    counts = [report["build"]["num_parameters"] for report in reports]
    assert counts[0] == counts[1]
    assert [report["build"]["num_layers"] for report in reports] == [3, 1]


def test_an_embedding_may_be_copied(settings, split, tmp_path, like):
    asked = {"steps": 1, "learning_rate": 1e-9}
    run_looped(settings(copies_embedding=True, **asked), split, tmp_path / "copied")
    run_looped(settings(**asked), split, tmp_path / "random")
    theirs = load_trainable(like).embedding
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(weights(tmp_path / "copied")[name], theirs, atol=1e-6, rtol=0)
    assert (weights(tmp_path / "random")[name] - theirs).abs().max() > 0.1


def test_minutes_become_steps(settings, split, tmp_path):
    report = run_looped(settings(steps=None, minutes=1e-3), split, tmp_path / "run")
    pace = report["pace"]
    assert pace["num_steps"] == max(1, math.floor(0.06 / pace["step_s"]))
    assert report["train"]["num_steps"] == pace["num_steps"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own imports
def test_layers_can_be_compiled(like):
    model = load_trainable(like)
    compile_layers(model)
    assert all(layer._compiled_call_impl is not None for layer in model.module.model.layers)


def test_the_seed_and_the_optimizer_matter(settings, split, tmp_path):
    changes = ({}, {"seed": 1}, {"optimizer": "adamw"})
    for place, change in enumerate(changes):
        run_looped(settings(steps=2, **change), split, tmp_path / str(place))
    found = [weights(tmp_path / str(place)) for place in range(3)]
    assert not same(found[0], found[1])
    assert not same(found[0], found[2])


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "wide"}, "kind is shared, shallow, deep; got 'wide'"),
        ({"steps": 0}, "steps is an integer >= 1; got 0"),
        ({"context": 0}, "context is an integer >= 1; got 0"),
        ({"minutes": 0.0}, "minutes is a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is a number above 0"),
        ({"optimizer": "sgd"}, "optimizer is adamw or muon; got 'sgd'"),
        ({"precision": "int8"}, "precision is auto, float32 or bfloat16"),
        ({"depth_weights": "1,2"}, "or 3 numbers"),
        ({"seed": -1}, "seed is an integer >= 0"),
    ],
)
def test_settings_that_make_no_sense(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_loops_that_make_no_sense(settings):
    with pytest.raises(ModelError, match="group to be an integer of at least 1; got 0"):
        settings(group=0)


def test_an_embedding_of_another_width_cannot_be_copied(settings, split, tmp_path):
    with pytest.raises(ConfigError, match="embedding of 32 channels cannot be copied to 16"):
        run_looped(settings(copies_embedding=True, hidden=16), split, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer_has_no_tokens(settings, split, tmp_path):
    folder = save_tiny(tmp_path / "bare", seed=0)
    with pytest.raises(ModelError, match="'bare' has no tokenizer"):
        run_looped(settings(model=str(folder)), split, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_few_texts(settings, tmp_path):
    with pytest.raises(ConfigError, match="fewer than a step takes: 4 x 24"):
        run_looped(settings(), Split(["Short."], ["Shorter."]), tmp_path / "run")


def test_another_run_in_the_folder(settings, split, tmp_path):
    run_looped(settings(steps=1), split, tmp_path / "run")
    with pytest.raises(ConfigError, match="other settings: steps 1, now 2"):
        run_looped(settings(steps=2), split, tmp_path / "run")
    with pytest.raises(ConfigError, match="other settings: texts_fingerprint"):
        run_looped(settings(steps=1), Split(split.train[1:], split.held_out), tmp_path / "run")


def test_numbers_that_run_away(settings, split, tmp_path):
    with pytest.raises(ConfigError, match="training cannot go on"):
        run_looped(settings(steps=40, learning_rate=1e30), split, tmp_path / "run")
