"""Medusa heads: each says from the target's last state alone which token comes how much later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.core.options import ComponentSpec, build_options
from foretoken.errors import ConfigError
from foretoken.models.adapter import ModelInfo
from foretoken.models.heads.files import TargetShape, read_head, target_tensors
from foretoken.models.heads.linear import ResidualBlock, StateHeads, lm_heads

KIND = "medusa"


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaDesign:
    """What Medusa heads are made of; the options of their training and of their files.

    Args:
        heads: How many, K: the most tokens of a path that they draft.
        layers: Residual blocks of each.
        own_lm_heads: Whether each head has an LM head of its own, as published, or all share the
            target's, which is then neither trained nor saved.
    """

    heads: int = 4
    layers: int = 1
    own_lm_heads: bool = True

    def __post_init__(self) -> None:
        if self.heads < 1 or self.layers < 0:
            raise ConfigError(
                f"medusa has at least 1 head of 0 layers; got heads={self.heads} and "
                f"layers={self.layers}",
                hint="change heads or layers",
            )

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> MedusaDesign:
        """Return the design that options describe, as a user or a file gives them.

        Raises:
            ConfigError: An option does not exist or is not allowed.
        """
        return build_options(cls, ComponentSpec(KIND, options))


class MedusaHeads(StateHeads):
    """K heads on the target's last normalized state.

    With the state of token t, head i (from 0) predicts token t + 2 + i: what the target's own head
    says of that state is token t + 1, the pending one.

    Args:
        target: Sizes of the target.
        design: What the heads are made of.
        target_head: The target's LM head, [V, D], to begin with or to share; None where the heads
            have their own, to be filled from a file.

    Source: arXiv:2401.10774, section 2.1.
    """

    def __init__(
        self, target: TargetShape, design: MedusaDesign, target_head: Tensor | None
    ) -> None:
        size, own = target.hidden_size, design.own_lm_heads
        blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(size) for _ in range(design.layers)))
            for _ in range(design.heads)
        )
        super().__init__(
            blocks, lm_heads(design.heads, target.vocab_size, size, target_head, own=own)
        )
        self.design = design

    def head_logits(self, head: int, states: Tensor) -> Tensor:
        """Return one head's logits, [..., V], from the target's last states, [..., D]."""
        return self.say(head, states)

    def forward(self, states: Tensor) -> Tensor:
        """Return all heads' logits, [K, ..., V], from the target's last states, [..., D]."""
        return torch.stack([self.head_logits(head, states) for head in range(self.design.heads)])


def load_medusa(path: str | Path, target: ModelInfo) -> MedusaHeads:
    """Read heads from a directory of our own or of the published layout.

    Raises:
        ModelError: It cannot be read, is of another kind, or was made for another target.
        ConfigError: Its options are not allowed.
    """
    head = read_head(path, KIND, target)
    design = MedusaDesign.read(head.options)
    shared = None if design.own_lm_heads else target_tensors(target.name).head
    module = MedusaHeads(TargetShape.of(target), design, shared)
    head.fill(module)
    return module
