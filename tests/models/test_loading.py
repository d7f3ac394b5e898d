"""Loading: dtype, end-of-sequence ids, context limits, and what a model tells about itself."""

import copy
import shutil

import pytest
import torch
from transformers import GenerationConfig, Phi3Config

from foretoken.models.batch import Segment
from foretoken.models.cache import LayerShape
from foretoken.models.loading import load_model, resolve_device
from foretoken.models.modules import adapt_module
from tests.fakes import (
    CONTEXT_LIMIT,
    FAMILIES,
    VOCAB_SIZE,
    build_module,
    plain_module,
    tiny_config,
    tiny_language_model,
)

TOKEN_IDS = [3, 50, 17, 8, 8, 29, 44, 1]
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}


def chain_logits(model, token_ids, **options):
    """Return the whole output for one sequence that was never cached before."""
    cache = model.new_cache(len(token_ids))
    segment = Segment(cache.open(), token_ids, range(-1, len(token_ids) - 1))
    batch = model.batch(cache, [segment])
    return model.forward(batch, range(len(token_ids)), **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return a directory with a tiny Llama in bfloat16."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    module = build_module(tiny_config("llama"), 5, attn_implementation="sdpa", dtype=torch.bfloat16)
    module.save_pretrained(path)
    return path


# -- dtype and device ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.float32),  # the checkpoint is bfloat16, but small
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float64", torch.float64),
    ],
)
def test_model_loads_in_the_dtype_asked_for(directory, name, dtype):
    model = load_model(str(directory), dtype=name, device="cpu")
    assert model.info.dtype == dtype
    cache = model.new_cache(16)
    assert {pool.dtype for pool in (*cache.keys, *cache.values)} == {dtype}
    output = chain_logits(model, TOKEN_IDS)
    assert output.logits.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert output.logits.isfinite().all()


def test_large_checkpoints_keep_their_dtype(directory, monkeypatch):
    monkeypatch.setattr("foretoken.models.loading.SMALL_ON_CPU", 1000)
    assert load_model(str(directory), device="cpu").info.dtype == torch.bfloat16


# Rows of bfloat16 numbers with 8 bits, through three layers: differences of a few units in the
# last place of logits near 5. float32 has 16 bits more.
@pytest.mark.parametrize(("name", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.15)])
def test_loaded_model_scores_as_the_saved_one(directory, name, tolerance):
    loaded = load_model(str(directory), dtype=name, device="cpu")
    module = build_module(tiny_config("llama"), 5, attn_implementation="sdpa", dtype=torch.float32)
    for parameter in module.parameters():
        parameter.data = parameter.bfloat16().to(loaded.info.dtype)
    expected = module(torch.tensor([TOKEN_IDS])).logits[0]
    torch.testing.assert_close(
        chain_logits(loaded, TOKEN_IDS).logits, expected.float(), rtol=0, atol=tolerance
    )


def test_home_directory_is_expanded(directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory.parent))
    assert load_model("~/tiny-llama").info.name == "~/tiny-llama"


def test_relative_directory_needs_no_dot(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    assert load_model("tiny-llama").info.vocab_size == VOCAB_SIZE


def test_loaded_weights_need_no_gradient(directory):
    module = load_model(str(directory), dtype="float64")._forward_pass._module
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_automatic_device_is_one_that_works():
    device = resolve_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


# -- what a model says about itself ----------------------------------------------------------


def test_info_of_a_llama():
    info = tiny_language_model("llama").info
    assert info.vocab_size == VOCAB_SIZE
    assert info.num_layers == 3
    assert info.context_limit == CONTEXT_LIMIT
    assert info.kv_layers == (LayerShape(num_heads=2, key_dim=8, value_dim=8),) * 3
    assert info.kv_bytes_per_token == 3 * 2 * (8 + 8) * 8
    embeddings, attention, mlp = 2 * 61 * 32, 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    assert info.num_parameters == embeddings + 3 * (attention + mlp + 2 * 32) + 32


def test_tied_parameters_count_once():
    tied = tiny_language_model("llama", tie_word_embeddings=True).info
    untied = tiny_language_model("llama").info
    assert untied.num_parameters - tied.num_parameters == 61 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_its_size(family):
    info = tiny_language_model(family).info
    assert (info.vocab_size, info.num_layers) == (VOCAB_SIZE, 3)
    assert info.context_limit == CONTEXT_LIMIT
    assert info.eos_ids == frozenset()


def test_adapting_leaves_the_configuration_alone():
    config = tiny_config("gemma3")
    module = build_module(config)
    before = copy.deepcopy(module.config.to_dict())
    chain_logits(adapt_module(module, name="tiny"), TOKEN_IDS)
    assert module.config.to_dict() == before


@pytest.mark.parametrize(
    ("in_model", "in_generation", "expected"),
    [
        (None, None, set()),
        (2, None, {2}),
        ([2, 5], None, {2, 5}),
        (2, 7, {7}),
        (2, [7, 8], {7, 8}),
        (None, 0, {0}),
    ],
)
def test_eos_ids_come_from_the_generation_config_first(in_model, in_generation, expected):
    module = build_module(tiny_config("llama"))
    module.config.eos_token_id = in_model
    module.generation_config = GenerationConfig(eos_token_id=in_generation)
    assert adapt_module(module, name="tiny").info.eos_ids == expected


def test_eos_ids_are_read_from_generation_config_file(directory, tmp_path):
    copied = shutil.copytree(directory, tmp_path / "model")
    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(copied)
    assert load_model(str(copied)).info.eos_ids == {7, 8}


# -- context limits --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, 64),
        ({"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 48}, 48),
    ],
    ids=lambda value: value.get("rope_type") if isinstance(value, dict) else str(value),
)
def test_context_ends_where_rotations_would_depend_on_the_batch(rope, limit):
    config = tiny_config("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    assert adapt_module(build_module(config), name="tiny").info.context_limit == limit


def longrope_config():
    """Return a Phi-3 configuration as the hub has it: the original limit beside the scaling."""
    values = {**tiny_config("phi3").to_dict(), "original_max_position_embeddings": 48}
    values.pop("rope_parameters")
    rope_scaling = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    return Phi3Config.from_dict({**values, "rope_scaling": {"type": "longrope", **rope_scaling}})


def test_context_of_a_longrope_model_from_the_hub():
    """Its logits equal transformers' up to the last position of the limit."""
    model = adapt_module(build_module(longrope_config(), 3), name="tiny")
    assert model.info.context_limit == 48
    token_ids = [(7 * position) % VOCAB_SIZE for position in range(48)]
    plain = build_module(longrope_config(), 3, attn_implementation="sdpa")
    expected = plain(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(chain_logits(model, token_ids).logits, expected, rtol=0, atol=1e-5)


# -- outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "mixtral"])
def test_hidden_layers_equal_transformers_hidden_states(family):
    output = chain_logits(tiny_language_model(family), TOKEN_IDS, hidden_layers=[0, 2, 3])
    expected = plain_module(family)(torch.tensor([TOKEN_IDS]), output_hidden_states=True)
    assert list(output.hidden) == [0, 2, 3]
    for layer, states in output.hidden.items():
        # float64 throughout but for norms: see test_families.py.
        torch.testing.assert_close(
            states, expected.hidden_states[layer][0], rtol=0, atol=1e-5, msg=f"layer {layer}"
        )


def test_hidden_layers_come_only_when_asked_for():
    assert chain_logits(tiny_language_model("llama"), TOKEN_IDS).hidden == {}


def test_only_the_rows_asked_for_come_in_their_order():
    model = tiny_language_model("llama")
    cache = model.new_cache(64)
    everything = chain_logits(model, TOKEN_IDS).logits
    for rows in ([5], [6, 0, 6], []):
        batch = model.batch(cache, [Segment(cache.open(), TOKEN_IDS, range(-1, 7))])
        logits = model.forward(batch, rows).logits
        assert logits.shape == (len(rows), VOCAB_SIZE)
        torch.testing.assert_close(logits, everything[rows], rtol=0, atol=1e-12)
