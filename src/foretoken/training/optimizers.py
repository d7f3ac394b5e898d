"""Optimizers of a training: AdamW, or Muon for the matrices between embedding and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95


class Optimizer(Protocol):
    """What a loop needs of an optimizer; torch's own have it."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """Update the weights by their gradients."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        ...


class OptimizerBuilder(Protocol):
    """Makes an optimizer for the weights of a module that require gradients."""

    def __call__(self, module: nn.Module, weight_decay: float) -> Optimizer:
        """Return the optimizer; the loop sets its rates."""
        ...


def adamw(module: nn.Module, weight_decay: float) -> Optimizer:
    """Return AdamW over all weights that require gradients.

    Args:
        module: Whose weights.
        weight_decay: Of matrices; vectors such as norms have none.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return torch.optim.AdamW(_groups(weights, weight_decay), betas=_BETAS)


def muon(module: nn.Module, weight_decay: float) -> Optimizer:
    """Return Muon over the matrices of linear layers but the head, and AdamW over the rest.

    Muon's updates are scaled to the size that AdamW's have, so that one rate suits both.

    Args:
        module: A causal language model of transformers, or any module.
        weight_decay: Of matrices.

    Source: Jordan et al. 2024, Muon; the scale is that of Moonlight, arXiv:2502.16982, section 2.2.
    """
    named: Any = getattr(module, "get_output_embeddings", lambda: None)()
    head = getattr(named, "weight", None)
    matrices = [
        layer.weight
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and layer.weight is not head and layer.weight.requires_grad
    ]
    known = {id(weight) for weight in matrices}
    others = [it for it in module.parameters() if it.requires_grad and id(it) not in known]
    if not matrices:
        return adamw(module, weight_decay)
    return _Pair(
        torch.optim.Muon(
            matrices,
            weight_decay=weight_decay,
            momentum=_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(_groups(others, weight_decay), betas=_BETAS),
    )


OPTIMIZERS: Mapping[str, OptimizerBuilder] = MappingProxyType({"adamw": adamw, "muon": muon})


class _Pair:
    """Two optimizers, each of its own weights."""

    def __init__(self, one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
        self._both = (one, other)
        self.param_groups = [*one.param_groups, *other.param_groups]

    def step(self) -> None:
        """Update the weights by their gradients."""
        for optimizer in self._both:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for optimizer in self._both:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"both": [optimizer.state_dict() for optimizer in self._both]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        for optimizer, state in zip(self._both, state_dict["both"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for it in self._both for group in it.param_groups]


def _groups(weights: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [it for it in weights if it.dim() >= 2], "weight_decay": weight_decay},
        {"params": [it for it in weights if it.dim() < 2], "weight_decay": 0.0},
    ]


__all__ = ["OPTIMIZERS", "Optimizer", "OptimizerBuilder", "adamw", "muon"]
