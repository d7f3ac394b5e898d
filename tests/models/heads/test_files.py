"""Head directories: what is written is read, and everything that does not fit is refused."""

import json

import pytest
import torch
from torch import nn

from foretoken.errors import ModelError
from foretoken.models.heads.files import TargetShape, read_head, save_head, target_tensors
from tests.fakes import build_module, tiny_config

SHAPE = TargetShape(vocab_size=7, hidden_size=4, num_layers=2, name="somewhere/tiny")
TENSORS = {"a.weight": torch.randn(7, 4), "a.bias": torch.randn(7)}


@pytest.fixture
def folder(tmp_path):
    save_head(TENSORS, "medusa", SHAPE, {"heads": 2}, tmp_path / "head", "# A head\n")
    return tmp_path / "head"


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(*arguments):
    with pytest.raises(ModelError) as caught:
        read_head(*arguments)
    assert caught.value.hint
    return str(caught.value)


def test_what_was_saved_is_read(folder):
    head = read_head(folder, "medusa", SHAPE)
    assert (head.kind, head.target, head.options) == ("medusa", SHAPE, {"heads": 2})
    assert head.target.name == "somewhere/tiny"
    assert head.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(head.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert (folder / "README.md").read_text() == "# A head\n"


def test_head_fills_its_module(folder):
    module = nn.ModuleDict({"a": nn.Linear(4, 7)})
    read_head(folder, "medusa", SHAPE).fill(module)
    assert torch.equal(module["a"].weight, TENSORS["a.weight"])


def test_views_of_one_memory_are_saved(tmp_path):
    rows = torch.randn(6, 4)
    save_head({"x": rows[:3], "y": rows[3:].t()}, "medusa", SHAPE, {}, tmp_path, "")
    head = read_head(tmp_path, "medusa", SHAPE)
    assert torch.equal(head.tensors["x"], rows[:3])
    assert torch.equal(head.tensors["y"], rows[3:].t())


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.ModuleDict({"a": nn.Linear(4, 8)}), "'a.bias'.*(7,).*(8,)"),
        (nn.ModuleDict({"a": nn.Linear(4, 7, bias=False)}), "'a.bias'.*no such tensor"),
        (nn.ModuleDict({"a": nn.Linear(4, 7), "b": nn.Linear(1, 1)}), "'b.bias'.*is missing"),
    ],
)
def test_tensors_that_do_not_fit_the_module_are_named(folder, module, said):
    with pytest.raises(ModelError, match=said.replace("(", r"\(").replace(")", r"\)")):
        read_head(folder, "medusa", SHAPE).fill(module)


def test_numbers_that_are_none_are_refused(tmp_path):
    broken = {**TENSORS, "a.bias": torch.full((7,), torch.nan)}
    save_head(broken, "medusa", SHAPE, {}, tmp_path, "")
    with pytest.raises(ModelError, match=r"'a.bias'.*NaN"):
        read_head(tmp_path, "medusa", SHAPE).fill(nn.ModuleDict({"a": nn.Linear(4, 7)}))


def test_wrong_kind_is_named_with_the_drafter_that_takes_it(folder):
    with pytest.raises(ModelError, match="kind 'medusa'; 'eagle' is needed") as caught:
        read_head(folder, "eagle", SHAPE)
    assert f"medusa:path={folder}" in caught.value.hint


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_layers"])
def test_wrong_target_is_named(folder, name):
    sizes = {"vocab_size": 7, "hidden_size": 4, "num_layers": 2, name: 9}
    said = refusal(folder, "medusa", TargetShape(**sizes, name="my/target"))
    assert f"{name} {getattr(SHAPE, name)} (somewhere/tiny)" in said
    assert "has 9 (my/target)" in said


def test_directories_that_are_no_heads_are_refused(folder, tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere", "medusa", SHAPE)
    assert "is a file" in refusal(folder / "config.json", "medusa", SHAPE)
    assert "no config.json" in refusal(tmp_path, "medusa", SHAPE)
    build_module(tiny_config("llama")).save_pretrained(tmp_path / "model")
    assert "is no head that is known" in refusal(tmp_path / "model", "medusa", SHAPE)


def test_broken_files_are_refused(folder):
    edit_config(folder, format=2)
    assert "format 2; this version reads 1" in refusal(folder, "medusa", SHAPE)
    edit_config(folder, format=1, target={"vocab_size": 7})
    assert "cannot be read" in refusal(folder, "medusa", SHAPE)
    (folder / "config.json").write_text("[1, 2]")
    assert "no JSON object" in refusal(folder, "medusa", SHAPE)
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refusal(folder, "medusa", SHAPE)


def test_broken_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert "model.safetensors' cannot be read" in refusal(folder, "medusa", SHAPE)
    weights.unlink()
    assert "has no model.safetensors" in refusal(folder, "medusa", SHAPE)


# -- tensors of the target -----------------------------------------------------------------------


FINAL_NORMS = {
    "llama": "model.norm",
    "gemma2": "model.norm",
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
}


@pytest.mark.parametrize("family", FINAL_NORMS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_target_tensors_are_those_of_the_module(tmp_path, family, is_tied):
    module = build_module(tiny_config(family, tie_word_embeddings=is_tied))
    module.save_pretrained(tmp_path)
    found = target_tensors(str(tmp_path))
    assert torch.equal(found.embedding, module.get_input_embeddings().weight)
    assert torch.equal(found.head, module.get_output_embeddings().weight)
    assert torch.equal(found.norm, module.get_submodule(FINAL_NORMS[family]).weight)


def test_target_tensors_of_several_files(tmp_path):
    module = build_module(tiny_config("llama"))
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(target_tensors(str(tmp_path)).head, module.lm_head.weight)


def test_target_without_files_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no safetensors weights"):
        target_tensors(str(tmp_path))
