"""Training of `parallel` heads: mask tokens behind every position of a text at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foretoken.core.options import ComponentSpec, build_options
from foretoken.models.heads.eagle_init import initialise
from foretoken.models.heads.files import save_head
from foretoken.models.heads.parallel import ParallelModule
from foretoken.models.heads.target import TargetShape, TargetTensors
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.eagle import LayerOptions, read_layers, said_loss, unrolled
from foretoken.training.heads.kinds import HeadKind
from foretoken.training.losses import Divergence

NUM_TOKENS = 4  # that a pass says, unless `steps` tells


def build(target: TargetShape, shared: TargetTensors, options: Mapping[str, Any]) -> ParallelModule:
    """Make a new head; options and errors as for `eagle`, `steps` being the tokens of a pass."""
    asked = build_options(LayerOptions, ComponentSpec("parallel", options))
    design = asked.design(target, asked.steps or NUM_TOKENS)
    module = ParallelModule(design, target, shared)
    initialise(module, shared)
    return module


def loss(module: nn.Module, batch: HeadBatch, divergence: Divergence) -> Tensor:
    """Return the mean divergence between what the places of a pass and the target say.

    The mask tokens behind a position see the text up to there and each other, and nothing of those
    behind other positions. Places count 0.8 as much as those before.

    Args:
        module: A `ParallelModule`.
        batch: Texts.
        divergence: Between logits.

    Source: ParallelSpec, arXiv:2410.05589, section 3.2.
    """
    head: ParallelModule = module  # type: ignore[assignment]
    return said_loss(head, unrolled(head, batch), batch, divergence)


def save(module: nn.Module, target: TargetShape, folder: Path, card: str) -> None:
    """Write a head's directory; arguments as for `HeadKind`."""
    head: ParallelModule = module  # type: ignore[assignment]
    save_head(head.state_dict(), "parallel", target, head.design.as_options(), folder, card)


KIND = HeadKind(name="parallel", hidden_layers=read_layers, build=build, loss=loss, save=save)
