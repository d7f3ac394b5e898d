"""Training of `graft` heads: layers of the target learn to go on from its states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foretoken.core.options import ComponentSpec, build_options
from foretoken.errors import ConfigError, ModelError
from foretoken.models.heads.files import save_head
from foretoken.models.heads.graft import (
    DRAFT_FOLDER,
    GraftDesign,
    GraftModule,
    cut_layers,
    spread_layers,
)
from foretoken.models.heads.target import TargetShape, TargetTensors
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.kinds import HeadKind
from foretoken.training.losses import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftOptions:
    """What a user may say of a graft.

    Args:
        layers: How many of the target's layers it has: the last one, and others evenly spread.
        steps: How far drafts go in training.
    """

    layers: int = 1
    steps: int = 8

    def __post_init__(self) -> None:
        for name in ("layers", "steps"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"graft:{name} is at least 1; got {value}", hint=f"change {name}")

    def design(self, num_layers: int) -> GraftDesign:
        """Return the graft that the options describe, for a target of so many layers.

        Raises:
            ConfigError: The target has fewer layers.
        """
        if self.layers > num_layers:
            raise ConfigError(
                f"graft:layers is from 1 to {num_layers} for a target of {num_layers} layers; "
                f"got {self.layers}",
                hint="change layers",
            )
        return GraftDesign(layers=spread_layers(num_layers, self.layers), num_steps=self.steps)


def _read(options: Mapping[str, Any]) -> GraftOptions:
    return build_options(GraftOptions, ComponentSpec("graft", options))


def hidden_layers(num_layers: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers whose outputs its own layers read; errors as for `HeadKind`."""
    return _read(options).design(num_layers).layers


def build(target: TargetShape, tensors: TargetTensors, options: Mapping[str, Any]) -> GraftModule:
    """Return the layers as they are in the target; errors as for `HeadKind`.

    Raises:
        ModelError: The target's files are not known.
    """
    design = _read(options).design(target.num_layers)
    if tensors.directory is None:
        raise ModelError(
            "a graft begins as layers of its target, which are read from its files; got none",
            hint="give a target that was saved with save_pretrained",
        )
    return GraftModule(design, cut_layers(tensors.directory, design.layers), target.hidden_size)


def loss(module: nn.Module, batch: HeadBatch, divergence: Divergence) -> Tensor:
    """Return the mean divergence over the tokens that the target wrote.

    A text is read as it is served: the first draft comes before any states, then comes one behind
    the other, of `num_steps` tokens each. So one pass trains all depths alike.

    Args:
        module: A `GraftModule`.
        batch: Texts.
        divergence: Between logits.
    """
    graft = cast(GraftModule, module)
    roots = draw_roots(batch.is_output[:, 1:], graft.design.num_steps, is_random=graft.training)
    counts = batch.is_output[:, 1:]  # the row before the token
    hidden = {layer: states[:, :-1] for layer, states in batch.hidden.items()}
    outputs = graft(batch.token_ids[:, :-1], hidden, roots)
    divergences = divergence(graft.logits(outputs[counts]), batch.logits[:, :-1][counts])
    return divergences.sum() / max(1, divergences.numel())  # no places give no loss, not 0/0


def draw_roots(says_output: Tensor, num_steps: int, *, is_random: bool) -> Tensor:
    """Return for each position of some texts the one where its draft begins, [B, T].

    Args:
        says_output: Whether the token behind each was written by the target, [B, T] bool.
        num_steps: Tokens of a draft.
        is_random: Whether the first draft of each text has from one token to so many; else it has
            so many.
    """
    num_texts, num_rows = says_output.shape
    lengths = torch.full((num_texts, 1), num_steps)
    if is_random:
        lengths = torch.randint(1, num_steps + 1, (num_texts, 1))
    first_said = says_output.int().argmax(dim=1, keepdim=True)
    second = first_said + lengths.to(says_output.device)  # where the second draft begins
    positions = torch.arange(num_rows, device=says_output.device)
    return torch.where(positions < second, 0, positions - (positions - second) % num_steps)


def save(module: nn.Module, target: TargetShape, folder: Path, card: str) -> None:
    """Write a head's directory, its layers as a model in a folder of their own."""
    graft = cast(GraftModule, module)
    tensors = {"fc.weight": graft.fc.weight}
    save_head(tensors, "graft", target, graft.design.as_options(), folder, card)
    graft.save_model(folder / DRAFT_FOLDER)


KIND = HeadKind(name="graft", hidden_layers=hidden_layers, build=build, loss=loss, save=save)
