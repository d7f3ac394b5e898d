"""How threads that run the same compiled function share its work: counters and a barrier.

Both are plain integers in an array that all threads see. A thread that waits spins, and after a
while lets others run: on a machine with more to do than cores, the one it waits for may need its.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from foretoken.core.jit import jit_borrowing
from foretoken.models.addresses import code_of

SPINS = 2000
BARRIER = 0  # index in the state of what `meet` counts

_YIELD = types.ExternalFunction("sched_yield", types.int32())
_CAN_YIELD = sys.platform != "win32"


def _cell(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


@intrinsic
def _fetch_add(typing_context: Any, state: Any, index: Any, value: Any) -> Any:
    """Add to one cell in one indivisible step; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cell = _cell(context, builder, signature, args)
        return builder.atomic_rmw("add", cell, args[2], "seq_cst")

    return types.int64(state, types.intp, types.int64), generate


@intrinsic
def _read(typing_context: Any, state: Any, index: Any) -> Any:
    """Return a cell as other threads have left it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cell = _cell(context, builder, signature, args)
        return builder.load_atomic(cell, ordering="seq_cst", align=8)

    return types.int64(state, types.intp), generate


@jit_borrowing
def claim(state, counter):
    """Return the number of the next task that nobody has; every caller gets another."""
    return _fetch_add(state, counter, 1)


@jit_borrowing
def meet(state, num_arrivals):
    """Wait until the barrier has been reached `num_arrivals` times in all, this one included."""
    arrived = _fetch_add(state, BARRIER, 1) + 1
    spins = 0
    while arrived < num_arrivals:
        spins += 1
        if _CAN_YIELD and spins > SPINS:
            _YIELD()
        arrived = _read(state, BARRIER)


@lru_cache(maxsize=1)
def _workers(num_workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_workers, thread_name_prefix="foretoken")


def entry_point(function: Callable[..., None], arguments: tuple[Any, ...]) -> Callable[..., None]:
    """Return the code of a compiled function for the types of some arguments.

    Args:
        function: As for `run_together`.
        arguments: Likewise.
    """
    return code_of(function, (*arguments, 1))


def run_together(
    function: Callable[..., None], arguments: tuple[Any, ...], num_threads: int
) -> None:
    """Call a compiled function from several threads at once and wait for all of them.

    Args:
        function: Releases Python's lock and shares the work with `claim` and `meet`.
        arguments: The same for every thread; the number of threads comes behind them.
        num_threads: At least 1, the calling thread included.
    """
    if num_threads == 1:
        function(*arguments, 1)
        return
    workers = _workers(num_threads - 1)
    others = [workers.submit(function, *arguments, num_threads) for _ in range(num_threads - 1)]
    function(*arguments, num_threads)
    for other in others:
        other.result()
