"""LLVM code for sixteen float32 lanes, from which `simd` and `products` make their functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

LANES = 16

F32 = ir.FloatType()
I1 = ir.IntType(1)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
FLOATS = ir.VectorType(F32, LANES)
BITS = ir.VectorType(I32, LANES)
HALVES = ir.VectorType(I16, LANES)
MASK = ir.VectorType(I1, LANES)


def constant(value: float) -> ir.Constant:
    """Return a vector of one number."""
    return ir.Constant(FLOATS, [value] * LANES)


def int_constant(vector: ir.VectorType, value: int) -> ir.Constant:
    """Return an integer vector of one number."""
    return ir.Constant(vector, [value] * LANES)


def splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    """Return a vector with a value in every lane."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), int_constant(BITS, 0))


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call an LLVM intrinsic by its full name."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    return call(builder, "llvm.fma.v16f32", FLOATS, [a, b, c])


def pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Return the address of an element of a flat array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [offset])


def is_bfloat16(array_type: Any) -> bool:
    """Whether an array holds bfloat16, as uint16; it may hold float32 else.

    Raises:
        TypeError: It holds something else.
    """
    if array_type.dtype == types.uint16:
        return True
    if array_type.dtype == types.float32:
        return False
    raise TypeError(f"kernels take float32 or bfloat16 (as uint16) arrays; got {array_type}")


def widen(builder: Any, halves: Any) -> Any:
    """Turn bfloat16 into float32, exactly."""
    bits = builder.shl(builder.zext(halves, BITS), int_constant(BITS, 16))
    return builder.bitcast(bits, FLOATS)


def narrow(builder: Any, vector: Any) -> Any:
    """Round to bfloat16, to nearest even; NaN stays NaN because its top bits survive."""
    bits = builder.bitcast(vector, BITS)
    odd = builder.and_(builder.lshr(bits, int_constant(BITS, 16)), int_constant(BITS, 1))
    rounded = builder.add(builder.add(bits, int_constant(BITS, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    quiet = builder.or_(bits, int_constant(BITS, 0x400000))
    chosen = builder.select(is_nan, quiet, rounded)
    return builder.trunc(builder.lshr(chosen, int_constant(BITS, 16)), HALVES)


def load(builder: Any, address: Any, holds_bfloat16: bool) -> Any:
    """Return 16 elements as float32."""
    if holds_bfloat16:
        halves = builder.load(builder.bitcast(address, HALVES.as_pointer()), align=2)
        return widen(builder, halves)
    return builder.load(builder.bitcast(address, FLOATS.as_pointer()), align=4)


def first_lanes(builder: Any, count: Any) -> Any:
    """Return the mask of the first `count` lanes."""
    lanes = ir.Constant(BITS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, I32), BITS))


def load_first(builder: Any, address: Any, count: Any, holds_bfloat16: bool) -> Any:
    """Return `count` elements as float32 and zeros behind; reads no further."""
    vector, suffix = (HALVES, "v16i16") if holds_bfloat16 else (FLOATS, "v16f32")
    zero = int_constant(HALVES, 0) if holds_bfloat16 else constant(0.0)
    address = builder.bitcast(address, vector.as_pointer())
    align = ir.Constant(I32, 2 if holds_bfloat16 else 4)
    mask = first_lanes(builder, count)
    loaded = call(builder, f"llvm.masked.load.{suffix}.p0", vector, [address, align, mask, zero])
    return widen(builder, loaded) if holds_bfloat16 else loaded


def reduce(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes by halves: always the same tree."""
    width = LANES // 2
    while width:
        order = [(lane + width) % LANES for lane in range(LANES)]
        moved = builder.shuffle_vector(
            vector, ir.Constant(FLOATS, ir.Undefined), ir.Constant(BITS, order)
        )
        vector = combine(vector, moved)
        width //= 2
    return builder.extract_element(vector, ir.Constant(I32, 0))


def totals(builder: Any, vectors: list[Any]) -> Any:
    """Return a vector of the sums of sixteen vectors, each the one that `reduce` would make.

    Two vectors are folded into one at a time, so that none of its lanes is idle.
    """
    width = LANES // 2
    while width:
        starts = range(0, 2 * LANES, 2 * width)
        order = [start + lane for start in starts for lane in range(width)]
        left = ir.Constant(BITS, order)
        right = ir.Constant(BITS, [lane + width for lane in order])
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, left), builder.shuffle_vector(a, b, right))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    return vectors[0]


def larger(builder: Any, a: Any, b: Any) -> Any:
    """Return the larger of two vectors, lane by lane; b where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)
