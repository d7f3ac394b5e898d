"""Heads without attention as one compiled function: what they say in a few products.

A head of this kind is a layer that mixes some vectors into one (or none), residual layers, and an
LM head. As in a decoder's pass, every thread runs the function on the same arrays, panels of
matrices are claimed, and a row's bits depend on that row alone.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from foretoken.core.jit import jit
from foretoken.models import kernels, simd, threads
from foretoken.models.products import PANEL

# numba knows named tuples, not dataclasses.
HeadShape = namedtuple("HeadShape", "hidden vocab num_layers is_mixing has_shared_lm_head")
HeadWeights = namedtuple("HeadWeights", "mixing mixing_starts mixing_bias layers layers_bias lm")


@jit
def _multiply(x, x_stride, num_rows, w, base, depth, num_panels, out, at, stride, state, counter):
    """Multiply rows with a packed matrix, together with the other threads."""
    out = out[at:]
    step = kernels.panels_per_task(num_rows, num_panels)
    panel = threads.claim(state, counter) * step
    while panel < num_panels:
        stop, following = min(panel + step, num_panels), threads.claim(state, counter) * step
        kernels.multiply(x, x_stride, num_rows, w, base, panel, stop, following, depth, out, stride)
        panel = following


@jit
def _add_silu(product, at, bias, bias_at, size, x, to):
    """Add SiLU(product + bias) to x for one row of a whole number of vectors."""
    one, minus_one = simd.splat(np.float32(1)), simd.splat(np.float32(-1))
    for i in range(0, size, kernels.LANES):
        v = simd.add(simd.load(product, at + i), simd.load(bias, bias_at + i))
        below = simd.add(one, simd.exp(simd.multiply(v, minus_one)))
        simd.store(x, to + i, simd.add(simd.load(x, to + i), simd.divide(v, below)))


@jit
def _add_bias(product, at, bias, bias_at, size, x, to):
    """Write product + bias to x, likewise."""
    for i in range(0, size, kernels.LANES):
        simd.store(x, to + i, simd.add(simd.load(product, at + i), simd.load(bias, bias_at + i)))


@jit
def run_heads(shape, weights, seen, first, num_heads, products, logits, state, num_threads):
    """Run some heads; every thread calls this once with the same arguments.

    Args:
        shape: Sizes of the heads.
        weights: Their parameters, matrices packed, head after head.
        seen: What they see, [R, D]; if they mix, vectors one after the other.
        first: The first head that runs.
        num_heads: How many run.
        products: Room for what the layers' products give: [num_heads, layers, R, padded D], where
            a mixing layer counts twice.
        logits: Flat [num_heads, R, padded vocabulary].
        state: Zeros that all threads share: the barrier, then a counter for each product.
        num_threads: Threads that make this call.
    """
    hidden, num_rows, width = shape.hidden, len(seen), seen.shape[1]
    depth, stride = kernels.round_up(hidden, 2), kernels.round_up(hidden, PANEL)
    num_panels = stride // PANEL
    # Each thread has its own, so that nobody waits; padding stays zero.
    x = np.zeros(num_heads * num_rows * stride, np.float32)
    wide = kernels.round_up(width, PANEL)
    vectors = np.zeros(num_rows * wide, weights.lm.dtype)
    vector = np.zeros(num_rows * stride, weights.lm.dtype)
    counter, arrivals, at = 0, 0, 0
    for index in range(num_heads):
        head, own = first + index, index * num_rows * stride
        for row in range(num_rows):
            if shape.is_mixing:
                kernels.copy_row(seen.reshape(-1), row * width, width, vectors, row * wide)
            else:
                kernels.copy_row(seen.reshape(-1), row * width, width, x, own + row * stride)
        if shape.is_mixing:
            counter += 1
            _multiply(
                vectors, wide, num_rows, weights.mixing, weights.mixing_starts[head],
                kernels.round_up(width, 2), 2 * num_panels, products, at, 2 * stride, state,
                counter,
            )  # fmt: skip
            arrivals += num_threads
            threads.meet(state, arrivals)
            bias = head * 2 * stride
            for row in range(num_rows):
                product, to = at + row * 2 * stride, own + row * stride
                _add_bias(products, product, weights.mixing_bias, bias, stride, x, to)
                product, half = product + stride, bias + stride
                _add_silu(products, product, weights.mixing_bias, half, stride, x, to)
            at += num_rows * 2 * stride
        for layer in range(shape.num_layers):
            for row in range(num_rows):
                kernels.copy_row(x, own + row * stride, hidden, vector, row * stride)
            counter += 1
            place = head * shape.num_layers + layer
            _multiply(
                vector, stride, num_rows, weights.layers, place * stride * depth, depth,
                num_panels, products, at, stride, state, counter,
            )  # fmt: skip
            arrivals += num_threads
            threads.meet(state, arrivals)
            for row in range(num_rows):
                product, to = at + row * stride, own + row * stride
                _add_silu(products, product, weights.layers_bias, place * stride, stride, x, to)
            at += num_rows * stride

    rows = np.zeros(num_heads * num_rows * stride, weights.lm.dtype)
    for row in range(num_heads * num_rows):
        kernels.copy_row(x, row * stride, hidden, rows, row * stride)
    vocab = kernels.round_up(shape.vocab, PANEL)
    if shape.has_shared_lm_head:  # one product for all
        _multiply(
            rows, stride, num_heads * num_rows, weights.lm, 0, depth, vocab // PANEL, logits, 0,
            vocab, state, counter + 1,
        )  # fmt: skip
        return
    for index in range(num_heads):
        _multiply(
            rows[index * num_rows * stride :], stride, num_rows, weights.lm,
            (first + index) * vocab * depth, depth, vocab // PANEL, logits,
            index * num_rows * vocab, vocab, state, counter + 1 + index,
        )  # fmt: skip
