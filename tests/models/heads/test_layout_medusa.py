"""Published Medusa heads, under the names that their authors save them by."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from foretoken.errors import ModelError
from foretoken.models.heads.files import TargetShape, read_head
from foretoken.models.heads.medusa import MedusaDesign, MedusaHeads

VOCAB_SIZE, HIDDEN_SIZE = 11, 6
TARGET = TargetShape(VOCAB_SIZE, HIDDEN_SIZE, 3)


class ResBlock(nn.Module):
    """A block as published, with the attribute that gives its tensors their names."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, x):
        return x + nn.functional.silu(self.linear(x))


def published_heads(num_heads, num_layers):
    """Return heads put together as they are published: blocks, then a linear layer."""
    torch.manual_seed(num_heads)
    return nn.ModuleList(
        nn.Sequential(
            *(ResBlock() for _ in range(num_layers)),
            nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False),
        )
        for _ in range(num_heads)
    )


def publish(folder, heads, num_layers, *, name="medusa_lm_head.safetensors", prefix="", **config):
    folder.mkdir()
    tensors = {prefix + key: tensor for key, tensor in heads.state_dict().items()}
    if name.endswith(".pt"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    fields = {
        "medusa_num_heads": len(heads),
        "medusa_num_layers": num_layers,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "transformers_version": "4.31.0",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def load(folder):
    head = read_head(folder, "medusa", TARGET)
    module = MedusaHeads(TARGET, MedusaDesign.read(head.options), None)
    head.fill(module)
    return module


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize(("num_heads", "num_layers"), [(1, 1), (3, 1), (2, 3), (2, 0)])
def test_published_heads_say_here_what_they_say_there(tmp_path, name, num_heads, num_layers):
    heads = published_heads(num_heads, num_layers)
    module = load(publish(tmp_path / "head", heads, num_layers, name=name))
    states = torch.randn(5, HIDDEN_SIZE)
    expected = torch.stack([head(states) for head in heads])
    assert torch.equal(module(states), expected)


def test_names_of_the_whole_model_are_read_too(tmp_path):
    heads = published_heads(2, 1)
    module = load(publish(tmp_path / "head", heads, 1, prefix="medusa_head."))
    states = torch.randn(HIDDEN_SIZE)
    assert torch.equal(module(states)[1], heads[1](states))


def test_weights_say_how_many_heads_there_are(tmp_path):
    """The heads for Vicuna have five heads, and configurations that say two."""
    folder = publish(tmp_path / "head", published_heads(5, 1), 1, medusa_num_heads=2)
    assert load(folder).design.heads == 5


def test_half_precision_is_read(tmp_path):
    heads = published_heads(2, 1).half()
    module = load(publish(tmp_path / "head", heads, 1))
    assert torch.equal(module.lm_heads[0].weight, heads[0][1].weight.float())


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 12), ("hidden_size", 8)])
def test_another_target_is_refused(tmp_path, name, value):
    folder = publish(tmp_path / "head", published_heads(2, 1), 1)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "num_layers": 3, name: value}
    with pytest.raises(ModelError, match=f"{name}.*vicuna-7b-v1.3.*has {value}"):
        read_head(folder, "medusa", TargetShape(**sizes))


def test_another_kind_is_refused(tmp_path):
    folder = publish(tmp_path / "head", published_heads(2, 1), 1)
    with pytest.raises(ModelError, match="kind 'medusa'; 'eagle' is needed"):
        read_head(folder, "eagle", TARGET)


@pytest.mark.parametrize("num_layers", [0, 2])
def test_another_number_of_layers_than_the_weights_is_refused(tmp_path, num_layers):
    folder = publish(tmp_path / "head", published_heads(2, 1), num_layers)
    with pytest.raises(ModelError, match=f"'i.{num_layers}.weight'"):
        read_head(folder, "medusa", TARGET)


def test_missing_tensors_are_named(tmp_path):
    heads = published_heads(2, 1)
    folder = publish(tmp_path / "head", heads, 1)
    tensors = heads.state_dict()
    del tensors["1.0.linear.bias"]
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    with pytest.raises(ModelError, match=r"'blocks\.1\.0\.linear\.bias'.*is missing"):
        load(folder)


def test_missing_weights_are_refused(tmp_path):
    folder = publish(tmp_path / "head", published_heads(2, 1), 1)
    (folder / "medusa_lm_head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no medusa_lm_head\.safetensors"):
        read_head(folder, "medusa", TARGET)


class Explosion:
    """What a torch file must not be allowed to run."""

    def __reduce__(self):
        return (exit, ("a checkpoint ran code",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    folder = publish(tmp_path / "head", published_heads(1, 1), 1, name="medusa_lm_head.pt")
    torch.save({"0.1.weight": Explosion()}, folder / "medusa_lm_head.pt")
    with pytest.raises(ModelError, match="cannot be read"):
        read_head(folder, "medusa", TARGET)
