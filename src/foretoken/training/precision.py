"""Devices and precisions of a training, by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = ("auto", "float32", "bfloat16")
_MIXED = {"float32": "no", "bfloat16": "bf16"}  # accelerate's names


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return float32 or bfloat16; "auto" is bfloat16 on a GPU that computes with it.

    float16 is not offered: its gradients overflow as a matter of course, which could not be told
    from a training that went wrong.

    Args:
        precision: One of `PRECISIONS`.
        device: Where the training runs.
    """
    if precision != "auto":
        return precision
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_fast else "float32"


@contextmanager
def accelerated(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """Give a training its accelerator; accelerate's state of the process is free again afterwards.

    Args:
        device: Where the module is; nothing is moved.
        precision: One of `PRECISIONS`.

    Raises:
        ConfigError: accelerate is not installed, or this process uses it in another precision.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, is_initialized
    except ImportError as error:
        raise ConfigError(
            "training needs accelerate, and accelerate is not installed",
            hint="pip install 'foretoken[train]'",
        ) from error
    is_guest = is_initialized()  # the caller's own program has set it up
    try:
        accelerator = Accelerator(
            mixed_precision=_MIXED[resolve_precision(precision, device)],
            cpu=device.type == "cpu",
            device_placement=False,
        )
    except ValueError as error:
        raise ConfigError(
            f"this process uses accelerate already, with other settings than {precision} on "
            f"{device.type}: {' '.join(str(error).split())[:200]}",
            hint="train in a process of its own, or with the same device and precision",
        ) from error
    try:
        yield accelerator
    finally:
        if not is_guest:
            AcceleratorState._reset_state(reset_partial_state=True)


__all__ = ["PRECISIONS", "accelerated", "resolve_precision"]
