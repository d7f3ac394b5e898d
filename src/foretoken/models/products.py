"""The inner loop of every matrix product: a block of rows and a few panels, in registers."""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

from foretoken.models import llvm
from foretoken.models.llvm import LANES

PANEL = 32  # columns of a packed matrix that lie together
CACHE_LINE = 64


class _BFloat16Type(ir.Type):
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self))

    def __hash__(self) -> int:
        return hash(type(self))


BFLOAT16_PAIRS = ir.VectorType(_BFloat16Type(), 2 * LANES)
HAS_BFLOAT16_PRODUCTS = bool(get_host_cpu_features().get("avx512bf16", False))


@intrinsic(prefer_literal=True)
def block_product(
    typing_context: Any,
    num_rows: Any,
    num_panels: Any,
    x: Any,
    x_offset: Any,
    x_stride: Any,
    w: Any,
    w_offset: Any,
    fetch_offset: Any,
    fetch_too: Any,
    depth: Any,
    out: Any,
    out_offset: Any,
    out_stride: Any,
) -> Any:
    """Multiply a block of rows with a few panels of a packed matrix, all in registers.

    `out[r, 32 p + c] = sum over k of x[r, k] * w[p, k, c]`, each sum in ascending order of k: its
    bits depend on nothing but the row and the column. In float32 every term is rounded once. In
    bfloat16 terms are taken two by two, by the processor's instruction for that where it has one.

    Args:
        num_rows: Rows of the block, a literal.
        num_panels: Panels of 32 columns, a literal.
        x: Rows of `depth` elements, `x_stride` apart, of the type of `w`.
        w: Panels one after the other: [depth, 32] in float32, [depth / 2, 32, 2] in bfloat16.
        fetch_offset: From here on, every other cache line of a panel is fetched meanwhile.
        fetch_too: From here on as well.
        depth: Even.
        out: float32 rows of at least 32 * `num_panels` elements, `out_stride` apart.
    """
    rows, panels = num_rows.literal_value, num_panels.literal_value
    add_products = _add_pairs if llvm.is_bfloat16(w) else _add_singles
    if llvm.is_bfloat16(x) != llvm.is_bfloat16(w) or llvm.is_bfloat16(out):
        raise TypeError(f"rows {x} and matrix {w} are of one type, the product float32; got {out}")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        x_array, x_start, x_step, w_array, w_start, *w_fetch, length = args[2:10]
        out_array, out_start, out_step = args[10:]
        x_first = llvm.pointer(context, builder, kinds[2], x_array, x_start)
        w_first = llvm.pointer(context, builder, kinds[5], w_array, w_start)
        fetched = [llvm.pointer(context, builder, kinds[5], w_array, start) for start in w_fetch]
        out_first = llvm.pointer(context, builder, kinds[10], out_array, out_start)
        word = length.type
        width = ir.Constant(word, PANEL)
        x_rows = [
            builder.gep(x_first, [builder.mul(x_step, ir.Constant(word, row))])
            for row in range(rows)
        ]
        panel_size = builder.mul(length, width)
        w_panels = [
            builder.gep(w_first, [builder.mul(panel_size, ir.Constant(word, panel))])
            for panel in range(panels)
        ]
        num_vectors = panels * PANEL // LANES
        cells = [
            [cgutils.alloca_once(builder, llvm.FLOATS) for _ in range(num_vectors)]
            for _ in range(rows)
        ]
        for cell in itertools.chain.from_iterable(cells):
            builder.store(llvm.constant(0.0), cell)
        with cgutils.for_range(builder, builder.lshr(length, ir.Constant(word, 1))) as loop:
            k = builder.shl(loop.index, ir.Constant(word, 1))
            at = builder.mul(k, width)
            if rows > 1:  # what a single row reads, the processor foresees by itself
                for start in fetched:
                    _fetch(builder, builder.gep(start, [at]), kinds[5])
            x_at = [builder.gep(pointer, [k]) for pointer in x_rows]
            w_at = [builder.gep(pointer, [at]) for pointer in w_panels]
            add_products(builder, x_at, w_at, cells)
        for row, line in enumerate(cells):
            start = builder.gep(out_first, [builder.mul(out_step, ir.Constant(word, row))])
            for vector, cell in enumerate(line):
                target = builder.gep(start, [ir.Constant(word, LANES * vector)])
                target = builder.bitcast(target, llvm.FLOATS.as_pointer())
                builder.store(builder.load(cell), target, align=4)
        return context.get_dummy_value()

    size = types.intp
    return types.void(
        num_rows, num_panels, x, size, size, w, size, size, size, size, out, size, size
    ), generate


def _fetch(builder: Any, start: Any, array_type: Any) -> None:
    """Ask for every other of the cache lines that two rows of a panel fill."""
    item = 2 if llvm.is_bfloat16(array_type) else 4
    for line in range(0, 2 * PANEL * item, 2 * CACHE_LINE):
        address = builder.gep(start, [ir.Constant(llvm.I32, line // item)])
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        # For reading (0), into the second level (2), data (1).
        flags = [ir.Constant(llvm.I32, flag) for flag in (0, 2, 1)]
        llvm.call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, *flags])


def _add_singles(builder: Any, x_at: Any, w_at: Any, cells: Any) -> None:
    """Add two terms to every sum, one after the other, from float32."""
    for step in range(2):
        weights = [
            llvm.load(builder, builder.gep(start, [ir.Constant(llvm.I32, offset)]), False)
            for start in w_at
            for offset in range(step * PANEL, (step + 1) * PANEL, LANES)
        ]
        for start, line in zip(x_at, cells, strict=True):
            value = builder.load(builder.gep(start, [ir.Constant(llvm.I32, step)]))
            factor = llvm.splat(builder, value, llvm.FLOATS)
            for weight, cell in zip(weights, line, strict=True):
                builder.store(llvm.fma(builder, factor, weight, builder.load(cell)), cell)


def _add_pairs(builder: Any, x_at: Any, w_at: Any, cells: Any) -> None:
    """Add two terms to every sum, from bfloat16."""
    weights = []
    for start in w_at:
        for offset in range(0, 2 * PANEL, 2 * LANES):
            address = builder.gep(start, [ir.Constant(llvm.I32, offset)])
            address = builder.bitcast(address, llvm.BITS.as_pointer())
            weights.append(builder.load(address, align=2))
    for start, line in zip(x_at, cells, strict=True):
        pair = builder.load(builder.bitcast(start, llvm.I32.as_pointer()), align=2)
        factors = llvm.splat(builder, pair, llvm.BITS)
        for weight, cell in zip(weights, line, strict=True):
            so_far = builder.load(cell)
            if HAS_BFLOAT16_PRODUCTS:
                both = [builder.bitcast(bits, BFLOAT16_PAIRS) for bits in (factors, weight)]
                name = "llvm.x86.avx512bf16.dpbf16ps.512"
                so_far = llvm.call(builder, name, llvm.FLOATS, [so_far, *both])
            else:
                for pick in (_first_of_pair, _second_of_pair):
                    factor, term = pick(builder, factors), pick(builder, weight)
                    so_far = llvm.fma(builder, factor, term, so_far)
            builder.store(so_far, cell)


def _first_of_pair(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(bits, llvm.int_constant(llvm.BITS, 16)), llvm.FLOATS)


def _second_of_pair(builder: Any, bits: Any) -> Any:
    return builder.bitcast(
        builder.and_(bits, llvm.int_constant(llvm.BITS, 0xFFFF0000)), llvm.FLOATS
    )
