"""The inner loop of attention: a few queries and a few keys, sixteen products in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from foretoken.models import llvm
from foretoken.models.llvm import LANES


@intrinsic(prefer_literal=True)
def key_products(
    typing_context: Any,
    num_queries: Any,
    q: Any,
    q_offset: Any,
    q_stride: Any,
    keys: Any,
    key_offset: Any,
    key_stride: Any,
    size: Any,
    slots: Any,
    first: Any,
    last: Any,
    out: Any,
    out_offset: Any,
    out_stride: Any,
) -> Any:
    """Write the products of some queries and the keys in `slots[first : first + 16 / queries]`.

    Each is the sum that `simd.total` makes of sixteen lanes, which take turns in the numbers of
    query and key: its bits depend on nothing else. To add up sixteen vectors at once takes a
    quarter of the work.

    Args:
        num_queries: 1, 2 or 4, a literal.
        q: Rows padded with zeros to a multiple of 16 numbers, `q_stride` apart.
        keys: Those in slot s begin at `key_offset` + s * `key_stride`.
        size: Numbers of a key.
        slots: Where keys lie.
        last: Index of the last key; it stands in for those behind it.
        out: float32 rows, `out_stride` apart, with room for the keys that are multiplied.
    """
    queries = num_queries.literal_value
    is_bfloat16 = llvm.is_bfloat16(keys)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        q_array, q_start, q_step, key_pool, key_start, key_step, length = args[1:8]
        slot_array, begin, end, out_array, out_start, out_step = args[8:]
        word = length.type

        def rows(kind: Any, array: Any, start: Any, step: Any) -> list[Any]:
            first = llvm.pointer(context, builder, kind, array, start)
            return [
                builder.gep(first, [builder.mul(step, ir.Constant(word, row))])
                for row in range(queries)
            ]

        def key_at(place: int) -> Any:
            index = builder.add(begin, ir.Constant(word, place))
            index = builder.select(builder.icmp_signed("<", index, end), index, end)
            slot = builder.load(llvm.pointer(context, builder, kinds[8], slot_array, index))
            at = builder.add(key_start, builder.mul(slot, key_step))
            return llvm.pointer(context, builder, kinds[4], key_pool, at)

        query_rows = rows(kinds[1], q_array, q_start, q_step)
        key_rows = [key_at(place) for place in range(LANES // queries)]
        cells = [cgutils.alloca_once(builder, llvm.FLOATS) for _ in range(LANES)]
        for cell in cells:
            builder.store(llvm.constant(0.0), cell)

        def add_products(at: Any, count: Any) -> None:
            parts = [
                llvm.load(builder, builder.gep(row, [at]), is_bfloat16)
                if count is None
                else llvm.load_first(builder, builder.gep(row, [at]), count, is_bfloat16)
                for row in key_rows
            ]
            for index, row in enumerate(query_rows):
                query = llvm.load(builder, builder.gep(row, [at]), False)
                own = cells[index * len(parts) : (index + 1) * len(parts)]
                for part, cell in zip(parts, own, strict=True):
                    builder.store(llvm.fma(builder, query, part, builder.load(cell)), cell)

        num_full = builder.lshr(length, ir.Constant(word, 4))
        with cgutils.for_range(builder, num_full) as loop:
            add_products(builder.shl(loop.index, ir.Constant(word, 4)), None)
        rest = builder.and_(length, ir.Constant(word, LANES - 1))
        with builder.if_then(builder.icmp_signed("!=", rest, ir.Constant(word, 0))):
            add_products(builder.shl(num_full, ir.Constant(word, 4)), rest)

        totals = llvm.totals(builder, [builder.load(cell) for cell in cells])
        piece = LANES // queries
        for query, row in enumerate(rows(kinds[11], out_array, out_start, out_step)):
            lanes = ir.Constant(
                ir.VectorType(llvm.I32, piece), list(range(query * piece, (query + 1) * piece))
            )
            part = builder.shuffle_vector(totals, ir.Constant(llvm.FLOATS, ir.Undefined), lanes)
            builder.store(part, builder.bitcast(row, part.type.as_pointer()), align=4)
        return context.get_dummy_value()

    number = types.intp
    return types.void(
        num_queries, q, number, number, keys, number, number, number, slots, number, number,
        out, number, number,
    ), generate  # fmt: skip
