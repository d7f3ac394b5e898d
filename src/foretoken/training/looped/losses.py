"""The loss of a decoder that may be left early: cross-entropy behind every loop, weighted.

    L = sum_r w_r CE(head(h_r), y),  r = 1..G,  sum_r w_r = 1

with the one head of the model behind each loop. The sum teaches the states after every loop to be
ready for the head, without which guesses from inside the pass would be noise. Source: SPEED
(Hooper et al. 2023), arXiv:2310.12072; before it Depth-Adaptive Transformer (Elbayad et al. 2020),
arXiv:1910.10073.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foretoken.errors import ConfigError
from foretoken.models.loops import LoopShape
from foretoken.models.trainable import TrainableModel, head_logits

_RULES: Mapping[str, Callable[[int, int], float]] = MappingProxyType(
    {
        "uniform": lambda _depth, _num_loops: 1.0,
        "increasing": lambda depth, _num_loops: float(depth),
        "decreasing": lambda depth, num_loops: float(num_loops + 1 - depth),
        "last": lambda depth, num_loops: float(depth == num_loops),
    }
)


def depth_weights(text: str, num_loops: int) -> tuple[float, ...]:
    """Return the weight of every depth's loss; they sum to 1.

    Args:
        text: uniform; increasing or decreasing, in proportion to the depth from either side; last,
            the final loss alone; or numbers with commas between them, one for each loop.
        num_loops: G.

    Raises:
        ConfigError: It is neither, or the numbers are not one for each loop, of at least 0 and
            with the last above 0.
    """
    if text in _RULES:
        weights = [_RULES[text](depth, num_loops) for depth in range(1, num_loops + 1)]
    else:
        weights = _numbers(text)
    is_sound = len(weights) == num_loops and all(0 <= it < math.inf for it in weights)
    if not is_sound or weights[-1] == 0:
        raise ConfigError(
            f"depth weights are {', '.join(_RULES)}, or {num_loops} numbers of at least 0, the "
            f"last above 0; got {text!r}",
            hint="change --depth-weights",
        )
    return tuple(weight / sum(weights) for weight in weights)


def logits_by_depth(model: TrainableModel, token_ids: Tensor) -> list[Tensor]:
    """Return the head's logits behind every loop, [B, T, V] each, the model's own last.

    A model without loops has one depth.

    Args:
        model: Looped or plain.
        token_ids: [B, T].
    """
    if LoopShape.of(model.config) is None:
        return [model.logits(token_ids)]
    module: Any = model.module
    return [head_logits(model, states) for states in module.exit_states(token_ids)]


def exit_loss(model: TrainableModel, rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted mean loss of predicting every next token at every depth, in nats.

    Args:
        model: Gradients flow into it.
        rows: Token ids, [B, T + 1].
        weights: Of the depths.
    """
    targets = rows[:, 1:].flatten()
    losses = [
        functional.cross_entropy(logits.float().flatten(0, 1), targets)
        for logits in logits_by_depth(model, rows[:, :-1])
    ]
    weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return torch.stack(weighted).sum()


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return []


__all__ = ["depth_weights", "exit_loss", "logits_by_depth"]
