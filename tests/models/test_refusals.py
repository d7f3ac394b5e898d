"""What cannot be served or loaded is refused with an error that says why and what to do."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from foretoken.errors import ConfigError, ModelError, UnsupportedModelError
from foretoken.models.loading import load_model, resolve_device
from foretoken.models.modules import adapt_module, check_supported
from tests.fakes import build_module, tiny_config

LLAMA_LIKE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT_LIKE = {key: LLAMA_LIKE[key] for key in LLAMA_LIKE if key != "num_key_value_heads"}


# -- architectures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_name", "reason"),
    [
        ("BartConfig", "'bart' is an encoder-decoder model"),
        ("MarianConfig", "'marian' is an encoder-decoder model"),
        ("MusicgenConfig", "'musicgen' is an encoder-decoder model"),
        ("MambaConfig", "'mamba' keeps a recurrent state"),
        ("RwkvConfig", "'rwkv' keeps a recurrent state"),
        ("JambaConfig", "'jamba' keeps a recurrent state"),
        ("Qwen3NextConfig", "'qwen3_next' keeps a recurrent state"),
        ("RecurrentGemmaConfig", "'recurrent_gemma' keeps a recurrent state"),
        ("MiniMaxConfig", r"'minimax' has layers that are not plain attention \(linear_attention"),
        ("Llama4TextConfig", r"not plain attention \(chunked_attention\)"),
        ("BloomConfig", "'bloom' computes attention without transformers' attention registration"),
        ("MptConfig", "'mpt' computes attention without"),
        ("FalconConfig", "'falcon' computes attention without"),
        ("GPTJConfig", "'gptj' computes attention without"),
    ],
)
def test_architecture_is_refused_by_its_configuration(config_name, reason):
    config = getattr(transformers, config_name)()
    with pytest.raises(UnsupportedModelError, match=f"^some/model: .*{reason}") as caught:
        check_supported(config, "some/model")
    assert "decoder-only" in caught.value.hint


@pytest.mark.parametrize(
    ("config_name", "model_type"),
    [("T5Config", "t5"), ("ViTConfig", "vit"), ("CLIPConfig", "clip"), ("VitsConfig", "vits")],
)
def test_what_is_no_causal_language_model_is_refused(config_name, model_type):
    config = getattr(transformers, config_name)()
    message = f"^some/model: '{model_type}' is not a causal language model"
    with pytest.raises(ModelError, match=message) as caught:
        check_supported(config, "some/model")
    assert "AutoModelForCausalLM" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BertConfig(**BERT_LIKE), "'bert' lets tokens see those after them"),
        (transformers.RobertaConfig(**BERT_LIKE), "'roberta' lets tokens see those after them"),
        (transformers.DogeConfig(**LLAMA_LIKE), "'doge' computes an attention mask of its own"),
        (
            transformers.PhimoeConfig(**LLAMA_LIKE, num_local_experts=2, sliding_window=5),
            "'phimoe' does not tell its attention the sliding window",
        ),
        (
            transformers.Qwen2MoeConfig(
                **LLAMA_LIKE,
                num_experts=2,
                num_experts_per_tok=1,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                use_sliding_window=True,
                sliding_window=5,
                layer_types=["full_attention", "sliding_attention"],
            ),
            "'qwen2_moe' does not tell its attention the sliding window",
        ),
        (
            transformers.NemotronConfig(**LLAMA_LIKE),
            "'nemotron' does not hand keyword arguments down to its attention",
        ),
        (
            transformers.DiffLlamaConfig(**LLAMA_LIKE),
            r"'diffllama' has 2 layers, which called .* order \[0, 0, 1, 1\]",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_architecture_is_refused_by_what_its_layers_do(config, reason):
    """Each of these would load, run, and score trees wrongly."""
    module = build_module(config, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=f"^some/model: {reason}") as caught:
        adapt_module(module, name="some/model")
    assert "decoder-only" in caught.value.hint


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_module_that_does_not_call_our_attention_is_refused(attention):
    module = build_module(tiny_config("llama"), attn_implementation=attention)
    with pytest.raises(UnsupportedModelError, match=r"'llama' has 3 layers.* order \[\]") as caught:
        adapt_module(module, name="some/model")
    assert caught.value.hint


def test_module_that_skips_the_attention_of_a_layer_is_refused():
    module = build_module(tiny_config("llama"))
    module.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match=r"order \[0, 2\]; each has to, once"):
        adapt_module(module, name="some/model")


def test_module_that_fails_on_two_tokens_is_refused():
    module = build_module(tiny_config("llama"))
    module.model.rotary_emb.forward = lambda *_, **__: None
    with pytest.raises(UnsupportedModelError, match="'llama' cannot score two tokens: TypeError"):
        adapt_module(module, name="some/model")


def test_module_that_ignores_which_rows_are_wanted_is_refused():
    module = build_module(tiny_config("llama"))
    plain_forward = module.forward

    def forward(logits_to_keep, **arguments):
        return plain_forward(**arguments)

    module.forward = forward
    with pytest.raises(
        UnsupportedModelError, match="'llama' does not compute the logits of chosen"
    ):
        adapt_module(module, name="some/model")


# -- files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory):
    """Return a directory that loads."""
    directory = tmp_path_factory.mktemp("models") / "good"
    build_module(
        tiny_config("llama"), attn_implementation="sdpa", dtype=torch.float32
    ).save_pretrained(directory)
    load_model(str(directory))
    return directory


@pytest.fixture
def directory(good_directory, tmp_path):
    """Return a copy to be damaged."""
    return shutil.copytree(good_directory, tmp_path / "model")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def store_pickled(directory):
    path = directory / "model.safetensors"
    torch.save(load_file(path), directory / "pytorch_model.bin")
    path.unlink()


def drop_a_tensor(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def truncate_weights(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


DAMAGES = {
    "truncated weights": (truncate_weights, "cannot be loaded: .*deserializing header"),
    "empty weights": (
        lambda path: (path / "model.safetensors").write_bytes(b""),
        "cannot be loaded: .*deserializing header",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        "no file named model.safetensors",
    ),
    "pickled weights only": (store_pickled, "no file named model.safetensors"),
    "a tensor missing": (drop_a_tensor, "lack 1 tensors, the first is 'model.layers.1.self_attn"),
    "more layers than weights": (
        lambda path: edit_config(path, num_hidden_layers=4),
        "lack 9 tensors",
    ),
    "weights of another shape": (lambda path: edit_config(path, hidden_size=64), "mismatched"),
    "broken configuration": (
        lambda path: (path / "config.json").write_text('{"model_type": '),
        "not a valid JSON file",
    ),
    "configuration is binary": (
        lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"),
        "not a valid JSON file",
    ),
    "empty configuration": (
        lambda path: (path / "config.json").write_text("{}"),
        "Should have a `model_type` key",
    ),
    "configuration is null": (
        lambda path: (path / "config.json").write_text("null"),
        "cannot be loaded",
    ),
    "no configuration": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "unknown model type": (lambda path: edit_config(path, model_type="no-such"), "`no-such`"),
    "value of a wrong type": (
        lambda path: edit_config(path, num_hidden_layers="three"),
        "num_hidden_layers",
    ),
    "contradictory sizes": (
        lambda path: edit_config(path, num_attention_heads=5),
        "not a multiple of the number of attention heads",
    ),
    "code of its own": (
        lambda path: edit_config(path, model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "contains custom code",
    ),
    "not a causal model": (
        lambda path: edit_config(path, model_type="vit"),
        "'vit' is not a causal language model",
    ),
    "unsupported model": (lambda path: edit_config(path, model_type="bloom"), "'bloom' computes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directory_is_refused_in_one_line(directory, damage):
    break_it, message = DAMAGES[damage]
    break_it(directory)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(directory))
    error = caught.value
    assert str(directory) in str(error)
    assert error.hint
    assert "\n" not in f"{error}{error.hint}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/nowhere", "nowhere' does not exist"),
        ("{}/config.json", "config.json' is a file, not a directory"),
        ("{}/..", "has no config.json"),
        ("./no-such-directory", "'./no-such-directory' does not exist"),
        ("~/no-such-directory", "'~/no-such-directory' does not exist"),
        ("no-such-model", "'no-such-model' is no directory here and cannot be loaded"),
        ("models/of/mine", "'models/of/mine' is no directory here and cannot be loaded"),
    ],
)
def test_missing_paths_are_refused(good_directory, path, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path.format(good_directory))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float8", "int8", "half", ""])
def test_unknown_dtype_is_refused(good_directory, dtype):
    with pytest.raises(ConfigError, match=f"dtype is auto or one of .*bfloat16.*; got '{dtype}'"):
        load_model(str(good_directory), dtype=dtype)


@pytest.mark.parametrize("device", ["tpu", "", "cuda:999", "cpu:x", "meta"])
def test_device_that_is_not_here_is_refused(device):
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used: ") as caught:
        resolve_device(device)
    assert "auto" in caught.value.hint
    assert len(str(caught.value)) < 300


def test_options_are_checked_before_the_model_is_read():
    for options in ({"dtype": "float8"}, {"device": "tpu"}):
        with pytest.raises(ConfigError):
            load_model("/nowhere", **options)
