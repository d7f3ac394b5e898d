"""Tree attention in compiled code: paged, ragged, grouped heads, windows, soft caps, sinks.

Each row looks at the positions of its own past in ascending order, whether they are cached or lie
somewhere in the tree. Four queries are taken together, so that what is cached is read once for all
of them; that changes none of their bits.
"""

from __future__ import annotations

import numpy as np

from foretoken.core.jit import jit, jit_borrowing
from foretoken.models import kernels, llvm, simd, threads
from foretoken.models.key_products import key_products

LANES = llvm.LANES
QUERIES = 4


@jit_borrowing
def _multiply(
    count, q, q_offset, q_stride, keys, base, stride, size, slots, first, stop, out, out_stride
):
    """Write the products of 1, 2 or 4 queries and the keys in slots [first, stop).

    Args:
        first: A multiple of 16.
        out: For each query a row with room for the next multiple of 16 keys.
    """
    last = stop - 1
    if count == 4:
        for p in range(first, stop, LANES // 4):
            key_products(
                4, q, q_offset, q_stride, keys, base, stride, size, slots, p, last, out, p,
                out_stride,
            )  # fmt: skip
    elif count == 2:
        for p in range(first, stop, LANES // 2):
            key_products(
                2, q, q_offset, q_stride, keys, base, stride, size, slots, p, last, out, p,
                out_stride,
            )  # fmt: skip
    else:
        for p in range(first, stop, LANES):
            key_products(
                1, q, q_offset, q_stride, keys, base, stride, size, slots, p, last, out, p,
                out_stride,
            )  # fmt: skip


@jit_borrowing
def _softmax(scores, start, low, high, scaling, softcap, sink):
    """Turn the raw products of positions [low, high) into weights; return 1 / their sum.

    Lanes are positions modulo 16, so that the sum does not depend on how many came before.

    Args:
        scores: The row begins at `start`; room up to the next multiple of 16 past `high`.
        softcap: 0 for none.
        sink: A logit that only takes part in the sum; -inf for none.
    """
    first = low // LANES * LANES
    last = (high + LANES - 1) // LANES * LANES
    minus_infinity = np.float32(-np.inf)
    for p in range(first, low):
        scores[start + p] = minus_infinity
    for p in range(high, last):
        scores[start + p] = minus_infinity
    factor = simd.splat(np.float32(scaling))
    top = simd.splat(minus_infinity)
    for p in range(first, last, LANES):
        s = simd.multiply(simd.load(scores, start + p), factor)
        if softcap > 0:
            # cap * tanh(s / cap), and tanh(y) = 1 - 2 / (e^2y + 1)
            doubled = simd.multiply(s, simd.splat(np.float32(2 / softcap)))
            below = simd.add(simd.exp(doubled), simd.splat(np.float32(1)))
            ratio = simd.divide(simd.splat(np.float32(-2)), below)
            capped = simd.add(simd.splat(np.float32(1)), ratio)
            s = simd.multiply(capped, simd.splat(np.float32(softcap)))
        simd.store(scores, start + p, s)
        top = simd.larger(s, top)
    if softcap > 0:  # the cap has made numbers of the forbidden ends
        for p in range(first, low):
            scores[start + p] = minus_infinity
        for p in range(high, last):
            scores[start + p] = minus_infinity
    highest = max(simd.largest(top), np.float32(sink))
    shift = simd.splat(-highest)
    sums = simd.splat(np.float32(0))
    for p in range(first, last, LANES):
        e = simd.exp(simd.add(simd.load(scores, start + p), shift))
        simd.store(scores, start + p, e)
        sums = simd.add(sums, e)
    denominator = simd.total(sums)
    if sink > minus_infinity:
        alone = simd.exp(simd.splat(np.float32(sink) - highest))
        denominator += simd.largest(alone)
    return np.float32(1) / denominator


@jit_borrowing
def _store_scaled(out, offset, vector, scale, count):
    """Write vector * scale, its first `count` lanes if that is less than all."""
    scaled = simd.multiply(vector, simd.splat(scale))
    if count >= LANES:
        simd.store(out, offset, scaled)
    elif count > 0:
        simd.store_first(out, offset, scaled, count)


@jit_borrowing
def _mix(
    scores,
    score_stride,
    count,
    low,
    lows,
    num_cached,
    highs,
    slots,
    paths,
    values,
    base,
    stride,
    size,
    scales,
    out,
    out_offsets,
):
    """Write the weighted sums of the values that one to four queries see.

    What is cached is read once for all, two vectors at a time: a sum waits for its last term, and
    the others fill the time. Where there are fewer queries, the last of them is summed again.
    """
    path_stride = paths.shape[1]
    flat = paths.reshape(-1)
    zero = simd.splat(np.float32(0))
    at1 = min(1, count - 1) * score_stride
    at2 = min(2, count - 1) * score_stride
    at3 = min(3, count - 1) * score_stride
    for i in range(0, size, 2 * LANES):
        rest = size - i
        a0, a1, a2, a3 = zero, zero, zero, zero
        b0, b1, b2, b3 = zero, zero, zero, zero
        for p in range(low, num_cached):
            at = base + slots[p] * stride + i
            if rest >= 2 * LANES:
                a, b = simd.load(values, at), simd.load(values, at + LANES)
            elif rest >= LANES:
                a, b = simd.load(values, at), simd.load_first(values, at + LANES, rest - LANES)
            else:
                a, b = simd.load_first(values, at, rest), zero
            # Weights outside a query's window are 0, and adding 0 changes no bit.
            weight = simd.splat(scores[p])
            a0, b0 = simd.fma(weight, a, a0), simd.fma(weight, b, b0)
            weight = simd.splat(scores[at1 + p])
            a1, b1 = simd.fma(weight, a, a1), simd.fma(weight, b, b1)
            weight = simd.splat(scores[at2 + p])
            a2, b2 = simd.fma(weight, a, a2), simd.fma(weight, b, b2)
            weight = simd.splat(scores[at3 + p])
            a3, b3 = simd.fma(weight, a, a3), simd.fma(weight, b, b3)
        for query in range(count):
            first, second = a0, b0
            if query == 1:
                first, second = a1, b1
            elif query == 2:
                first, second = a2, b2
            elif query == 3:
                first, second = a3, b3
            for p in range(max(num_cached, lows[query]), highs[query]):
                at = base + flat[query * path_stride + p - num_cached] * stride + i
                if rest >= 2 * LANES:
                    a, b = simd.load(values, at), simd.load(values, at + LANES)
                elif rest >= LANES:
                    a, b = simd.load(values, at), simd.load_first(values, at + LANES, rest - LANES)
                else:
                    a, b = simd.load_first(values, at, rest), zero
                weight = simd.splat(scores[query * score_stride + p])
                first, second = simd.fma(weight, a, first), simd.fma(weight, b, second)
            to = out_offsets[query] + i
            _store_scaled(out, to, first, scales[query], rest)
            _store_scaled(out, to + LANES, second, scales[query], rest - LANES)


@jit
def attend(
    q,  # flat [num_queries, q_stride]: rows of one segment, `group` heads each
    q_stride,
    num_rows,
    group,
    first_staged,  # index among the staged of the first row
    slots,  # of this segment's logical positions: cached, then staged
    num_cached,
    parents,  # of the staged, -1 for the last cached position
    depths,
    keys,
    key_base,
    key_stride,
    key_size,
    values,
    value_base,
    value_stride,
    value_size,
    scaling,
    window,  # 0 for none
    softcap,  # 0 for none
    sinks,  # [group], -inf for none
    out,
    out_base,
    out_row_stride,
):
    """Attend from all rows of a segment to their pasts, for the heads that share keys."""
    num_staged = first_staged + num_rows
    score_stride = kernels.round_up(num_cached + num_staged, LANES) + LANES
    scores = np.empty(QUERIES * score_stride, np.float32)
    staged_stride = kernels.round_up(num_staged, LANES)
    staged = np.empty(QUERIES * staged_stride, np.float32)
    paths = np.empty((QUERIES, num_staged), np.int64)
    lows = np.zeros(QUERIES, np.int64)
    highs = np.zeros(QUERIES, np.int64)
    scales = np.empty(QUERIES, np.float32)
    targets = np.empty(QUERIES, np.int64)
    staged_slots = slots[num_cached:]
    num_queries = num_rows * group
    query = 0
    while query < num_queries:
        count = min(QUERIES, num_queries - query)
        count = 2 if count == 3 else count
        low = num_cached
        for i in range(count):
            row, head = divmod(query + i, group)
            highs[i] = num_cached + depths[first_staged + row] + 1
            lows[i] = max(0, highs[i] - window) if window > 0 else 0
            low = min(low, lows[i])
            targets[i] = out_base + row * out_row_stride + head * value_size
        at_query, newest = query * q_stride, first_staged + (query + count - 1) // group
        _multiply(
            count, q, at_query, q_stride, keys, key_base, key_stride, key_size, slots,
            low // LANES * LANES, num_cached, scores, score_stride,
        )  # fmt: skip
        _multiply(
            count, q, at_query, q_stride, keys, key_base, key_stride, key_size, staged_slots,
            0, newest + 1, staged, staged_stride,
        )  # fmt: skip
        for i in range(count):
            row, head = divmod(query + i, group)
            start, node = i * score_stride, first_staged + row
            while node >= 0:
                depth = depths[node]
                scores[start + num_cached + depth] = staged[i * staged_stride + node]
                paths[i, depth] = staged_slots[node]
                node = parents[node]
            scales[i] = _softmax(scores, start, lows[i], highs[i], scaling, softcap, sinks[head])
            for p in range(low, min(lows[i] // LANES * LANES, num_cached)):
                scores[start + p] = np.float32(0)
        _mix(
            scores,
            score_stride,
            count,
            low,
            lows,
            num_cached,
            highs,
            slots,
            paths,
            values,
            value_base,
            value_stride,
            value_size,
            scales,
            out,
            targets,
        )
        query += count


@jit
def attend_layer(
    layout, query, key, value, key_size, value_size, num_kv_heads, keys, values, scaling, window,
    softcap, sinks, out, state, num_threads,
):  # fmt: skip
    """Store keys and values of all rows, then attend; threads share segments and heads.

    Args:
        layout: The batch.
        query: Flat [R, H, key_size].
        key: Flat [R, num_kv_heads, key_size].
        value: Flat [R, num_kv_heads, value_size].
        keys: The layer's keys, flat [slots, num_kv_heads, key_size].
        values: The same for values.
        sinks: [H].
        out: Flat [R, H, value_size].
        state: Zeros that all threads share, [2].
        num_threads: Threads that make this call.
    """
    num_heads = len(sinks)
    group = num_heads // num_kv_heads
    stride = kernels.round_up(key_size, LANES)
    task = threads.claim(state, 1)
    while task < len(layout.num_cached) * num_kv_heads:
        segment, head = divmod(task, num_kv_heads)
        first, last = layout.row_starts[segment], layout.row_starts[segment + 1]
        q = np.zeros((last - first) * group * stride, np.float32)
        for row in range(first, last):
            slot, source = layout.new_slots[row] * num_kv_heads, row * num_kv_heads + head
            kernels.copy_row(key, source * key_size, key_size, keys, (slot + head) * key_size)
            kernels.copy_row(
                value, source * value_size, value_size, values, (slot + head) * value_size
            )
            for i in range(group):
                source = (row * num_heads + head * group + i) * key_size
                kernels.copy_row(query, source, key_size, q, ((row - first) * group + i) * stride)
        key_start, key_stop = layout.key_starts[segment], layout.key_starts[segment + 1]
        node_start, node_stop = layout.node_starts[segment], layout.node_starts[segment + 1]
        attend(
            q, stride, last - first, group, layout.first_staged[segment],
            layout.slots[key_start:key_stop], layout.num_cached[segment],
            layout.parents[node_start:node_stop], layout.depths[node_start:node_stop],
            keys, head * key_size, num_kv_heads * key_size, key_size,
            values, head * value_size, num_kv_heads * value_size, value_size,
            scaling, window, softcap, sinks[head * group : (head + 1) * group],
            out, (first * num_heads + head * group) * value_size, num_heads * value_size,
        )  # fmt: skip
        task = threads.claim(state, 1)
    threads.meet(state, num_threads)
