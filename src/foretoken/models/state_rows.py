"""Putting hidden states together, and taking rows of them, without the help of torch's threads.

Torch shares copies of more than 32,768 numbers among its threads, and these go on spinning for some
milliseconds afterwards, on the cores that the target's next pass needs: it then takes a fifth
longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foretoken.core.ranking import is_numpy


def take_rows(states: Tensor, rows: Sequence[int]) -> Tensor:
    """Return a copy of some rows, [n, D], of states of [R, D]."""
    indices = list(rows)
    return torch.from_numpy(states.numpy()[indices]) if is_numpy(states) else states[indices]


def as_rows(states: Tensor) -> np.ndarray:
    """Return states on CPU as compiled code reads them: float32, row after row."""
    return np.ascontiguousarray(states.float().numpy())


def put_rows(states: Tensor, rows: Sequence[int] | Tensor, values: Tensor) -> None:
    """Write rows, [n, D], into some of states of [R, D]."""
    if is_numpy(states):
        states.numpy()[np.asarray(rows)] = values.numpy()
    else:
        states[torch.as_tensor(rows, device=states.device)] = values


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return states of several texts, [n, D] each, as one, [R, D]; one alone without a copy."""
    return parts[0] if len(parts) == 1 else _joined(parts, 0)


def join_columns(parts: Sequence[Tensor]) -> Tensor:
    """Return states of the same tokens, [R, D] each, such as those of several layers, as one.

    They stand side by side, [R, sum of all D].
    """
    return _joined(parts, 1)


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    if all(map(is_numpy, parts)):
        return torch.from_numpy(np.concatenate([part.numpy() for part in parts], axis))
    return torch.cat(list(parts), axis)


__all__ = ["as_rows", "join_columns", "join_rows", "put_rows", "take_rows"]
