"""A pass of an EAGLE head in compiled code, of the parts that plain decoders are made of.

A head is one layer, so its pass is short: through torch it would take several times as long as
its arithmetic does. As there, every thread runs `run_head` on the same arrays.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from foretoken.core.jit import jit
from foretoken.models import decoder_kernels, kernels, threads
from foretoken.models.layout import unpack_compiled
from foretoken.models.products import PANEL

NUM_COUNTERS = 12  # the barrier, then one for each part; some to spare

# As `decoder_kernels.Weights`, of one layer. What a head does not have is empty.
HeadWeights = namedtuple(
    "HeadWeights",
    "embedding hidden_norm fc fc_bias input_norm qkv qkv_bias q_norm k_norm output post_norm "
    "gate_up down final_norm head windows",
)


@jit
def _product(rows, row_stride, num_rows, w, num_panels, depth, bias, out, state, counter):
    """Multiply rows with a matrix, task by task, and add a bias if there is one."""
    stride = num_panels * PANEL
    step = kernels.panels_per_task(num_rows, num_panels)
    panel = threads.claim(state, counter) * step
    while num_rows > 0 and panel < num_panels:
        stop, following = min(panel + step, num_panels), threads.claim(state, counter) * step
        kernels.multiply(
            rows, row_stride, num_rows, w, 0, panel, stop, following, depth, out, stride
        )
        if len(bias):
            for row in range(num_rows):
                for i in range(panel * PANEL, stop * PANEL):
                    out[row * stride + i] += bias[i]
        panel = following


@jit
def _norm_or_copy(x, x_offset, size, weight, epsilon, out, out_offset):
    """Normalize a row if there is a weight to do it with."""
    if len(weight):
        kernels.rms_norm(x, x_offset, size, weight, 0, epsilon, out, out_offset)
    else:
        kernels.copy_row(x, x_offset, size, out, out_offset)


@jit
def run_head(
    shape,
    weights,
    adds_normed,
    packed_layout,
    states,
    wanted,
    keys,
    values,
    rotary,
    buffers,
    logits,
    outputs,
    state,
    num_threads,
):
    """Run a head over the rows of a batch; every thread calls this once with the same arguments.

    Args:
        shape: Sizes of the layer; `vocab` is the number of tokens that the head can say.
        weights: Its parameters; the embedding is normalized already. With a `hidden_norm` it is an
            EAGLE-3 head, with an `fc` an EAGLE-1 head.
        adds_normed: Whether the layer of an EAGLE-3 head adds to the normalized state.
        packed_layout: The rows of the batch, for `unpack`.
        states: What each row reads beside its token, [R, hidden].
        wanted: Rows whose logits are wanted, [W].
        keys: Flat [slots, kv_heads, head_dim].
        values: The same.
        rotary: Flat [positions, 2 * rotary_half].
        buffers: The residual stream and what the parts of the layer hand on: flat, padded rows.
        logits: Flat [wanted rows, padded vocabulary].
        outputs: The residual stream after the layer, [R, hidden].
        state: Zeros that all threads share: the barrier, then a counter for each part.
        num_threads: Threads that make this call.
    """
    x, qkv, mixed, projected = buffers[:4]
    layout = unpack_compiled(packed_layout)
    num_rows, num_segments = len(layout.token_ids), len(layout.num_cached)
    hidden, epsilon = shape.hidden, shape.epsilon
    stride, wide = kernels.round_up(hidden, PANEL), kernels.round_up(2 * hidden, PANEL)
    flat_states = states.reshape(-1)
    # Each thread has its own, so that nobody waits; of the type of the matrices, padding zero.
    read = np.zeros(num_rows * wide, weights.head.dtype)
    normed = np.zeros(num_rows * stride, weights.head.dtype)
    for row in range(num_rows):
        at = layout.token_ids[row] * hidden
        kernels.copy_row(weights.embedding, at, hidden, read, row * wide)
        _norm_or_copy(
            flat_states, row * hidden, hidden, weights.hidden_norm, epsilon, read,
            row * wide + hidden,
        )  # fmt: skip
    counter, arrivals = 1, num_threads
    if len(weights.fc):
        _product(
            read, wide, num_rows, weights.fc, stride // PANEL, 2 * hidden, weights.fc_bias, x,
            state, counter,
        )  # fmt: skip
    elif threads.claim(state, counter) == 0:
        for row in range(num_rows):
            if adds_normed:
                kernels.rms_norm(
                    flat_states, row * hidden, hidden, weights.hidden_norm, 0, epsilon, x,
                    row * stride,
                )  # fmt: skip
            else:
                kernels.copy_row(flat_states, row * hidden, hidden, x, row * stride)
    threads.meet(state, arrivals)

    counter += 1
    q_size = shape.heads * shape.head_dim
    qkv_stride = kernels.round_up(q_size + 2 * shape.kv_heads * shape.head_dim, PANEL)
    if len(weights.fc):
        for row in range(num_rows):
            _norm_or_copy(
                x, row * stride, hidden, weights.input_norm, epsilon, normed, row * stride
            )
        _product(
            normed, stride, num_rows, weights.qkv, qkv_stride // PANEL,
            kernels.round_up(hidden, 2), weights.qkv_bias, qkv, state, counter,
        )  # fmt: skip
    else:
        _product(
            read, wide, num_rows, weights.qkv, qkv_stride // PANEL, 2 * hidden, weights.qkv_bias,
            qkv, state, counter,
        )  # fmt: skip
    arrivals += num_threads
    threads.meet(state, arrivals)

    counter += 1
    task = threads.claim(state, counter)
    while task < num_segments * shape.kv_heads:
        segment, head = divmod(task, shape.kv_heads)
        decoder_kernels.attend_heads(
            shape, weights, layout, 0, 0, segment, head, qkv, qkv_stride, keys, values, rotary,
            mixed,
        )  # fmt: skip
        task = threads.claim(state, counter)
    arrivals += num_threads
    threads.meet(state, arrivals)

    counter += 1
    decoder_kernels.project_and_add(
        mixed, q_size, num_rows, weights.output, 0, kernels.round_up(q_size, 2), projected, x,
        stride, state, counter,
    )  # fmt: skip
    arrivals += num_threads
    threads.meet(state, arrivals)
    counter, arrivals = decoder_kernels.add_mlp(
        shape, weights, 0, num_rows, buffers, normed, state, counter, arrivals, num_threads
    )

    counter += 1
    if threads.claim(state, counter) == 0:
        decoder_kernels.copy_rows(x, stride, outputs)
    num_wanted = len(wanted)
    for i in range(num_wanted):
        _norm_or_copy(
            x, wanted[i] * stride, hidden, weights.final_norm, epsilon, normed, i * stride
        )
    counter += 1
    _product(
        normed, stride, num_wanted, weights.head, kernels.round_up(shape.vocab, PANEL) // PANEL,
        kernels.round_up(hidden, 2), weights.final_norm[:0], logits, state, counter,
    )  # fmt: skip
    arrivals += num_threads
    threads.meet(state, arrivals)


@jit
def fuse_rows(states, norm, epsilon, weight, bias, num_panels, out, state, num_threads):
    """Multiply rows of joined states of the target; every thread calls this once, likewise.

    Args:
        states: [R, in] float32.
        norm: Of an RMS norm before the product, [in]; empty for none.
        epsilon: Of that norm.
        weight: Packed panels of [out, in], flat.
        bias: [padded out]; empty for none.
        num_panels: Of the matrix.
        out: Flat [R, padded out].
        state: Zeros that all threads share: the barrier, where nobody waits, and a counter.
        num_threads: Threads that make this call.
    """
    num_rows, width = states.shape
    stride, flat = kernels.round_up(width, PANEL), states.reshape(-1)
    # Each thread has its own, so that nobody waits; of the type of the matrix, padding zero.
    read = np.zeros(num_rows * stride, weight.dtype)
    for row in range(num_rows):
        _norm_or_copy(flat, row * width, width, norm, epsilon, read, row * stride)
    _product(
        read, stride, num_rows, weight, num_panels, kernels.round_up(width, 2), bias, out, state, 1
    )
