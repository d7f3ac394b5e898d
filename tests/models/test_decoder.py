"""Compiled decoders: the same function as transformers', and the same bits in every company."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from foretoken.core.verdict import Exactness
from foretoken.errors import ModelError
from foretoken.models import decoder_loading
from foretoken.models.batch import Segment
from foretoken.models.decoder import CompiledDecoder, RotaryTable
from foretoken.models.decoder_config import is_plain_decoder, read_plain_config
from foretoken.models.loading import load_config, load_model
from tests.bits import Histories
from tests.fakes import CONTEXT_LIMIT, VOCAB_SIZE, WINDOW, build_module, tiny_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Every way in which plain decoders differ; sizes that fill no vector are among them.
VARIANTS = {
    "llama": ("llama", {}),
    "odd sizes": ("llama", {"hidden_size": 44, "head_dim": 22, "intermediate_size": 37}),
    "wide heads": ("llama", {"head_dim": 80, "hidden_size": 64, "intermediate_size": 100}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "as many key heads": ("llama", {"num_key_value_heads": 4}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixed windows": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(variant):
    family, changes = VARIANTS[variant]
    rope = changes.get("rope_parameters")
    if rope:
        changes = {**changes, "rope_parameters": {"rope_theta": 10000.0, **rope}}
    return tiny_config(family, **changes)


def save(variant, path, dtype=torch.float32, **options):
    """Write a checkpoint with random weights; vectors are no constants."""
    module = build_module(config_of(variant), 3, attn_implementation="eager", dtype=torch.float32)
    random_vectors = torch.Generator().manual_seed(9)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            scale = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.data = scale + 0.3 * torch.randn(parameter.shape, generator=random_vectors)
    module.to(dtype).save_pretrained(path, **options)
    return module.float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function from a variant to its directory and module."""
    found = {}

    def get(variant):
        if variant not in found:
            path = tmp_path_factory.mktemp("decoders") / variant.replace(" ", "-")
            found[variant] = (path, save(variant, path))
        return found[variant]

    return get


def chain_output(model, token_ids, **options):
    cache = model.new_cache(len(token_ids))
    segment = Segment(cache.open(), token_ids, range(-1, len(token_ids) - 1))
    batch = model.batch(cache, [segment])
    return model.forward(batch, range(len(token_ids)), **options)


def some_ids(count, seed=0):
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


# -- the same function -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_agrees_with_transformers(saved, variant):
    path, module = saved(variant)
    model = load_model(str(path), dtype="float32")
    assert isinstance(model._forward_pass, CompiledDecoder)
    token_ids = some_ids(50)
    with torch.inference_mode():
        expected = module(torch.tensor([token_ids]), output_hidden_states=True)
    assert expected.logits.std() > 0.3, "logits that hardly differ prove nothing"
    layers = range(model.info.num_layers + 1)
    output = chain_output(model, token_ids, hidden_layers=layers)
    for ours, theirs in [
        (output.logits, expected.logits[0]),
        *((output.hidden[layer], expected.hidden_states[layer][0]) for layer in layers),
    ]:
        assert (ours - theirs).abs().max() < 4e-6 * theirs.abs().max()


@pytest.mark.parametrize("variant", ["llama", "odd sizes", "qwen2", "qwen3", "mistral"])
def test_bfloat16_is_as_close_as_its_weights_allow(saved, variant):
    path, module = saved(variant)
    model = load_model(str(path), dtype="bfloat16")
    assert model.info.dtype == torch.bfloat16
    token_ids = some_ids(50)
    with torch.inference_mode():
        exact = module(torch.tensor([token_ids])).logits[0]
        rounded = copy.deepcopy(module).bfloat16()
        theirs = rounded(torch.tensor([token_ids])).logits[0].float()
    ours = chain_output(model, token_ids).logits
    # transformers rounds between all operations, we only where numbers are multiplied or kept.
    assert (ours - exact).square().mean() < 1.1 * (theirs - exact).square().mean()


def test_checkpoint_of_several_files(saved, tmp_path):
    path, module = saved("llama")
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    expected = chain_output(load_model(str(path)), some_ids(9)).logits
    assert torch.equal(chain_output(load_model(str(tmp_path)), some_ids(9)).logits, expected)


def test_model_knows_its_numbers(saved):
    path, module = saved("qwen2")
    info = load_model(str(path)).info
    assert info.num_parameters == module.num_parameters()
    assert info.context_limit == CONTEXT_LIMIT
    assert info.vocab_size == VOCAB_SIZE
    assert info.exactness == Exactness.BITWISE
    assert info.eos_ids == frozenset()


# -- the same bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_node_has_the_bits_of_plain_decoding(saved, variant, dtype):
    model = load_model(str(saved(variant)[0]), dtype=dtype)

    @settings(max_examples=4)
    @given(st.integers(0, 2**32 - 1))
    def play(seed):
        histories = Histories(model, seed)
        histories.check_random_history(num_sequences=1, num_steps=4)
        histories.check_random_history(num_sequences=3, num_steps=3)

    play()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(saved, dtype, monkeypatch):
    model = load_model(str(saved("odd sizes")[0]), dtype=dtype)
    token_ids = some_ids(100)
    outputs = []
    for num_threads in (1, 2, 3):
        monkeypatch.setattr(CompiledDecoder, "_num_threads", lambda *_, n=num_threads: n)
        outputs.append(chain_output(model, token_ids).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_long_prompt_in_one_pass_has_the_bits_of_plain_decoding(saved):
    model = load_model(str(saved("llama")[0]))
    token_ids = some_ids(CONTEXT_LIMIT)
    expected = Histories(model, 0).expected(token_ids)
    assert torch.equal(chain_output(model, token_ids).logits[-1], expected)


def test_denormals_change_nothing_between_one_row_and_many(tmp_path):
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "proj" in name:
            tensors[name] *= 1e-19
    save_file(tensors, file, metadata={"format": "pt"})
    model = load_model(str(tmp_path))
    Histories(model, 1).check_random_history(num_sequences=2, num_steps=3)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tmp_path, value):
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight.*NaN or infinite"):
        load_model(str(tmp_path))


def test_missing_tensor_is_named(tmp_path):
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, the first is 'model.layers.2"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_bias": True},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_what_is_not_plain_goes_through_transformers(tmp_path, changes):
    module = build_module(
        tiny_config("llama", **changes), 3, attn_implementation="eager", dtype=torch.float32
    )
    module.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert not isinstance(model._forward_pass, CompiledDecoder)
    token_ids = some_ids(9)
    with torch.inference_mode():
        expected = module(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(chain_output(model, token_ids).logits, expected, rtol=0, atol=3e-5)


def test_end_of_sequence_ids_come_from_the_generation_config(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(str(tmp_path)).info.eos_ids == {7, 9}


def test_positions_beyond_the_first_table(saved):
    table = RotaryTable(torch.tensor([1.0, 0.1]), 1.0)
    first = table.upto(5)[: 4 * 5].copy()
    longer = table.upto(5000)
    assert len(longer) >= 4 * 5000
    assert np.array_equal(longer[: 4 * 5], first)


# -- configurations --------------------------------------------------------------------------

PLAIN_ROPE = [name for name, (_, changes) in VARIANTS.items() if "rope_parameters" not in changes]


def facts(config):
    """Return everything that loading takes from a configuration."""
    names = "model_type vocab_size hidden_size intermediate_size num_hidden_layers hidden_act"
    names += " num_attention_heads num_key_value_heads rms_norm_eps tie_word_embeddings"
    names += " max_position_embeddings eos_token_id dtype"
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return {
        **{name: getattr(config, name) for name in names.split()},
        "head_dim": head_dim,
        "windows": list(decoder_loading._windows(config)),
        "frequencies": decoder_loading.rotary_frequencies(config, head_dim)[0].tolist(),
        "is_plain": is_plain_decoder(config),
    }


@pytest.mark.parametrize("variant", PLAIN_ROPE)
def test_configuration_read_directly_is_the_one_transformers_reads(saved, variant):
    path = str(saved(variant)[0])
    direct = read_plain_config(path)
    assert direct is not None
    assert facts(direct) == facts(load_config(path))


def test_older_way_of_writing_the_rotary_parameters(saved, tmp_path):
    values = json.loads((saved("llama")[0] / "config.json").read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": 500000.0, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert facts(read_plain_config(str(tmp_path))) == facts(load_config(str(tmp_path)))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": "three"},
        {"num_attention_heads": 5, "head_dim": None},
        {"model_type": "gpt2"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"num_key_value_heads": None},
        {"rms_norm_eps": ...},  # left out
        {"mlp_bias": ...},
    ],
)
def test_what_a_configuration_does_not_say_is_left_to_transformers(saved, tmp_path, change):
    values = json.loads((saved("llama")[0] / "config.json").read_text()) | change
    values = {name: value for name, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_plain_config(str(tmp_path)) is None
