"""A user's own logits processors: called with copies, and held to what they may return."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.params import LogitsProcessor
from foretoken.errors import RequestError


def run_processors(
    processors: Sequence[LogitsProcessor],
    row: Tensor,  # [V]
    token_ids: NDArray[np.int64],  # [T]
) -> Tensor:  # [V]
    """Return a row of scores as a request's processors leave it.

    Each gets copies of the token ids, [1, T], and of the scores, [1, V] on their device, and
    returns scores of the same shape, type and device. Minus infinity rules a token out.

    Args:
        processors: In the order of their application.
        row: The scores after Foretoken's own controls.
        token_ids: Prompt, output and draft tokens before the position.

    Raises:
        RequestError: A processor failed, or returned something else, not-a-number or plus
            infinity, or ruled out every token that was left to it.
    """
    for place, processor in enumerate(processors):
        if bool((row == -torch.inf).all()):  # nothing is left to say anything about
            return row
        name = f"logits_processors[{place}] ({_name_of(processor)})"
        input_ids = torch.from_numpy(token_ids.copy()).to(row.device).unsqueeze(0)
        try:
            returned = processor(input_ids, row.clone().unsqueeze(0))
        except Exception as error:
            raise RequestError(
                f"{name} raised {type(error).__name__}: {error}; a processor returns scores for "
                f"every history, here one of {len(token_ids)} tokens",
                hint="correct the processor or leave it out",
            ) from error
        row = _checked(name, returned, row)
    return row


def _checked(name: str, returned: object, row: Tensor) -> Tensor:
    problem = None
    if not isinstance(returned, Tensor):
        problem = f"a {type(returned).__name__}"
    elif (returned.shape, returned.dtype, returned.device) != (
        (1, len(row)),
        row.dtype,
        row.device,
    ):
        problem = f"{_kind(tuple(returned.shape), returned)}"
    elif bool(returned.isnan().any()):
        problem = f"not-a-number for token {int(returned[0].isnan().int().argmax())}"
    elif bool(returned.isposinf().any()):
        problem = f"plus infinity for token {int(returned[0].argmax())}"
    elif bool(returned.isneginf().all()):
        problem = "minus infinity for every token"
    if problem is None and isinstance(returned, Tensor):
        return returned[0].detach().clone()
    raise RequestError(
        f"{name} returned {problem}; allowed is {_kind((1, len(row)), row)} of finite numbers "
        "and minus infinity, not for every token",
        hint="correct the processor or leave it out",
    )


def _kind(shape: tuple[int, ...], tensor: Tensor) -> str:
    return f"a tensor {list(shape)} of {tensor.dtype} on {tensor.device}"


def _name_of(processor: LogitsProcessor) -> str:
    return getattr(processor, "__name__", type(processor).__name__)
