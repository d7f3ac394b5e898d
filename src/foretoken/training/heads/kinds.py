"""The kinds of heads that can be trained. One file each, one line each here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from foretoken.core.registry import Registry
from foretoken.training.heads.data import HeadBatch

if TYPE_CHECKING:
    from foretoken.models.heads.target import TargetShape, TargetTensors
    from foretoken.training.losses import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadKind:
    """How heads of one kind are made, trained and saved.

    Args:
        name: Also that of the drafter that serves them, as `name:path=DIR`.
        hidden_layers: Layers whose states a head is trained on, of a target with so many layers
            and with options as for `build`.
        build: Makes a module from the target's shape and tensors and from options as the user
            wrote them; raises ConfigError for an option that does not exist or is not allowed.
        loss: The loss of a batch, a scalar. The divergence compares the module's logits with the
            target's, [..., V] each, and is taken over predictions of the target's own tokens.
        save: Writes a module for a target of this shape to an empty folder, with a model card.
    """

    name: str
    hidden_layers: Callable[[int, Mapping[str, Any]], tuple[int, ...]]
    build: Callable[[TargetShape, TargetTensors, Mapping[str, Any]], nn.Module]
    loss: Callable[[nn.Module, HeadBatch, Divergence], Tensor]
    save: Callable[[nn.Module, TargetShape, Path, str], None]


KINDS: Registry[HeadKind] = Registry(
    "kind of head",
    {
        "medusa": "foretoken.training.heads.medusa:KIND",
        "hydra": "foretoken.training.heads.hydra:KIND",
        "eagle": "foretoken.training.heads.eagle:KIND",
        "parallel": "foretoken.training.heads.parallel:KIND",
        "kangaroo": "foretoken.training.heads.kangaroo:KIND",
        "graft": "foretoken.training.heads.graft:KIND",
    },
    group="foretoken.heads",
)


__all__ = ["KINDS", "HeadKind"]
