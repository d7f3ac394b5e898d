"""Activations: an element's bits, wherever it stands and however threads share the work."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from foretoken.models.elementwise import (
    ACTIVATIONS,
    ELEMENTS_AT_A_TIME,
    ELEMENTS_FOR_ALL_THREADS,
    ELEMENTS_PER_THREAD,
    InvariantActivation,
    whole,
)

NAMES = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu")
NAMES += ("sigmoid", "tanh", "mish", "relu2", "hardswish", "laplace", "sqrtsoftplus")
ROW_COUNTS = (*range(1, 10), 16, 17, 33, 64, 65, 127)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_an_element_has_the_same_bits_in_any_company(name, dtype, num_threads, threads):
    threads(num_threads)
    activation = InvariantActivation(ACT2FN[name])
    for width in (1, 37, 48, 1000):  # 127 rows of 1000 are shared among three threads
        generator = torch.Generator().manual_seed(width)
        rows = (2 * torch.randn(130, width, generator=generator)).to(dtype)
        alone = torch.cat([activation(row) for row in rows.split(1)])
        for count in ROW_COUNTS:
            for start in (0, 3):
                together = activation(rows[start : start + count])
                assert torch.equal(together, alone[start : start + count])


def test_half_of_a_row_may_be_given():
    """Gates are often the first half of one product's columns."""
    activation, rows = InvariantActivation(nn.SiLU()), torch.randn(127, 2 * 370)
    alone = torch.cat([activation(row.chunk(2, dim=-1)[0]) for row in rows.split(1)])
    assert torch.equal(activation(rows.chunk(2, dim=-1)[0]), alone)


def test_result_is_that_of_the_function():
    rows = torch.randn(1, 3, 37)
    result = InvariantActivation(nn.SiLU())(rows)
    assert result.shape == rows.shape
    # Vector and scalar exp differ in the last bit.
    torch.testing.assert_close(result, nn.functional.silu(rows), rtol=1e-6, atol=1e-7)


def test_torch_itself_gives_other_bits_in_other_company():
    """What all this is for; if it ever fails, the module can go."""
    rows = torch.randn(64, 37, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([nn.functional.silu(row) for row in rows.split(1)])
    assert not torch.equal(nn.functional.silu(rows), alone)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("multiple_of", [1, 37, 64])
def test_every_thread_gets_whole_vectors(num_threads, multiple_of):
    for num_elements in (1, 63, 64, 65, 32768, 32769, 65537, 100_000, 1_000_003):
        filled = whole(num_elements, multiple_of=multiple_of, num_threads=num_threads)
        assert filled >= num_elements
        assert filled % multiple_of == 0
        for sharers in (
            min(num_threads, -(-filled // ELEMENTS_PER_THREAD)),
            num_threads if filled > ELEMENTS_FOR_ALL_THREADS else 1,
        ):
            share = -(-filled // sharers)  # how torch divides
            assert share % ELEMENTS_AT_A_TIME == 0
            assert filled % share == 0


def test_nothing_is_filled_up_where_vectors_are_whole():
    assert whole(64 * 100) == 64 * 100
    assert whole(2 * ELEMENTS_PER_THREAD, num_threads=2) == 2 * ELEMENTS_PER_THREAD


@pytest.mark.parametrize("name", ["relu", "linear", "leaky_relu"])
def test_functions_without_rounding_need_no_care(name):
    assert not isinstance(ACT2FN[name], ACTIVATIONS)
