"""Native code from Python functions: compiled on first use, kept on disk, any processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core import event

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile a function for the machine it runs on, once per kind of arguments.

    The code is kept in `NUMBA_CACHE_DIR`, beside the source or in the user's cache folder,
    whichever can be written to first; where none can, it is compiled anew by every process. The
    cache follows changes of the function's own file, not of functions called in other files.

    Args:
        function: At module level, in the part of Python and numpy that numba compiles.
    """
    return _compiled(function, counts_references=True)


def jit_borrowing(function: Function) -> Function:
    """Compile a function likewise that makes no arrays and returns none.

    It only borrows those it takes, and so does not count references to them: that would cost more
    than the call itself where the function is short.
    """
    return _compiled(function, counts_references=False)


def _compiled(function: Function, *, counts_references: bool) -> Function:
    # Nothing may be reordered or fused for speed (fastmath): equal inputs give equal bits.
    # Division by zero follows IEEE 754, as in torch. Other threads may run meanwhile.
    compiled: Any = functools.partial(
        numba.njit, nogil=True, error_model="numpy", fastmath=False, _nrt=counts_references
    )
    try:
        dispatcher: Function = compiled(cache=True)(function)
    except RuntimeError:  # no folder can be written to
        dispatcher = compiled(cache=False)(function)
    return dispatcher


class _FirstCompilation(event.Listener):
    """Calls back when code is compiled rather than found in the cache, the first time only."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def on_start(self, event: object) -> None:  # noqa: ARG002
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def on_end(self, event: object) -> None:
        pass


def announce_compilation(callback: Callable[[], None]) -> None:
    """Call back once, before this process first compiles something; never if all is cached."""
    event.register("numba:compile", _FirstCompilation(callback))
