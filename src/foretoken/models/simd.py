"""Sixteen float32 numbers at once, for compiled kernels.

A compiler that vectorizes loops by itself is free to sum in any order that the loop's shape
suggests, and does. Here the vectors are explicit: every kernel says in which order it multiplies
and adds, `fma` rounds once, and the bits of a result depend on nothing else. On processors whose
registers are narrower, LLVM splits a vector into several registers; the bits stay the same.

Arrays hold float32, or bfloat16 as uint16; `load` and `store` convert. Offsets count elements of
the flat (C-contiguous) array and are not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from foretoken.models import llvm


class _VectorType(types.Type):
    """The numba type of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="Vector16xFloat32")


VECTOR = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, llvm.FLOATS)  # type: ignore[no-untyped-call]


# -- intrinsics ---------------------------------------------------------------------------------


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """Return a vector with `value` in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return llvm.splat(builder, args[0], llvm.FLOATS)

    return VECTOR(types.float32), generate


@intrinsic
def load(typing_context: Any, array: Any, offset: Any) -> Any:
    """Return 16 elements of a flat array from `offset` on, as float32."""
    is_bfloat16 = llvm.is_bfloat16(array)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = llvm.pointer(context, builder, signature.args[0], *args)
        return llvm.load(builder, pointer, is_bfloat16)

    return VECTOR(array, types.intp), generate


@intrinsic
def load_first(typing_context: Any, array: Any, offset: Any, count: Any) -> Any:
    """Return `count` < 16 elements from `offset` on, and zeros behind; reads no further."""
    is_bfloat16 = llvm.is_bfloat16(array)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = llvm.pointer(context, builder, signature.args[0], *args[:2])
        return llvm.load_first(builder, pointer, args[2], is_bfloat16)

    return VECTOR(array, types.intp, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write 16 elements to a flat array, rounded to nearest even if it holds bfloat16."""
    is_bfloat16 = llvm.is_bfloat16(array)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = llvm.pointer(context, builder, signature.args[0], *args[:2])
        value = llvm.narrow(builder, args[2]) if is_bfloat16 else args[2]
        pointer = builder.bitcast(pointer, value.type.as_pointer())
        builder.store(value, pointer, align=2 if is_bfloat16 else 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR), generate


@intrinsic
def store_first(typing_context: Any, array: Any, offset: Any, vector: Any, count: Any) -> Any:
    """Write the first `count` < 16 lanes; touches nothing behind."""
    is_bfloat16 = llvm.is_bfloat16(array)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = llvm.pointer(context, builder, signature.args[0], *args[:2])
        value = llvm.narrow(builder, args[2]) if is_bfloat16 else args[2]
        suffix = "v16i16" if is_bfloat16 else "v16f32"
        pointer = builder.bitcast(pointer, value.type.as_pointer())
        align = ir.Constant(llvm.I32, 2 if is_bfloat16 else 4)
        mask = llvm.first_lanes(builder, args[3])
        llvm.call(
            builder,
            f"llvm.masked.store.{suffix}.p0",
            ir.VoidType(),
            [value, pointer, align, mask],
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR, types.intp), generate


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return llvm.fma(builder, *args)

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


def _binary(name: str, doc: str, emit: Callable[[Any, Any, Any], Any]) -> Any:
    def operator(typing_context: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return VECTOR(VECTOR, VECTOR), generate

    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = doc
    return intrinsic(operator)


add = _binary("add", "Return a + b.", lambda builder, a, b: builder.fadd(a, b))
multiply = _binary("multiply", "Return a * b.", lambda builder, a, b: builder.fmul(a, b))
divide = _binary("divide", "Return a / b.", lambda builder, a, b: builder.fdiv(a, b))
larger = _binary("larger", "Return the larger of a and b, lane by lane.", llvm.larger)


@intrinsic
def total(typing_context: Any, vector: Any) -> Any:
    """Return the sum of all lanes, added by halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return llvm.reduce(builder, args[0], builder.fadd)

    return types.float32(VECTOR), generate


@intrinsic
def largest(typing_context: Any, vector: Any) -> Any:
    """Return the largest lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return llvm.reduce(builder, args[0], lambda a, b: llvm.larger(builder, a, b))

    return types.float32(VECTOR), generate


@intrinsic
def exp(typing_context: Any, vector: Any) -> Any:
    """Return e to each lane, within 2 units in the last place; 0 below -87, inf above 88.7.

    Cephes' expf: x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of degree 6 for e^r.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = args[0]
        low, high = llvm.constant(-87.0), llvm.constant(88.72283172607422)
        clamped = builder.select(builder.fcmp_ordered(">", x, low), x, low)
        clamped = builder.select(builder.fcmp_ordered("<", clamped, high), clamped, high)
        scaled = builder.fmul(clamped, llvm.constant(1.44269502162933349609375))
        n = llvm.call(builder, "llvm.roundeven.v16f32", llvm.FLOATS, [scaled])
        r = llvm.fma(builder, n, llvm.constant(-0.693359375), clamped)
        r = llvm.fma(builder, n, llvm.constant(2.12194440e-4), r)
        poly = llvm.constant(1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ):
            poly = llvm.fma(builder, poly, r, llvm.constant(coefficient))
        poly = llvm.fma(builder, poly, builder.fmul(r, r), r)
        poly = builder.fadd(poly, llvm.constant(1.0))
        # Two factors, because 2^128 alone is no float32.
        exponent = builder.fptosi(n, llvm.BITS)
        half = builder.ashr(exponent, llvm.int_constant(llvm.BITS, 1))
        for part in (half, builder.sub(exponent, half)):
            bits = builder.shl(
                builder.add(part, llvm.int_constant(llvm.BITS, 127)),
                llvm.int_constant(llvm.BITS, 23),
            )
            poly = builder.fmul(poly, builder.bitcast(bits, llvm.FLOATS))
        # Ordered comparisons are false for NaN, so x itself decides at the ends.
        poly = builder.select(builder.fcmp_ordered("<", x, low), llvm.constant(0.0), poly)
        infinity = llvm.constant(float("inf"))
        poly = builder.select(builder.fcmp_ordered(">", x, high), infinity, poly)
        return builder.select(builder.fcmp_unordered("uno", x, x), x, poly)

    return VECTOR(VECTOR), generate
