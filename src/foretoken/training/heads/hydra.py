"""How Hydra heads are trained: as Medusa's, with the tokens between as the target wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from foretoken.models.heads import hydra
from foretoken.models.heads.files import TargetShape, TargetTensors, save_head
from foretoken.models.heads.hydra import HydraDesign, HydraHeads
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.kinds import HeadKind
from foretoken.training.heads.medusa import weighted_loss
from foretoken.training.losses import Divergence


def build(shape: TargetShape, tensors: TargetTensors, options: Mapping[str, Any]) -> HydraHeads:
    """Return new heads that say what the target's own head says of the state.

    Raises:
        ConfigError: An option does not exist or is not allowed.
    """
    return HydraHeads(shape, HydraDesign.read(options), tensors)


def loss(module: nn.Module, batch: HeadBatch, divergence: Divergence) -> Tensor:
    """Return the mean divergence of every head, averaged as Medusa's are.

    Source: arXiv:2402.05109, section 3.
    """
    heads = cast(HydraHeads, module)
    return weighted_loss(batch, divergence, heads.design.heads, heads.head_logits)


def save(module: nn.Module, shape: TargetShape, folder: Path, card: str) -> None:
    """Write heads to a folder that the drafter `hydra` reads."""
    design = asdict(cast(HydraHeads, module).design)
    save_head(module.state_dict(), hydra.KIND, shape, design, folder, card)


KIND = HeadKind(
    name=hydra.KIND,
    hidden_layers=lambda num_layers, _: (num_layers,),
    build=build,
    loss=loss,
    save=save,
)
