"""A whole forward pass of a plain decoder in compiled code, by any number of threads.

Every thread runs `run_pass` on the same arrays. Work is cut into tasks (two panels of a matrix, one
group of heads of one segment) that threads claim from a counter; between two parts of a layer
they wait for each other. Which thread does a task changes no bit of it.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from foretoken.core.jit import jit, jit_borrowing
from foretoken.models import attention_kernels, kernels, llvm, simd, threads
from foretoken.models.layout import unpack_compiled
from foretoken.models.products import PANEL

LANES = llvm.LANES
COUNTERS_PER_LAYER = 6
OTHER_COUNTERS = 3  # the barrier, the embedding, the logits

# numba knows named tuples, not dataclasses.
Shape = namedtuple(
    "Shape",
    "hidden heads kv_heads head_dim rotary_half intermediate vocab epsilon scaling",
)
Weights = namedtuple(
    "Weights",
    "embedding input_norm qkv qkv_bias q_norm k_norm output post_norm gate_up down final_norm head "
    "windows",
)


@jit_borrowing
def _add_columns(target, stride, source, num_rows, first, last):
    """Add some columns of one array to another of the same layout."""
    for row in range(num_rows):
        for i in range(row * stride + first, row * stride + last, LANES):
            simd.store(target, i, simd.add(simd.load(target, i), simd.load(source, i)))


@jit_borrowing
def project_and_add(
    rows, row_stride, num_rows, w, layer, depth, projected, x, stride, state, counter
):  # fmt: skip
    """Add a projection of the rows to the residual stream x, column by column."""
    num_panels = stride // PANEL
    step = kernels.panels_per_task(num_rows, num_panels)
    base = layer * stride * depth
    panel = threads.claim(state, counter) * step
    while panel < num_panels:
        stop, following = min(panel + step, num_panels), threads.claim(state, counter) * step
        kernels.multiply(
            rows, row_stride, num_rows, w, base, panel, stop, following, depth, projected, stride
        )
        _add_columns(x, stride, projected, num_rows, panel * PANEL, stop * PANEL)
        panel = following


@jit_borrowing
def _normalize(x, stride, num_rows, hidden, weight, layer, epsilon, out):
    """Normalize all rows."""
    for row in range(num_rows):
        at = row * stride
        kernels.rms_norm(x, at, hidden, weight, layer * hidden, epsilon, out, at)


@jit
def attend_heads(
    shape, weights, layout, layer, at_layer, segment, head, qkv, qkv_stride, keys, values, rotary,
    out,
):  # fmt: skip
    """Normalize, rotate and store keys and values of one key head; attend for its queries."""
    dim, half = shape.head_dim, shape.rotary_half
    group = shape.heads // shape.kv_heads
    first, last = layout.row_starts[segment], layout.row_starts[segment + 1]
    num_rows = last - first
    q_stride = kernels.round_up(dim, LANES)
    q = np.zeros(num_rows * group * q_stride, np.float32)
    key_offset = (shape.heads + head) * dim
    value_offset = (shape.heads + shape.kv_heads + head) * dim
    row_size = shape.kv_heads * dim
    base = at_layer + head * dim
    for row in range(first, last):
        rotation = layout.positions[row] * 2 * half
        at = row * qkv_stride + key_offset
        if len(weights.k_norm):
            kernels.rms_norm(qkv, at, dim, weights.k_norm, layer * dim, shape.epsilon, qkv, at)
        kernels.rotate(qkv, at, half, rotary, rotation)
        to = base + layout.new_slots[row] * row_size
        kernels.copy_row(qkv, at, dim, keys, to)
        kernels.copy_row(qkv, row * qkv_stride + value_offset, dim, values, to)
        for i in range(group):
            at = row * qkv_stride + (head * group + i) * dim
            to = ((row - first) * group + i) * q_stride
            if len(weights.q_norm):
                kernels.rms_norm(qkv, at, dim, weights.q_norm, layer * dim, shape.epsilon, q, to)
            else:
                kernels.copy_row(qkv, at, dim, q, to)
            kernels.rotate(q, to, half, rotary, rotation)
    key_start, node_start = layout.key_starts[segment], layout.node_starts[segment]
    key_stop, node_stop = layout.key_starts[segment + 1], layout.node_starts[segment + 1]
    sinks = np.full(group, -np.inf, np.float32)
    out_stride = shape.heads * dim
    attention_kernels.attend(
        q,
        q_stride,
        num_rows,
        group,
        layout.first_staged[segment],
        layout.slots[key_start:key_stop],
        layout.num_cached[segment],
        layout.parents[node_start:node_stop],
        layout.depths[node_start:node_stop],
        keys,
        base,
        row_size,
        dim,
        values,
        base,
        row_size,
        dim,
        shape.scaling,
        weights.windows[layer],
        0.0,
        sinks,
        out,
        first * out_stride + head * group * dim,
        out_stride,
    )


@jit
def copy_rows(x, stride, out):
    """Copy rows without their padding into [R, hidden]."""
    num_rows, size = out.shape
    flat = out.reshape(-1)
    for row in range(num_rows):
        kernels.copy_row(x, row * stride, size, flat, row * size)


@jit
def _add_attention(
    shape, weights, layout, layer, cache_layer, layer_size, keys, values, rotary, buffers, normed,
    state, counter, arrivals, num_threads,
):  # fmt: skip
    """Add one layer's attention to the residual stream; return the counter and the arrivals."""
    x, qkv, mixed, projected = buffers[:4]
    num_rows, num_segments = len(layout.token_ids), len(layout.num_cached)
    hidden, depth = shape.hidden, kernels.round_up(shape.hidden, 2)
    stride = kernels.round_up(hidden, PANEL)
    q_size = shape.heads * shape.head_dim
    qkv_stride = kernels.round_up(q_size + 2 * shape.kv_heads * shape.head_dim, PANEL)

    _normalize(x, stride, num_rows, hidden, weights.input_norm, layer, shape.epsilon, normed)
    counter += 1
    base, num_panels = layer * qkv_stride * depth, qkv_stride // PANEL
    step = kernels.panels_per_task(num_rows, num_panels)
    panel = threads.claim(state, counter) * step
    while panel < num_panels:
        stop, following = min(panel + step, num_panels), threads.claim(state, counter) * step
        kernels.multiply(
            normed, stride, num_rows, weights.qkv, base, panel, stop, following, depth, qkv,
            qkv_stride,
        )  # fmt: skip
        if len(weights.qkv_bias):
            for row in range(num_rows):
                for i in range(panel * PANEL, stop * PANEL):
                    qkv[row * qkv_stride + i] += weights.qkv_bias[layer * qkv_stride + i]
        panel = following
    arrivals += num_threads
    threads.meet(state, arrivals)

    counter += 1
    task = threads.claim(state, counter)
    while task < num_segments * shape.kv_heads:
        segment, head = divmod(task, shape.kv_heads)
        at_layer = (cache_layer + layout.shifts[segment]) * layer_size
        attend_heads(
            shape, weights, layout, layer, at_layer, segment, head, qkv, qkv_stride, keys, values,
            rotary, mixed,
        )  # fmt: skip
        task = threads.claim(state, counter)
    arrivals += num_threads
    threads.meet(state, arrivals)

    counter += 1
    project_and_add(
        mixed, q_size, num_rows, weights.output, layer, kernels.round_up(q_size, 2), projected, x,
        stride, state, counter,
    )  # fmt: skip
    arrivals += num_threads
    threads.meet(state, arrivals)
    return counter, arrivals


@jit_borrowing
def add_mlp(
    shape, weights, layer, num_rows, buffers, normed, state, counter, arrivals, num_threads
):
    """Add one layer's feed-forward part to the residual stream; return the same."""
    x, _, _, projected, gate_up, activated = buffers
    hidden, depth = shape.hidden, kernels.round_up(shape.hidden, 2)
    stride = kernels.round_up(hidden, PANEL)
    inner = kernels.round_up(shape.intermediate, LANES)

    _normalize(x, stride, num_rows, hidden, weights.post_norm, layer, shape.epsilon, normed)
    counter += 1
    base, num_panels = layer * 2 * inner * depth, 2 * inner // PANEL
    step = kernels.panels_per_task(num_rows, num_panels)
    panel = threads.claim(state, counter) * step
    while panel < num_panels:
        stop, following = min(panel + step, num_panels), threads.claim(state, counter) * step
        kernels.multiply(
            normed, stride, num_rows, weights.gate_up, base, panel, stop, following, depth,
            gate_up, 2 * inner,
        )  # fmt: skip
        for row in range(num_rows):
            for half in range(panel, stop):  # 16 columns of gate, then 16 of up
                at = row * 2 * inner + half * PANEL
                to = row * inner + half * LANES
                kernels.silu_times(gate_up, at, gate_up, at + LANES, activated, to)
        panel = following
    arrivals += num_threads
    threads.meet(state, arrivals)

    counter += 1
    project_and_add(
        activated, inner, num_rows, weights.down, layer, kernels.round_up(shape.intermediate, 2),
        projected, x, stride, state, counter,
    )  # fmt: skip
    arrivals += num_threads
    threads.meet(state, arrivals)
    return counter, arrivals


@jit
def run_pass(
    shape,
    weights,
    plan,
    layer_size,
    packed_layout,
    initial,
    wanted,
    keys,
    values,
    rotary,
    buffers,
    logits,
    hidden_index,
    states,
    state,
    num_threads,
):
    """Run the layers of a plan; every thread calls this once with the same arguments.

    Args:
        shape: Sizes of the model.
        weights: Its parameters, matrices packed, layer after layer; layers that share them have
            them once.
        plan: For each layer where its parameters are, where its attention lies in the cache, -1
            to leave it out, and whether its feed-forward part runs, [L, 3].
        layer_size: Numbers that one layer has in `keys`, and in `values`.
        packed_layout: The rows of the batch, for `unpack`.
        initial: States of the rows to begin with, [R, hidden]; no rows for the embedding.
        wanted: Rows whose logits are wanted, [W].
        keys: Flat [layers of the cache, slots, kv_heads, head_dim].
        values: The same.
        rotary: Flat [positions, 2 * rotary_half].
        buffers: The residual stream and what the parts of a layer hand on: flat, padded rows.
        logits: Flat [wanted rows, padded vocabulary].
        hidden_index: For the embedding and each layer, where in `states` its output is wanted, or
            -1, [L + 1].
        states: [layers wanted, R, hidden].
        state: Zeros that all threads share: the barrier, then a counter for each part.
        num_threads: Threads that make this call.
    """
    x = buffers[0]
    layout = unpack_compiled(packed_layout)
    num_rows, num_layers = len(layout.token_ids), len(plan)
    hidden, depth = shape.hidden, kernels.round_up(shape.hidden, 2)
    stride = kernels.round_up(hidden, PANEL)
    # Each thread has its own, so that nobody waits; of the type of the matrices, padding zero.
    normed = np.zeros(num_rows * stride, weights.head.dtype)
    counter, arrivals = 1, num_threads
    if threads.claim(state, counter) == 0:
        for row in range(num_rows):
            if len(initial):
                kernels.copy_row(initial.reshape(-1), row * hidden, hidden, x, row * stride)
            else:
                at = layout.token_ids[row] * hidden
                kernels.copy_row(weights.embedding, at, hidden, x, row * stride)
    threads.meet(state, arrivals)

    for layer in range(num_layers):
        counter += 1
        if hidden_index[layer] >= 0 and threads.claim(state, counter) == 0:
            copy_rows(x, stride, states[hidden_index[layer]])
        stored = plan[layer, 0]
        if plan[layer, 1] >= 0:
            counter, arrivals = _add_attention(
                shape, weights, layout, stored, plan[layer, 1], layer_size, keys, values, rotary,
                buffers, normed, state, counter, arrivals, num_threads,
            )  # fmt: skip
        if plan[layer, 2]:
            counter, arrivals = add_mlp(
                shape, weights, stored, num_rows, buffers, normed, state, counter, arrivals,
                num_threads,
            )  # fmt: skip

    if hidden_index[num_layers] >= 0:  # as in transformers, the last states are normalized
        last = states[hidden_index[num_layers]]
        _normalize(x, stride, num_rows, hidden, weights.final_norm, 0, shape.epsilon, normed)
        copy_rows(normed, stride, last)  # by every thread the same
    num_wanted = len(wanted)
    for i in range(num_wanted):
        at = wanted[i] * stride
        kernels.rms_norm(x, at, hidden, weights.final_norm, 0, shape.epsilon, normed, i * stride)
    counter += 1
    num_panels = kernels.round_up(shape.vocab, PANEL) // PANEL
    step = kernels.panels_per_task(num_wanted, num_panels)
    panel = threads.claim(state, counter) * step
    while num_wanted > 0 and panel < num_panels:
        stop, following = min(panel + step, num_panels), threads.claim(state, counter) * step
        kernels.multiply(
            normed, stride, num_wanted, weights.head, 0, panel, stop, following, depth, logits,
            num_panels * PANEL,
        )  # fmt: skip
        panel = following
    arrivals += num_threads
    threads.meet(state, arrivals)
