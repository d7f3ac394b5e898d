"""Mixture-of-experts layers alone: right, and no row depends on the others."""

import pytest
import torch

from foretoken.models.experts import is_experts, is_packed_experts
from foretoken.models.packing import pack_module
from tests.fakes import build_module, tiny_config

FAMILIES = ("mixtral", "gpt_oss")


def blocks(family, dtype, **changes):
    """Return a model's first layer of experts with its router, as it was and packed."""
    before = build_module(tiny_config(family, **changes), dtype=dtype)
    after = build_module(tiny_config(family, **changes), dtype=dtype)
    pack_module(after)
    return before.model.layers[0].mlp, after.model.layers[0].mlp


def output_of(block, rows):
    with torch.inference_mode():
        output = block(rows.unsqueeze(0))
    return (output[0] if isinstance(output, tuple) else output)[0]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("width", [37, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_bits_in_any_company(family, dtype, width, num_threads, threads):
    threads(num_threads)
    _, block = blocks(family, dtype, intermediate_size=width)
    rows = torch.randn(300, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone = torch.cat([output_of(block, row) for row in rows[:40].split(1)])
    for count in (2, 3, 4, 7, 8, 17, 33, 40):
        assert torch.equal(output_of(block, rows[:count]), alone[:count])
        assert torch.equal(output_of(block, rows[40 - count : 40]), alone[40 - count :])
    assert torch.equal(output_of(block, rows)[:40], alone)


# bfloat16 rounds between the parts of a block, with 8 bits.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_that_of_transformers(family, dtype, tolerance):
    before, after = blocks(family, dtype)
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = output_of(before, rows)
    torch.testing.assert_close(output_of(after, rows), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_experts_run_too(family):
    """float64 has no packed form; 1e-15 is its rounding, router probabilities are float32."""
    module = build_module(tiny_config(family))
    rows = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = output_of(module.model.layers[0].mlp, rows)
    module.set_experts_implementation("foretoken")
    found = output_of(module.model.layers[0].mlp, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_keep_no_second_copy(family):
    before, after = blocks(family, torch.float32)
    assert is_experts(before.experts)
    assert is_packed_experts(after.experts)
    assert not any(parameter.dim() > 2 for parameter in after.experts.parameters())
