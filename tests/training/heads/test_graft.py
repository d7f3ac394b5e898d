"""The loss of grafts against its definition, and that it teaches."""

import json

import pytest
import torch

from foretoken.errors import ConfigError, ModelError, UnknownNameError
from foretoken.models.heads.files import TargetShape, target_tensors
from foretoken.training.heads.graft import draw_roots
from foretoken.training.heads.kinds import KINDS
from foretoken.training.heads.run import run_head
from foretoken.training.heads.settings import HeadSettings
from foretoken.training.losses import forward_kl, total_variation
from tests.heads import random_tensors, randomize, shape_of
from tests.training.heads.conftest import PROMPTS
from tests.training.heads.test_eagle_and_parallel import batch_of, num_taken

KIND = KINDS.load("graft")


@pytest.fixture
def graft(two_layers):
    options = {"layers": "2", "steps": "3"}
    module = KIND.build(shape_of(two_layers), target_tensors(str(two_layers)), options)
    return randomize(module).eval()


@pytest.fixture
def batch(texts):
    found = batch_of(texts.examples, texts.target)
    found.hidden[0] = torch.randn_like(found.hidden[1])  # any would do for what is tested here
    return found


@pytest.mark.parametrize("divergence", [forward_kl, total_variation])
def test_loss_is_what_its_definition_says(graft, batch, divergence):
    """The first draft reads tokens alone; then come drafts of three, each with its root."""
    found = []
    for text, position in batch.is_output.nonzero().tolist():
        row = position - 1  # which says the token at the position
        second = int(batch.is_output[text].int().argmax()) - 1 + 3
        root = 0 if row < second else row - (row - second) % 3
        roots = torch.full((1, row + 1), root)
        hidden = {layer: states[[text], : row + 1] for layer, states in batch.hidden.items()}
        said = graft.logits(graft(batch.token_ids[[text], : row + 1], hidden, roots))[0, -1]
        found.append(divergence(said, batch.logits[text, row]))
    torch.testing.assert_close(KIND.loss(graft, batch, divergence), torch.stack(found).mean())


def test_the_first_draft_ends_anywhere_in_training():
    says_output = torch.tensor([[False, True, True, True, True, True, True, True]])
    fixed = draw_roots(says_output, 3, is_random=False)
    assert fixed.tolist() == [[0, 0, 0, 0, 4, 4, 4, 7]]
    torch.manual_seed(0)
    drawn = {tuple(draw_roots(says_output, 3, is_random=True)[0].tolist()) for _ in range(30)}
    assert drawn == {  # the chance of fewer is 2e-5
        (0, 0, 2, 2, 2, 5, 5, 5),
        (0, 0, 0, 3, 3, 3, 6, 6),
        (0, 0, 0, 0, 4, 4, 4, 7),
    }


def test_every_parameter_learns(graft, batch):
    KIND.loss(graft, batch, forward_kl).backward()
    for name, parameter in graft.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"wings": "2"}, UnknownNameError, "wings"),
        ({"layers": "0"}, ConfigError, "graft:layers is at least 1; got 0"),
        ({"layers": "3"}, ConfigError, "from 1 to 2 for a target of 2 layers; got 3"),
        ({"steps": "0"}, ConfigError, "graft:steps is at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(two_layers, options, error, message):
    with pytest.raises(error, match=message):
        KIND.build(shape_of(two_layers), target_tensors(str(two_layers)), options)


def test_a_target_without_files_is_refused():
    shape = TargetShape(vocab_size=13, hidden_size=8, num_layers=3)
    with pytest.raises(ModelError, match="read from its files; got none"):
        KIND.build(shape, random_tensors(shape), {})


def test_layers_read_are_those_below_its_own():
    assert KIND.hidden_layers(12, {}) == (11,)
    assert KIND.hidden_layers(12, {"layers": "3"}) == (3, 7, 11)


def test_trained_graft_drafts_better(two_layers, texts):
    """One layer of two; a hundred steps on a dozen texts, then more of their drafts are taken."""
    shape, taken = TargetShape.of(texts.target.info), []
    for num_steps in (0, 100):
        torch.manual_seed(0)
        module = KIND.build(shape, target_tensors(str(two_layers)), {"steps": "3"})
        examples = batch_of(texts.examples, texts.target)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(num_steps):
            optimizer.zero_grad()
            KIND.loss(module, examples, forward_kl).backward()
            optimizer.step()
        path = two_layers.parent / f"graft-{num_steps}"
        KIND.save(module, shape, path, "# Trained\n")
        taken.append(num_taken("graft", path, texts.target, texts.examples))
    assert taken[1] > 2 * taken[0]


def test_a_run_goes_on_where_it_was_stopped(two_layers, tmp_path):
    """Its checkpoint holds what the layers have become since they were cut from the target."""

    class KilledError(Exception):
        """Stands for a kill."""

    def kill(progress):
        if progress.stage == "training the head" and progress.done == 60:
            raise KilledError

    settings = HeadSettings(
        kind="graft",
        options={"layers": "1", "steps": "3"},
        model=str(two_layers),
        num_prompts=24,
        max_new_tokens=16,
        steps=80,
        batch_size=8,
        learning_rate=0.01,
    )
    report = run_head(settings, PROMPTS, tmp_path / "whole")
    with pytest.raises(KilledError):
        run_head(settings, PROMPTS, tmp_path / "killed", on_progress=kill)
    run_head(settings, PROMPTS, tmp_path / "killed")
    for part in ("model.safetensors", "draft/model.safetensors"):
        whole, again = (tmp_path / name / "head" / part for name in ("whole", "killed"))
        assert whole.read_bytes() == again.read_bytes()
    assert report["served"]["graft"]["num_different"] == 0
    losses = report["training"]["held_out_loss"]
    assert losses["after"] < losses["before"]
    options = json.loads((tmp_path / "whole/head/config.json").read_text())["options"]
    assert options == {"layers": [1], "num_steps": 3}
