"""Compiled building blocks of a forward pass; the bits of a row depend on that row alone.

Every sum has one order: products over the inner dimension ascending, attention over the positions
of the row's own past ascending (cached positions, then its ancestors by depth, wherever they lie),
everything else in sixteen lanes that are added by halves. How many rows share a call, which thread
computes them and where they lie in memory changes nothing.

Matrices are packed by `pack`: panels of 16 columns, each `depth` times 16 numbers.
"""

from __future__ import annotations

import math

import numpy as np

from foretoken.core.jit import jit, jit_borrowing
from foretoken.models import llvm, simd
from foretoken.models.products import CACHE_LINE, PANEL, block_product

LANES = llvm.LANES
# Rows that are multiplied together. Sums of 12 fill 24 registers of 32, and the compiler keeps some
# in memory: in bfloat16 blocks of 10 or 11 took longer than two of half as many, and 22 or 32 rows
# a third longer than in blocks of up to 8; in float32 12 rows took as long as 20.
LARGEST_BLOCK = 8
MOST_PANELS = 4  # that one row is multiplied with together


def padded(count: int, multiple: int = LANES) -> int:
    """Return the next multiple."""
    return -(-count // multiple) * multiple


def packed_shape(num_columns: int, depth: int) -> tuple[int, int, int]:
    """Return the shape that `pack` fills: panels, rows of a panel, columns of a panel."""
    return -(-num_columns // PANEL), padded(depth, 2), PANEL


def pack(weight: np.ndarray, out: np.ndarray) -> None:
    """Write a matrix into panels of 32 columns.

    Args:
        weight: [columns, depth], as `nn.Linear` keeps it: float32, or bfloat16 as uint16.
        out: Zeros of `packed_shape`, of the same type. In bfloat16 the rows of a panel lie two by
            two: [panels, depth / 2, 32, 2] in memory.
    """
    weight = np.ascontiguousarray(weight)
    if weight.dtype == np.uint16:
        _pack_pairs(weight, out.reshape(len(out), -1, PANEL, 2))
    else:
        _pack_singles(weight, out)


@jit
def _pack_singles(weight, out):
    """Write [columns, depth] as [panels, depth, 32]."""
    num_columns, depth = weight.shape
    for panel in range(len(out)):
        last = min(PANEL, num_columns - panel * PANEL)
        for first in range(0, depth, LANES):  # a cache line of every column at a time
            for k in range(first, min(first + LANES, depth)):
                for column in range(last):
                    out[panel, k, column] = weight[panel * PANEL + column, k]


@jit
def _pack_pairs(weight, out):
    """Write [columns, depth] as [panels, depth / 2, 32, 2]."""
    num_columns, depth = weight.shape
    for panel in range(len(out)):
        last = min(PANEL, num_columns - panel * PANEL)
        for first in range(0, depth, 2 * LANES):
            for k in range(first, min(first + 2 * LANES, depth)):
                for column in range(last):
                    out[panel, k >> 1, column, k & 1] = weight[panel * PANEL + column, k]


def is_finite(array: np.ndarray) -> bool:
    """Whether an array, float32 or bfloat16 as uint16, holds neither NaN nor infinity."""
    flat = array.reshape(-1)
    if flat.dtype == np.uint16:
        return not _has_all_ones(flat, np.uint16(0x7F80))
    return not _has_all_ones(flat.view(np.uint32), np.uint32(0x7F800000))


@jit
def _has_all_ones(bits, exponent):
    """Whether all bits of the exponent are set somewhere."""
    found = False
    for i in range(len(bits)):
        found |= (bits[i] & exponent) == exponent
    return found


# -- linear layers -------------------------------------------------------------------------------


@jit_borrowing
def panels_per_task(num_rows, num_panels):
    """Return how many panels to multiply at a time: of one row, more, to keep loads in flight."""
    if num_rows > 1:
        return 1
    num_tasks = (num_panels + MOST_PANELS - 1) // MOST_PANELS
    return (num_panels + num_tasks - 1) // num_tasks  # as even as possible


@jit_borrowing
def multiply(x, x_stride, num_rows, w, base, panel, stop, following, depth, out, stride):
    """Multiply rows with the panels [panel, stop) of a matrix, at most `panels_per_task`.

    Rows are taken in blocks, as even as possible: a row alone would keep the processor waiting
    for each of its sums. The panel that comes next is fetched meanwhile.

    Args:
        base: Where in `w` the matrix begins.
        following: Panel that this thread multiplies next.
        out: Flat rows of all panels, `stride` apart.
    """
    w_offset, next_offset = base + panel * depth * PANEL, base + following * depth * PANEL
    if num_rows == 1:
        _multiply_one(x, w, w_offset, stop - panel, depth, out, panel * PANEL)
        return
    out_offset = panel * PANEL
    num_blocks = (num_rows + LARGEST_BLOCK - 1) // LARGEST_BLOCK
    line = CACHE_LINE // w.itemsize
    row = 0
    for block in range(num_blocks):
        stop = num_rows * (block + 1) // num_blocks
        at, to = row * x_stride, out_offset + row * stride
        # Blocks take turns in fetching the next panel's cache lines; one alone fetches all.
        fetch = next_offset + block % 2 * line
        too = fetch + line if num_blocks == 1 else fetch
        count = stop - row  # which has to be a literal
        if count == 8:
            block_product(8, 1, x, at, x_stride, w, w_offset, fetch, too, depth, out, to, stride)
        elif count == 7:
            block_product(7, 1, x, at, x_stride, w, w_offset, fetch, too, depth, out, to, stride)
        elif count == 6:
            block_product(6, 1, x, at, x_stride, w, w_offset, fetch, too, depth, out, to, stride)
        elif count == 5:
            block_product(5, 1, x, at, x_stride, w, w_offset, fetch, too, depth, out, to, stride)
        elif count == 4:
            block_product(4, 1, x, at, x_stride, w, w_offset, fetch, too, depth, out, to, stride)
        elif count == 3:
            block_product(3, 1, x, at, x_stride, w, w_offset, fetch, too, depth, out, to, stride)
        else:
            block_product(2, 1, x, at, x_stride, w, w_offset, fetch, too, depth, out, to, stride)
        row = stop


@jit_borrowing
def _multiply_one(x, w, w_offset, num_panels, depth, out, out_offset):
    """Multiply one row with 1 to 4 panels."""
    if num_panels == 4:
        block_product(1, 4, x, 0, 0, w, w_offset, 0, 0, depth, out, out_offset, 0)
    elif num_panels == 3:
        block_product(1, 3, x, 0, 0, w, w_offset, 0, 0, depth, out, out_offset, 0)
    elif num_panels == 2:
        block_product(1, 2, x, 0, 0, w, w_offset, 0, 0, depth, out, out_offset, 0)
    else:
        block_product(1, 1, x, 0, 0, w, w_offset, 0, 0, depth, out, out_offset, 0)


# -- rows ----------------------------------------------------------------------------------------


@jit_borrowing
def rms_norm(x, x_offset, size, weight, weight_offset, epsilon, out, out_offset):
    """Write x / sqrt(mean(x^2) + epsilon) * weight for one row."""
    squares = simd.splat(np.float32(0))
    num_full = size // LANES * LANES
    for i in range(0, num_full, LANES):
        v = simd.load(x, x_offset + i)
        squares = simd.fma(v, v, squares)
    rest = size - num_full
    if rest:
        v = simd.load_first(x, x_offset + num_full, rest)
        squares = simd.fma(v, v, squares)
    mean = simd.total(squares) / np.float32(size)
    scale = simd.splat(np.float32(1) / np.float32(math.sqrt(mean + np.float32(epsilon))))
    for i in range(0, num_full, LANES):
        v = simd.multiply(simd.load(x, x_offset + i), scale)
        simd.store(out, out_offset + i, simd.multiply(v, simd.load(weight, weight_offset + i)))
    if rest:
        v = simd.multiply(simd.load_first(x, x_offset + num_full, rest), scale)
        w = simd.load_first(weight, weight_offset + num_full, rest)
        simd.store_first(out, out_offset + num_full, simd.multiply(v, w), rest)


@jit_borrowing
def silu_times(gate, gate_offset, up, up_offset, out, out_offset):
    """Write silu(gate) * up for 16 numbers."""
    one = simd.splat(np.float32(1))
    g = simd.load(gate, gate_offset)
    sigmoid_below = simd.add(one, simd.exp(simd.multiply(g, simd.splat(np.float32(-1)))))
    value = simd.multiply(simd.divide(g, sigmoid_below), simd.load(up, up_offset))
    simd.store(out, out_offset, value)


@jit_borrowing
def rotate(x, x_offset, half, table, table_offset):
    """Apply a rotary embedding in place to 2 * half numbers; pairs lie `half` apart.

    Args:
        table: For each position `half` cosines, then `half` sines.
    """
    for i in range(half):
        c, s = table[table_offset + i], table[table_offset + half + i]
        a, b = x[x_offset + i], x[x_offset + half + i]
        x[x_offset + i] = a * c - b * s
        x[x_offset + half + i] = b * c + a * s


@jit_borrowing
def copy_row(x, x_offset, size, out, out_offset):
    """Copy numbers from one array into another, which may hold another type."""
    num_full = size // LANES * LANES
    for i in range(0, num_full, LANES):
        simd.store(out, out_offset + i, simd.load(x, x_offset + i))
    if size > num_full:
        rest = size - num_full
        last = simd.load_first(x, x_offset + num_full, rest)
        simd.store_first(out, out_offset + num_full, last, rest)


@jit_borrowing
def round_up(count, multiple):
    """Return the next multiple, inside compiled code."""
    return (count + multiple - 1) // multiple * multiple
