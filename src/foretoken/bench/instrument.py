"""Where the time of a step goes, seen from outside: timers around the parts of one engine.

Nothing in the engine knows of this. The methods of its own objects are replaced by timed ones
for as long as the context lasts, which costs about a microsecond a call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from foretoken.bench.phases import Phases
from foretoken.engine.llm import LLM
from foretoken.models.adapter import LanguageModel


@contextmanager
def timed_phases(llm: LLM) -> Iterator[Phases]:
    """Time the parts of a model's engine; the result is complete when the context ends.

    Args:
        llm: Used by nobody else meanwhile.
    """
    phases = Phases()
    parts = llm.engine.parts
    with ExitStack() as stack:
        _wrap(stack, parts.target, "forward", _target_timer(phases), _waiter(parts.target))
        _wrap(stack, parts.verifier, "verify", _adder(phases, "verify_s"))
        for drafter in llm.engine.drafters.values():
            for name in ("start", "propose", "commit", "stop"):
                _wrap(stack, drafter, name, _adder(phases, "draft_s"))
            for model in vars(drafter).values():
                if isinstance(model, LanguageModel):
                    _wrap(stack, model, "forward", _draft_timer(phases), _waiter(model))
        start_s = time.perf_counter()
        try:
            yield phases
        finally:
            phases.total_s = time.perf_counter() - start_s


Record = Callable[[float, Any, Any], None]  # seconds, then a call's first two arguments


def _wrap(
    stack: ExitStack,
    owner: Any,
    name: str,
    record: Record,
    wait: Callable[[], object] = lambda: None,
) -> None:
    """Replace a method of one object by a timed one until the stack unwinds."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            wait()
            first, second = (*args, None, None)[:2]
            record(time.perf_counter() - start_s, first, second)

    if name in vars(owner):  # somebody else's, to be put back
        stack.callback(setattr, owner, name, method)
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, timed)


def _waiter(model: LanguageModel) -> Callable[[], object]:
    """Return what waits for a pass; on CPU it is over when the call returns."""
    device = model.info.device
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def _adder(phases: Phases, name: str) -> Record:
    def record(seconds: float, _first: Any, _second: Any) -> None:
        setattr(phases, name, getattr(phases, name) + seconds)

    return record


def _target_timer(phases: Phases) -> Record:
    def record(seconds: float, batch: Any, rows: Any) -> None:
        # Every row of a step has its logits read, but for those of a prompt before its last.
        if batch.num_rows > len(rows):
            phases.prefill_s += seconds
        else:
            phases.target_s += seconds
            phases.target_ms.setdefault(batch.num_rows, []).append(1000 * seconds)

    return record


def _draft_timer(phases: Phases) -> Record:
    def record(seconds: float, batch: Any, _rows: Any) -> None:
        phases.draft_ms.setdefault(batch.num_rows, []).append(1000 * seconds)

    return record


__all__ = ["timed_phases"]
