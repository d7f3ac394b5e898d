"""A row's logits are the same bits whatever shares its pass, in every family; and how it shows."""

from functools import cache

import pytest
import torch
from torch import nn

from foretoken.core.verdict import Exactness
from foretoken.models.audit import find_dependence
from foretoken.models.batch import Segment
from foretoken.models.invariance import NUM_TOKENS, check_invariance, find_difference
from foretoken.models.modules import adapt_module
from tests.bits import Histories
from tests.fakes import FAMILIES, VOCAB_SIZE, build_module, tiny_config

DTYPES = (torch.float32, torch.bfloat16)
# Sizes that fill no vector, and so leave a rest in every elementwise operation.
ODD_SIZES = {
    "gpt2": {"n_embd": 36, "n_inner": 37},
    "opt": {"hidden_size": 36, "word_embed_proj_dim": 36, "ffn_dim": 37},
    "gpt_neox": {"hidden_size": 40, "intermediate_size": 37},
}
OTHER_ODD_SIZES = {"hidden_size": 36, "head_dim": 12, "intermediate_size": 37}


@cache
def small_model(family, dtype, is_odd=False):
    changes = ODD_SIZES.get(family, OTHER_ODD_SIZES) if is_odd else {}
    if family in ("phi3", "olmo2", "granite") and is_odd:  # their heads share the hidden size
        changes = {"hidden_size": 40, "intermediate_size": 37}
    return adapt_module(build_module(tiny_config(family, **changes), dtype=dtype), name=family)


# -- every family ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_odd", [False, True], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_bitwise(family, dtype, is_odd):
    info = small_model(family, dtype, is_odd).info
    assert (info.exactness, info.inexact_because) == (Exactness.BITWISE, "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_every_node_are_the_bits_of_plain_decoding(family, dtype):
    """Prompt chunks, trees and ragged batches against one token at a time."""
    histories = Histories(small_model(family, dtype, is_odd=True), seed=11)
    histories.check_random_history(num_sequences=1, num_steps=4)
    histories.check_random_history(num_sequences=3, num_steps=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral"])
def test_chunks_of_a_long_prompt_do_not_matter(family, dtype):
    changes = {"n_positions" if family == "gpt2" else "max_position_embeddings": 1024}
    module = build_module(tiny_config(family, **changes), dtype=dtype)
    model = adapt_module(module, name=family)
    text = torch.randint(VOCAB_SIZE, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    outputs = []
    for sizes in ([600], [512, 87, 1], [64] * 9 + [24], [255, 257, 3, *[1] * 85]):
        cache = model.new_cache(600)
        sequence, logits = cache.open(), []
        for size in sizes:
            start = sequence.num_cached
            segment = Segment(sequence, text[start : start + size], range(-1, size - 1))
            batch = model.batch(cache, [segment])
            logits.append(model.forward(batch, range(batch.num_rows)).logits)
            cache.commit([(sequence, range(size))])
        outputs.append(torch.cat(logits))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gemma3", "mixtral", "gpt_oss"])
def test_two_threads_are_bitwise_too(family, dtype, threads):
    """Wide enough for torch to share elementwise work among threads."""
    threads(2)
    changes = {"intermediate_size": 1111, "hidden_size": 1000}
    model = adapt_module(build_module(tiny_config(family, **changes), dtype=dtype), name=family)
    assert model.info.exactness is Exactness.BITWISE


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_numbers_do_not_matter(dtype):
    module = build_module(tiny_config("gemma2"), dtype=dtype)
    for parameter in module.parameters():
        parameter.view(-1)[::3] *= 1e-39  # below the smallest normal number
    sizes = torch.cat([parameter.view(-1).abs() for parameter in module.parameters()])
    assert ((sizes > 0) & (sizes < torch.finfo(dtype).tiny)).any()
    model = adapt_module(module, name="denormal")
    assert model.info.exactness is Exactness.BITWISE
    Histories(model, seed=3).check_random_history(num_sequences=2, num_steps=3)


# -- what stands against it ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_numerical(dtype):
    module = build_module(tiny_config("llama"), dtype=dtype)
    info = adapt_module(module, name="tiny").info
    assert info.exactness is Exactness.NUMERICAL
    assert info.inexact_because == f"{dtype} on cpu runs on torch's kernels".removeprefix("torch.")


class Rolled(nn.Module):
    """Gives each row something of the one before, in operations that only move numbers."""

    def forward(self, x):
        return x + torch.roll(x, 1, dims=1)


class Centred(nn.Module):
    """A norm over all rows of the pass, which no row should see."""

    def forward(self, x):
        return x - x.mean()


def adapted(module):
    info = adapt_module(module, name="tiny").info
    assert info.exactness is Exactness.NUMERICAL
    return info.inexact_because


def test_a_layer_that_mixes_rows_is_named():
    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    module.model.layers[1].input_layernorm = Centred()
    assert adapted(module) == "model.layers.1.input_layernorm computes mean"


def test_a_linear_layer_that_could_not_be_packed_is_named():
    class Derived(nn.Linear):
        pass

    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    layer = module.model.layers[2].mlp.down_proj
    derived = Derived(layer.in_features, layer.out_features, bias=False)
    derived.weight = layer.weight
    module.model.layers[2].mlp.down_proj = derived
    assert adapted(module) == "model.layers.2.mlp.down_proj computes linear"


def test_an_activation_that_is_a_function_is_named():
    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    mlp = module.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = nn.functional.silu
    assert adapted(module) == "model.layers.0.mlp computes silu"


def test_the_self_test_finds_what_operations_do_not_tell():
    """Rows are rolled, which is only a move; the self-test sees the layer after it."""

    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    module.model.layers[0].post_feedforward_layernorm = Rolled()
    assert adapted(module) == "the keys and values of layer 1 depend on what shares the pass"


def test_the_self_test_finds_rows_that_change_only_logits():
    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    module.model.norm = Rolled()
    assert adapted(module) == "the logits depend on what shares the pass"


def test_unpacked_modules_depend_on_the_pass():
    """The audit tells torch's own kernels from ours."""
    module = build_module(tiny_config("llama"), attn_implementation="sdpa", dtype=torch.float32)
    token_ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.inference_mode():
        found = find_dependence(module, lambda: module(token_ids))
    assert found == "model.layers.0.self_attn.q_proj computes linear"


def test_watching_leaves_no_trace():
    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    adapt_module(module, name="tiny")
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_a_short_context_cannot_be_tested():
    module = build_module(tiny_config("gemma2", max_position_embeddings=20), dtype=torch.float32)
    assert "20 positions is too short" in adapted(module)


def test_self_test_leaves_a_model_as_it_was():
    model = small_model("gemma2", torch.float32)
    assert find_difference(model) is None
    assert find_difference(model) is None
    assert model.info.context_limit >= NUM_TOKENS


def test_report_is_bitwise_without_a_reason():
    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    report = check_invariance(adapt_module(module, name="tiny"), module)
    assert (report.exactness, report.reason) == (Exactness.BITWISE, "")
