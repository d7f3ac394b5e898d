"""Packed linear layers: every row's bits, whatever rows share the call, and the rules for it."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from foretoken.errors import ModelError
from foretoken.models import packed
from foretoken.models.elementwise import InvariantActivation
from foretoken.models.modules import adapt_module
from foretoken.models.packed import (
    COUNTS,
    FIXED_COUNT,
    PackedLinear,
    PackedWeight,
    RowRule,
    measure_rule,
    pack_matrix,
)
from foretoken.models.packing import check_finite, pack_module
from tests.fakes import build_module, tiny_config

DTYPES = (torch.float32, torch.bfloat16)
ROW_COUNTS = (*range(1, 10), 16, 17, 33, 64, 65, 128, 257, 512, 513)
# Odd sizes, several vectors, more columns than rows and the other way round.
SHAPES = ((1, 32), (37, 100), (100, 37), (512, 1376), (2048, 512))


def random_matrix(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)


def random_rows(count, width, dtype, seed=1):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- rows are independent --------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(shape, dtype, has_bias):
    bias = random_matrix((shape[0],), dtype) if has_bias else None
    matrix = pack_matrix(random_matrix(shape, dtype), bias)
    rows = random_rows(520, shape[1], dtype)
    alone = torch.cat([matrix(row) for row in rows[:64].split(1)])
    for count in ROW_COUNTS:
        for start in (0, 1, 7):
            together = matrix(rows[start : start + count])
            num_compared = max(0, min(count, 64 - start))
            assert torch.equal(together[:num_compared], alone[start:][:num_compared])
    assert torch.equal(matrix(rows)[:64], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent_with_two_threads(dtype, threads):
    threads(2)
    matrix = pack_matrix(random_matrix((300, 777), dtype))
    rows = random_rows(513, 777, dtype)
    expected = matrix(rows)
    for count in ROW_COUNTS:
        assert torch.equal(matrix(rows[-count:]), expected[-count:])


# The product in another order of summation: a few units in the last place.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_torch(shape, dtype, tolerance):
    weight, bias = random_matrix(shape, dtype), random_matrix((shape[0],), dtype)
    rows = random_rows(11, shape[1], dtype).view(1, 11, -1)
    product = pack_matrix(weight, bias)(rows)
    assert product.shape == (1, 11, shape[0])
    assert product.dtype == dtype
    torch.testing.assert_close(
        product, functional.linear(rows, weight, bias), rtol=0, atol=tolerance
    )


def test_no_rows_give_no_rows():
    matrix = pack_matrix(random_matrix((5, 8), torch.float32))
    assert matrix(torch.empty(1, 0, 8)).shape == (1, 0, 5)


# -- rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "num_rows", "calls"),
    [
        (COUNTS, 1, [2]),
        (COUNTS, 3, [4]),
        (COUNTS, 64, [64]),
        (COUNTS, 65, [64, 2]),
        (COUNTS, 300, [256, 48]),
        (COUNTS, 512, [256, 256]),
        ((8,), 1, [8]),
        ((8,), 20, [8, 8, 8]),
        ((4, 512), 100, [4] * 25),
    ],
)
def test_kernel_is_called_with_permitted_counts_only(counts, num_rows, calls):
    seen = []

    def kernel(rows):
        seen.append(len(rows))
        return 2 * rows

    rows = random_rows(num_rows, 3, torch.float32)
    assert torch.equal(RowRule(counts).apply(kernel, rows), 2 * rows)
    assert seen == calls


def fake_kernel(noise):
    """Return a kernel that adds `noise(count)`, one number per row, to its rows."""
    return lambda rows: rows + noise(len(rows)).view(-1, 1)


def test_counts_that_disagree_are_left_out():
    kernel = fake_kernel(lambda count: torch.full((count,), float(count in (2, 12))))
    rule = measure_rule(kernel, 4, 4, torch.float32)
    assert rule == RowRule(tuple(count for count in COUNTS if count not in (2, 12)))


def test_one_count_serves_all_where_small_ones_disagree():
    kernel = fake_kernel(lambda count: torch.full((count,), float(count)))
    assert measure_rule(kernel, 4, 4, torch.float32) == RowRule((FIXED_COUNT,))


def test_there_is_no_rule_where_a_rows_place_matters():
    assert measure_rule(fake_kernel(torch.arange), 4, 4, torch.float32) is None


def test_wide_matrices_are_measured_with_few_rows():
    seen = []

    def kernel(rows):
        seen.append(len(rows))
        return rows.repeat(1, 1 << 15)

    assert max(measure_rule(kernel, 1, 1 << 15, torch.float32).counts) == 64
    assert max(seen) == 64


def test_a_kind_of_matrix_is_measured_once(monkeypatch):
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        return RowRule(COUNTS)

    monkeypatch.setattr(packed, "measure_rule", measure)
    weight = random_matrix((3, 1033), torch.float32)
    for bias in (None, None, weight[:, 0]):
        assert pack_matrix(weight, bias) is not None
    assert len(calls) == 2


@pytest.mark.parametrize("failure", [None, RuntimeError("could not create a primitive")])
def test_matrix_without_a_rule_is_not_packed(monkeypatch, failure):
    def measure(*arguments):
        if failure:
            raise failure
        return failure

    monkeypatch.setattr(packed, "measure_rule", measure)
    monkeypatch.setattr(packed, "_RULES", {})
    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    pack_module(module)
    assert not any(isinstance(layer, PackedLinear) for layer in module.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_not_packed(dtype):
    assert pack_matrix(torch.ones(4, 4, dtype=dtype)) is None


def test_empty_matrices_are_not_packed():
    assert pack_matrix(torch.ones(0, 4)) is None


# -- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weight_comes_back_bit_for_bit(dtype):
    weight = random_matrix((37, 100), dtype)
    assert torch.equal(pack_matrix(weight).dense(), weight)
    assert torch.equal(pack_matrix(weight.t()).dense(), weight.t())


@pytest.mark.parametrize("is_transposed", [False, True])
def test_weight_may_be_converted_on_the_way(is_transposed):
    weight, bias = random_matrix((37, 100), torch.bfloat16), torch.ones(37, dtype=torch.bfloat16)
    weight = weight.t().contiguous().t() if is_transposed else weight
    matrix = pack_matrix(weight, bias, torch.float32)
    assert torch.equal(matrix.dense(), weight.float())
    assert matrix.bias.dtype == torch.float32


def test_packed_layer_shows_its_weight():
    weight, bias = random_matrix((37, 100), torch.float32), random_matrix((37,), torch.float32)
    layer = PackedLinear(pack_matrix(weight, bias))
    assert (layer.weight.shape, layer.weight.dtype) == ((37, 100), torch.float32)
    assert layer.weight.device == weight.device
    assert torch.equal(layer.weight + 0, weight)
    assert torch.equal(torch.ones(2, 100) @ layer.weight.t(), torch.ones(2, 100) @ weight.t())
    assert torch.equal(layer.bias, bias)
    assert "in_features=100, out_features=37" in repr(layer)


def test_product_with_a_shown_weight_is_packed():
    weight, bias = random_matrix((37, 100), torch.float32), random_matrix((37,), torch.float32)
    layer, rows = PackedLinear(pack_matrix(weight, bias)), random_rows(5, 100, torch.float32)
    with torch.inference_mode():
        assert torch.equal(functional.linear(rows, layer.weight, bias), layer(rows))
        assert torch.equal(functional.linear(rows[:1], layer.weight, layer.bias), layer(rows)[:1])
        without = functional.linear(rows, layer.weight)
    assert type(without) is torch.Tensor
    assert torch.equal(without, pack_matrix(weight)(rows))


@pytest.mark.parametrize("convert", [torch.Tensor.float, lambda w: w.type(torch.float32)])
def test_converted_weight_stays_packed(convert):
    """Many routers multiply in float32 whatever the dtype of the model."""
    weight = random_matrix((37, 100), torch.bfloat16)
    shown, rows = PackedWeight(pack_matrix(weight)), random_rows(5, 100, torch.float32)
    assert torch.equal(functional.linear(rows, convert(shown)), pack_matrix(weight.float())(rows))
    assert convert(shown) is convert(shown)


# -- modules ---------------------------------------------------------------------------------


def test_layers_are_replaced_and_their_weights_freed():
    module = build_module(tiny_config("gemma2"), dtype=torch.float32)
    mlp = module.model.layers[0].mlp
    freed = [weakref.ref(mlp.up_proj.weight), weakref.ref(module.lm_head.weight)]
    embedding = module.get_input_embeddings().weight
    pack_module(module)
    gc.collect()
    assert [reference() for reference in freed] == [None, None]
    assert isinstance(mlp.up_proj, PackedLinear)
    assert isinstance(mlp.act_fn, InvariantActivation)
    assert module.get_input_embeddings().weight is embedding


def test_tied_embedding_stays_and_the_output_layer_is_packed():
    module = build_module(tiny_config("gemma2", tie_word_embeddings=True), dtype=torch.float32)
    embedding = module.get_input_embeddings().weight
    pack_module(module)
    assert torch.equal(module.lm_head.matrix.dense(), embedding)


def test_convolutions_of_gpt2_are_packed():
    layer = Conv1D(7, 100)
    nn.init.normal_(layer.bias)
    parent = nn.ModuleDict({"layer": layer})
    rows = random_rows(3, 100, torch.float32)
    expected = layer(rows)
    pack_module(parent)
    assert isinstance(parent["layer"], PackedLinear)
    # One addition in another order.
    torch.testing.assert_close(parent["layer"](rows), expected, rtol=0, atol=1e-6)


def test_wrapped_and_derived_layers_are_left_alone():
    class Derived(nn.Linear):
        pass

    parent = nn.ModuleDict({"derived": Derived(4, 4), "wrapped": nn.Linear(4, 4)})
    parent["wrapped"].forward = lambda x: x
    before = dict(parent.items())
    pack_module(parent)
    assert dict(parent.items()) == before


def test_packing_twice_changes_nothing():
    module = build_module(tiny_config("mixtral"), dtype=torch.float32)
    pack_module(module)
    before = list(module.modules())
    pack_module(module)
    assert list(module.modules()) == before


def test_module_is_converted_while_it_is_packed():
    module = build_module(tiny_config("gemma2"), dtype=torch.bfloat16)
    model = adapt_module(module, name="tiny", dtype=torch.float32)
    assert model.info.dtype == torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.lm_head.matrix.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers_are_refused(name, number, dtype):
    module = build_module(tiny_config("gemma2"), dtype=dtype)
    module.get_parameter(name).view(-1)[-3] = number
    with pytest.raises(ModelError, match=f"some/model: the tensor '{name}' holds NaN") as caught:
        check_finite(module, "some/model")
    assert "broken" in caught.value.hint


def test_model_with_nan_is_not_adapted():
    module = build_module(tiny_config("gpt2"), dtype=torch.float32)
    module.transformer.h[2].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"transformer\.h\.2\.mlp\.c_fc\.weight"):
        adapt_module(module, name="some/model")
