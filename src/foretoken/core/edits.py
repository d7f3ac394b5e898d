"""Edits of one row of logits: what the controls that look at the history do to it.

They are worked out without looking at the row, and applied by numpy where numpy can read it, by
torch elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.jit import jit
from foretoken.core.ranking import is_numpy

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(slots=True)
class Edits:
    """What the controls do to the row of one choice, in the order of the fields.

    Args:
        bias: Added to the logits of tokens.
        penalized_ids: Tokens whose logits the repetition penalty makes smaller.
        repetition_penalty: Divides positive logits, multiplies negative ones.
        counted_ids: Tokens whose logits OpenAI's penalties lower.
        penalties: By how much each, [C] float64.
        banned_ids: Tokens that cannot be chosen.
        masks: Which tokens may be chosen, [V] bool; a shorter one allows no others.
    """

    bias: dict[int, float] = field(default_factory=dict)
    penalized_ids: Ids | None = None
    repetition_penalty: float = 1.0
    counted_ids: Ids | None = None
    penalties: NDArray[np.float64] | None = None
    banned_ids: list[int] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)


def edit(row: Tensor, edits: Edits) -> Tensor:
    """Return a row of logits, [V] float32 or float64, with edits applied."""
    if not is_numpy(row):
        return edit_tensor(row, edits)
    array = row.numpy().copy()
    edit_array(array, edits)
    return torch.from_numpy(array)


def edit_array(row: NDArray[Any], edits: Edits) -> None:
    """Apply edits to a row of logits, [V], in place."""
    size, real = len(row), row.dtype.type
    if edits.bias:
        ids = _within(np.array(list(edits.bias)), size)
        values = [edits.bias[token_id] for token_id in ids.tolist()]
        row[ids] += np.array(values, dtype=row.dtype)
    if edits.penalized_ids is not None:
        _penalize(row, edits.penalized_ids, real(edits.repetition_penalty))
    if edits.counted_ids is not None and edits.penalties is not None:
        _subtract(row, edits.counted_ids, edits.penalties.astype(row.dtype))
    if edits.banned_ids:
        row[_within(np.array(edits.banned_ids), size)] = -np.inf
    for mask in edits.masks:
        _restrict(row, mask)


def edit_tensor(row: Tensor, edits: Edits) -> Tensor:
    """Return a row of logits, [V], with edits applied; the same as `edit_array`, by torch."""
    size, device = len(row), row.device

    def indices(ids: Ids | list[int]) -> Tensor:
        return torch.from_numpy(_within(np.array(ids, dtype=np.int64), size)).to(device)

    row = row.clone()
    if edits.bias:
        ids = indices(list(edits.bias))
        values = [edits.bias[token_id] for token_id in ids.tolist()]
        row[ids] += torch.tensor(values, dtype=row.dtype, device=device)
    if edits.penalized_ids is not None:
        ids, penalty = indices(edits.penalized_ids), edits.repetition_penalty
        logits = row[ids]
        row[ids] = torch.where(logits < 0, logits * penalty, logits / penalty)
    if edits.counted_ids is not None and edits.penalties is not None:
        penalties = torch.from_numpy(edits.penalties[edits.counted_ids < size])
        row[indices(edits.counted_ids)] -= penalties.to(device, row.dtype)
    if edits.banned_ids:
        row[indices(edits.banned_ids)] = -torch.inf
    for mask in edits.masks:
        allowed = torch.zeros(size, dtype=torch.bool)
        shown = torch.from_numpy(mask[:size].copy())
        allowed[: len(shown)] = shown
        row = row.masked_fill(~allowed.to(device), -torch.inf)
    return row


def _within(ids: Ids, size: int) -> Ids:
    """Leave out tokens that the row does not have; embeddings may hold more than logits do."""
    return ids[ids < size]


@jit
def _penalize(row: np.ndarray, ids: np.ndarray, penalty: float) -> None:
    for token_id in ids:
        if token_id < len(row):
            logit = row[token_id]
            row[token_id] = logit * penalty if logit < 0 else logit / penalty


@jit
def _subtract(row: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
    for place in range(len(ids)):
        if ids[place] < len(row):
            row[ids[place]] -= values[place]


@jit
def _restrict(row: np.ndarray, allowed: np.ndarray) -> None:
    num_shown = min(len(row), len(allowed))
    for token_id in range(num_shown):
        row[token_id] = row[token_id] if allowed[token_id] else -np.inf
    row[num_shown:] = -np.inf
