import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from foretoken.bench.peers.checkpoint import LlamaCheckpoint, LlamaShape, check_pair
from foretoken.bench.peers.gguf_export import export_gguf
from foretoken.bench.peers.openvino_export import export_openvino
from foretoken.errors import ConfigError, ModelError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {package}")


EXPORTS = [
    pytest.param(export_gguf, marks=needs("gguf"), id="gguf"),
    pytest.param(export_openvino, marks=needs("openvino"), id="openvino"),
]


def test_shape_fills_in_what_a_configuration_leaves_out():
    shape = LlamaShape.from_config(CONFIG)
    assert (shape.num_kv_heads, shape.head_dim, shape.rope_theta) == (4, 4, 10000.0)
    assert not shape.tied


@pytest.mark.parametrize(
    "rope", [{"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}, {"rope_theta": 500000}]
)
def test_shape_reads_both_spellings_of_the_rotation(rope):
    assert LlamaShape.from_config({**CONFIG, **rope}).rope_theta == 5e5


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen3"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_a_function_that_is_not_written_is_refused(change):
    with pytest.raises(ConfigError, match="cannot convert a model with"):
        LlamaShape.from_config({**CONFIG, **change})


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        LlamaCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        LlamaCheckpoint(tmp_path)


def test_missing_tensor_is_named(pair):
    checkpoint = LlamaCheckpoint(Path(pair.target))
    with pytest.raises(ModelError, match=r"no tensor 'model\.norm\.bias'"):
        checkpoint.tensor("model.norm.bias")


def test_one_vocabulary_is_a_pair(pair):
    check_pair(Path(pair.target), Path(pair.target))
    check_pair(Path(pair.target), None)


@pytest.mark.parametrize("export", EXPORTS)
def test_converted_model_is_reused(pair, tmp_path, export):
    first = export(Path(pair.target), "float32", tmp_path)
    written = first.stat().st_mtime_ns
    assert export(Path(pair.target), "float32", tmp_path) == first
    assert first.stat().st_mtime_ns == written
    assert export(Path(pair.target), "bfloat16", tmp_path) != first
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("export", EXPORTS)
def test_replaced_checkpoint_is_converted_anew(pair, tmp_path, export):
    folder = tmp_path / "model"
    shutil.copytree(pair.target, folder)
    first = export(folder, "float32", tmp_path)
    shutil.copyfile(pair.stranger + "/model.safetensors", folder / "model.safetensors")
    assert export(folder, "float32", tmp_path) != first
