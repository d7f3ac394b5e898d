"""Code of compiled functions, and what it reaches by its address: arrays, and other such code.

An array that a compiled function takes costs a fraction of a microsecond, so many travel as one
array of addresses. A function that it calls by name is compiled into it once more, which takes
seconds for a whole pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from foretoken.core.jit import jit


def code_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """Return the code of a compiled function for the types of some arguments.

    Calling it leaves out the search for the code that fits, which costs more than the call
    itself where arguments are named tuples. Arrays of another type are still refused.
    """
    compiled: Any = function
    code: Callable[..., Any] = compiled.compile(tuple(map(numba.typeof, arguments)))
    return code


def address_of(function: Callable[..., None], arguments: tuple[Any, ...]) -> int:
    """Return where the code of a compiled function for the types of some arguments is.

    It stays there as long as the function.
    """
    compiled: Any = function
    kinds = tuple(map(numba.typeof, arguments))
    compiled.compile(kinds)
    result = compiled.overloads[kinds]
    address: int = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    return address


@intrinsic
def call_at(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call the function at an address, one that returns nothing.

    Its code must be of exactly the types of these arguments: nothing checks them.
    """
    kinds = tuple(map(types.unliteral, arguments.types))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        convention = context.call_conv
        code = convention.get_function_type(types.none, kinds).as_pointer()
        function = builder.inttoptr(args[0], code)
        values = cgutils.unpack_tuple(builder, args[1], len(kinds))
        status, _ = convention.call_function(builder, function, types.none, kinds, values)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.none(types.int64, types.Tuple(kinds)), generate


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """Return an address as numba's pointers are."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@jit
def doubles_at(address, length):
    """Return the array of float64 at an address, which somebody else keeps alive."""
    return numba.carray(_pointer(address), (length,), np.float64)
