"""How Medusa heads are trained: Medusa-1, beside a target that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foretoken.models.heads import medusa
from foretoken.models.heads.files import TargetShape, TargetTensors, save_head
from foretoken.models.heads.medusa import MedusaDesign, MedusaHeads
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.kinds import HeadKind
from foretoken.training.losses import Divergence

# Weight of head i is this to the power of i: the later a token, the harder it is to foresee.
HEAD_DECAY = 0.8


def build(shape: TargetShape, tensors: TargetTensors, options: Mapping[str, Any]) -> MedusaHeads:
    """Return new heads that say what the target's own head says of the state.

    Raises:
        ConfigError: An option does not exist or is not allowed.
    """
    return MedusaHeads(shape, MedusaDesign.read(options), tensors.head)


def loss(module: nn.Module, batch: HeadBatch, divergence: Divergence) -> Tensor:
    """Return the mean divergence of every head, averaged with weights 0.8^i.

    With the target's own outputs and logits this is self-distillation.

    Source: arXiv:2401.10774, sections 2.2.1 and 2.3.2.
    """
    heads = cast(MedusaHeads, module)
    return weighted_loss(
        batch,
        divergence,
        heads.design.heads,
        lambda head, states, _: heads.head_logits(head, states),
    )


def weighted_loss(
    batch: HeadBatch,
    divergence: Divergence,
    num_heads: int,
    head_logits: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the mean divergence of every head, averaged with weights 0.8^i.

    Head i predicts from the state of token t the token t + 2 + i, for every t where that is a
    token that the target wrote.

    Args:
        batch: With the target's last states alone.
        divergence: Between a head's logits and the target's.
        num_heads: K.
        head_logits: Returns the logits, [N, V], of a head from states, [N, D], and the i + 1
            tokens behind each, [N, i + 1].
    """
    [states] = batch.hidden.values()
    total, weights = torch.zeros((), device=states.device), 0.0
    for head in range(num_heads):
        text, predicted = batch.is_output.nonzero(as_tuple=True)
        has_state = predicted >= head + 2
        text, position = text[has_state], predicted[has_state] - head - 2
        following = position.unsqueeze(1) + torch.arange(1, head + 2, device=position.device)
        logits = head_logits(
            head, states[text, position], batch.token_ids[text.unsqueeze(1), following]
        )
        # What the target says of the token before is what it says this one is.
        divergences = divergence(logits, batch.logits[text, position + head + 1])
        weight = HEAD_DECAY**head
        # No places give no loss rather than 0/0.
        total = total + weight * divergences.sum() / max(1, len(position))
        weights += weight
    return total / weights


def save(module: nn.Module, shape: TargetShape, folder: Path, card: str) -> None:
    """Write heads to a folder that the drafter `medusa` reads."""
    design = asdict(cast(MedusaHeads, module).design)
    save_head(module.state_dict(), medusa.KIND, shape, design, folder, card)


KIND = HeadKind(
    name=medusa.KIND,
    hidden_layers=lambda num_layers, _: (num_layers,),
    build=build,
    loss=loss,
    save=save,
)
