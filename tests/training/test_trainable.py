"""Models to train: what comes back from disk is what was saved."""

import json
import shutil

import pytest
import torch

from foretoken import LLM
from foretoken.assets import EMBEDDED
from foretoken.errors import ConfigError, ModelError
from foretoken.models.loading import load_model
from foretoken.models.trainable import load_trainable, save_trainable
from tests.fakes import VOCAB_SIZE

IDS = torch.tensor([[3, 9, 27, 20]])


def test_a_saved_model_is_the_trained_one(models, tmp_path):
    model = load_trainable(models.start)
    with torch.no_grad():
        for weight in model.module.parameters():
            weight.add_(0.01)
    save_trainable(model, tmp_path, "# A card\n")
    again = load_trainable(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.logits(IDS), model.logits(IDS))
        assert not torch.equal(load_trainable(models.start).logits(IDS), model.logits(IDS))
    assert (tmp_path / "README.md").read_text() == "# A card\n"
    assert load_model(str(tmp_path)).info.vocab_size == VOCAB_SIZE


def test_facts_and_gradients(models):
    model = load_trainable(models.short)
    assert (model.vocab_size, model.context_limit) == (VOCAB_SIZE, 16)
    assert model.num_parameters == load_model(str(models.short)).info.num_parameters < 10_000
    model.logits(IDS).sum().backward()
    assert all(weight.grad is not None for weight in model.module.parameters())


def test_the_type_of_weights_and_the_tokenizer_come_along(tmp_path):
    draft = EMBEDDED["stories"].draft
    save_trainable(load_trainable(draft), tmp_path, "card")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (draft / name).read_bytes()
    # Untrained, so float32 and back is exact: it drafts what the original drafts.
    specs = [f"draft-model:path={path}" for path in (draft, tmp_path)]
    steps = [LLM(drafters=spec).generate("One day")[0].stats.num_steps for spec in specs]
    assert steps[0] == steps[1]


def test_errors(models, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_trainable(tmp_path / "none")
    with pytest.raises(ModelError, match="is a file, not a directory"):
        load_trainable(models.start / "config.json")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_trainable(tmp_path)
    with pytest.raises(ConfigError, match="device 'pocket' cannot be used"):
        load_trainable(models.start, device="pocket")
    shutil.copy(models.start / "config.json", tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_trainable(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_trainable(tmp_path)
