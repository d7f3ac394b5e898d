"""Tree attention in compiled code: paged, ragged, grouped heads, windows, soft caps, sinks.

Each row looks at the positions of its own past in ascending order, whether they are cached or lie
somewhere in the tree. Four queries are taken together, so that what is cached is read once for all
of them; that changes none of their bits.
"""

from __future__ import annotations

import numpy as np

from foretoken.core.jit import jit
from foretoken.models import kernels, llvm, simd, threads

LANES = llvm.LANES
QUERIES = 4


@jit
def _dot(q, q_offset, keys, at, size):
    """Return the product of one query (padded with zeros) and one key."""
    acc = simd.splat(np.float32(0))
    num_full = size // LANES * LANES
    for i in range(0, num_full, LANES):
        acc = simd.fma(simd.load(q, q_offset + i), simd.load(keys, at + i), acc)
    if size > num_full:
        k = simd.load_first(keys, at + num_full, size - num_full)
        acc = simd.fma(simd.load(q, q_offset + num_full), k, acc)
    return simd.total(acc)


@jit
def _dot_four(q, q_offset, q_stride, keys, at, size, out, out_offset, out_stride):
    """Write the products of four queries and one key."""
    acc0 = simd.splat(np.float32(0))
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    num_full = size // LANES * LANES
    for i in range(0, size, LANES):
        k = simd.load(keys, at + i) if i < num_full else simd.load_first(keys, at + i, size - i)
        acc0 = simd.fma(simd.load(q, q_offset + i), k, acc0)
        acc1 = simd.fma(simd.load(q, q_offset + q_stride + i), k, acc1)
        acc2 = simd.fma(simd.load(q, q_offset + 2 * q_stride + i), k, acc2)
        acc3 = simd.fma(simd.load(q, q_offset + 3 * q_stride + i), k, acc3)
    out[out_offset] = simd.total(acc0)
    out[out_offset + out_stride] = simd.total(acc1)
    out[out_offset + 2 * out_stride] = simd.total(acc2)
    out[out_offset + 3 * out_stride] = simd.total(acc3)


@jit
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


@jit
def _mix_one(
    scores,
    start,
    low,
    num_cached,
    high,
    slots,
    path,
    values,
    base,
    stride,
    size,
    scale,
    out,
    out_offset,
):
    """Write the weighted sum of the values that one query sees, four vectors at a time."""
    for i in range(0, size, 4 * LANES):
        o0 = simd.splat(np.float32(0))
        o1 = o0
        o2 = o0
        o3 = o0
        for p in range(low, high):
            slot = slots[p] if p < num_cached else path[p - num_cached]
            w = simd.splat(scores[start + p])
            at = base + slot * stride + i
            if i + 4 * LANES <= size:
                o0 = simd.fma(w, simd.load(values, at), o0)
                o1 = simd.fma(w, simd.load(values, at + LANES), o1)
                o2 = simd.fma(w, simd.load(values, at + 2 * LANES), o2)
                o3 = simd.fma(w, simd.load(values, at + 3 * LANES), o3)
            else:
                rest = size - i
                o0 = simd.fma(w, simd.load_first(values, at, min(rest, LANES)), o0)
                if rest > LANES:
                    v = simd.load_first(values, at + LANES, min(rest - LANES, LANES))
                    o1 = simd.fma(w, v, o1)
                if rest > 2 * LANES:
                    v = simd.load_first(values, at + 2 * LANES, min(rest - 2 * LANES, LANES))
                    o2 = simd.fma(w, v, o2)
                if rest > 3 * LANES:
                    v = simd.load_first(values, at + 3 * LANES, rest - 3 * LANES)
                    o3 = simd.fma(w, v, o3)
        to = out_offset + i
        _store_scaled(out, to, o0, scale, size - i)
        _store_scaled(out, to + LANES, o1, scale, size - i - LANES)
        _store_scaled(out, to + 2 * LANES, o2, scale, size - i - 2 * LANES)
        _store_scaled(out, to + 3 * LANES, o3, scale, size - i - 3 * LANES)


@jit
def _store_scaled(out, offset, vector, scale, count):
    """Write vector * scale, its first `count` lanes if that is less than all."""
    scaled = simd.multiply(vector, simd.splat(scale))
    if count >= LANES:
        simd.store(out, offset, scaled)
    elif count > 0:
        simd.store_first(out, offset, scaled, count)


@jit
def _mix_four(
    scores,
    score_stride,
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
    """Do the same for four queries, which share what is cached."""
    path_stride = paths.shape[1]
    flat = paths.reshape(-1)
    low = min(lows[0], lows[1], lows[2], lows[3])
    for i in range(0, size, LANES):
        rest = min(size - i, LANES)
        o0 = simd.splat(np.float32(0))
        o1 = o0
        o2 = o0
        o3 = o0
        for p in range(low, num_cached):
            at = base + slots[p] * stride + i
            v = simd.load(values, at) if rest == LANES else simd.load_first(values, at, rest)
            # Weights outside a query's window are 0, and adding 0 changes no bit.
            o0 = simd.fma(simd.splat(scores[p]), v, o0)
            o1 = simd.fma(simd.splat(scores[score_stride + p]), v, o1)
            o2 = simd.fma(simd.splat(scores[2 * score_stride + p]), v, o2)
            o3 = simd.fma(simd.splat(scores[3 * score_stride + p]), v, o3)
        for query in range(4):
            o = o0
            if query == 1:
                o = o1
            elif query == 2:
                o = o2
            elif query == 3:
                o = o3
            for p in range(max(num_cached, lows[query]), highs[query]):
                at = base + flat[query * path_stride + p - num_cached] * stride + i
                v = simd.load(values, at) if rest == LANES else simd.load_first(values, at, rest)
                o = simd.fma(simd.splat(scores[query * score_stride + p]), v, o)
            _store_scaled(out, out_offsets[query] + i, o, scales[query], rest)


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
    staged = np.empty(QUERIES * num_staged, np.float32)
    paths = np.empty((QUERIES, num_staged), np.int64)
    lows = np.zeros(QUERIES, np.int64)
    highs = np.zeros(QUERIES, np.int64)
    scales = np.empty(QUERIES, np.float32)
    targets = np.empty(QUERIES, np.int64)
    num_queries = num_rows * group
    query = 0
    while query < num_queries:
        # The last block reaches back to be whole: to compute a query twice costs less than to
        # read all keys for one alone.
        if num_queries >= QUERIES:
            query = min(query, num_queries - QUERIES)
        count = QUERIES if num_queries >= QUERIES else 1
        low = num_cached
        for i in range(count):
            row, head = divmod(query + i, group)
            highs[i] = num_cached + depths[first_staged + row] + 1
            lows[i] = max(0, highs[i] - window) if window > 0 else 0
            low = min(low, lows[i])
            targets[i] = out_base + row * out_row_stride + head * value_size
        newest = first_staged + (query + count - 1) // group
        at_query = query * q_stride
        if count == QUERIES:
            for p in range(low, num_cached):
                at = key_base + slots[p] * key_stride
                _dot_four(q, at_query, q_stride, keys, at, key_size, scores, p, score_stride)
            for node in range(newest + 1):
                at = key_base + slots[num_cached + node] * key_stride
                _dot_four(q, at_query, q_stride, keys, at, key_size, staged, node, num_staged)
        else:
            for p in range(low, num_cached):
                scores[p] = _dot(q, at_query, keys, key_base + slots[p] * key_stride, key_size)
            node = newest
            while node >= 0:
                at = key_base + slots[num_cached + node] * key_stride
                staged[node] = _dot(q, at_query, keys, at, key_size)
                node = parents[node]
        for i in range(count):
            row, head = divmod(query + i, group)
            node = first_staged + row
            while node >= 0:
                depth = depths[node]
                scores[i * score_stride + num_cached + depth] = staged[i * num_staged + node]
                paths[i, depth] = slots[num_cached + node]
                node = parents[node]
            scales[i] = _softmax(
                scores, i * score_stride, lows[i], highs[i], scaling, softcap, sinks[head]
            )
            for p in range(low, min(lows[i] // LANES * LANES, num_cached)):
                scores[i * score_stride + p] = np.float32(0)
        if count == QUERIES:
            _mix_four(
                scores,
                score_stride,
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
        else:
            _mix_one(
                scores,
                0,
                lows[0],
                num_cached,
                highs[0],
                slots,
                paths[0],
                values,
                value_base,
                value_stride,
                value_size,
                scales[0],
                out,
                targets[0],
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
