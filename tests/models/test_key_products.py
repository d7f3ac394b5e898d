"""Sixteen products at once against each one alone, bit for bit."""

import numpy as np
import pytest

from foretoken.core.jit import jit, jit_borrowing
from foretoken.models import llvm, simd
from foretoken.models.key_products import key_products

STRIDE = 56  # numbers from one query to the next, and from one key to the next


@jit_borrowing
def one_product(q, q_offset, keys, key_offset, size):
    """Return the product of one query and one key, as kernels add up a row of lanes."""
    sums = simd.splat(np.float32(0))
    for i in range(0, size, llvm.LANES):
        count = min(size - i, llvm.LANES)
        key = simd.load_first(keys, key_offset + i, count)
        sums = simd.fma(simd.load(q, q_offset + i), key, sums)
    return simd.total(sums)


@jit
def products_of(num_queries, q, keys, size, slots, first, last, out):
    if num_queries == 4:
        key_products(4, q, 0, STRIDE, keys, 3, STRIDE, size, slots, first, last, out, 0, 16)
    elif num_queries == 2:
        key_products(2, q, 0, STRIDE, keys, 3, STRIDE, size, slots, first, last, out, 0, 16)
    else:
        key_products(1, q, 0, STRIDE, keys, 3, STRIDE, size, slots, first, last, out, 0, 16)


@pytest.mark.parametrize("kind", [np.float32, np.uint16])
@pytest.mark.parametrize("size", [8, 16, 40, 48])
@pytest.mark.parametrize("num_queries", [1, 2, 4])
def test_products_are_those_of_each_query_and_key_alone(num_queries, size, kind):
    rng = np.random.default_rng(size)
    q = np.zeros((4, STRIDE), np.float32)
    q[:, :size] = rng.standard_normal((4, size))
    keys = rng.standard_normal(64 * STRIDE).astype(np.float32)
    if kind == np.uint16:  # bfloat16: the upper half of a float32
        keys = (keys.view(np.uint32) >> 16).astype(np.uint16)
    slots, first = rng.permutation(60), 20
    num_keys = 16 // num_queries
    last = first + num_keys - 2  # the last product repeats the one before it
    out = np.full((num_queries, 16), 7, np.float32)
    products_of(num_queries, q.reshape(-1), keys, size, slots, first, last, out.reshape(-1))
    for query in range(num_queries):
        chosen = [slots[min(first + place, last)] for place in range(num_keys)]
        expected = [
            one_product(q.reshape(-1), query * STRIDE, keys, 3 + slot * STRIDE, size)
            for slot in chosen
        ]
        assert out[query, :num_keys].tolist() == expected
        assert (out[query, num_keys:] == 7).all()
