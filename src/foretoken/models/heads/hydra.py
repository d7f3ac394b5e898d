"""Hydra heads: Medusa's, where each head also sees the drafted tokens before its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foretoken.core.options import ComponentSpec, build_options
from foretoken.errors import ConfigError
from foretoken.models.adapter import ModelInfo
from foretoken.models.heads.files import TargetShape, TargetTensors, read_head, target_tensors
from foretoken.models.heads.linear import MixingBlock, ResidualBlock, StateHeads, lm_heads

KIND = "hydra"


@dataclass(frozen=True, slots=True, kw_only=True)
class HydraDesign:
    """What Hydra heads are made of; the options of their training and of their files.

    Args:
        heads: How many, K: the most tokens of a path that they draft.
        layers: Layers of each: one that mixes the state with the tokens, then residual blocks.
        own_lm_heads: Whether each head has an LM head of its own, or all share the target's, which
            is then neither trained nor saved.
    """

    heads: int = 4
    layers: int = 1
    own_lm_heads: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.layers < 1:
            raise ConfigError(
                f"hydra has at least 1 head of 1 layer; got heads={self.heads} and "
                f"layers={self.layers}",
                hint="change heads or layers",
            )

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> HydraDesign:
        """Return the design that options describe, as a user or a file gives them.

        Raises:
            ConfigError: An option does not exist or is not allowed.
        """
        return build_options(cls, ComponentSpec(KIND, options))


class HydraHeads(StateHeads):
    """K heads on the target's last normalized state and on the tokens after it.

    With the state of token t, head i (from 0) predicts token t + 2 + i, and sees the embeddings of
    the tokens t + 1 (the pending one) to t + 1 + i.

    Args:
        target: Sizes of the target.
        design: What the heads are made of.
        shared: The target's embedding, which is neither trained nor saved, and its LM head.

    Source: arXiv:2402.05109, section 3; without the prefix attention of Hydra++.
    """

    embedding: Tensor

    def __init__(self, target: TargetShape, design: HydraDesign, shared: TargetTensors) -> None:
        size, own = target.hidden_size, design.own_lm_heads
        blocks = nn.ModuleList(
            nn.Sequential(
                MixingBlock(head + 2, size),
                *(ResidualBlock(size) for _ in range(design.layers - 1)),
            )
            for head in range(design.heads)
        )
        super().__init__(
            blocks, lm_heads(design.heads, target.vocab_size, size, shared.head, own=own)
        )
        self.design = design
        self.register_buffer("embedding", shared.embedding.detach().float(), persistent=False)

    def head_logits(self, head: int, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return one head's logits, [..., V].

        Args:
            head: Which, from 0.
            states: The target's last states, [..., D].
            token_ids: The `head` + 1 tokens after each state, [..., head + 1] int64.
        """
        return self.say(head, self.see(states, token_ids))

    def see(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return states and the embeddings of the tokens behind them in a row, [..., (n + 1) D].

        Args:
            states: [..., D].
            token_ids: [..., n] int64.
        """
        embedded = functional.embedding(token_ids, self.embedding).flatten(-2)
        return torch.cat((states.to(embedded.dtype), embedded), dim=-1)

    def forward(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return all heads' logits, [K, ..., V], where the tokens are known.

        Args:
            states: The target's last states, [..., D].
            token_ids: The K tokens after each state, [..., K] int64.
        """
        heads = range(self.design.heads)
        return torch.stack([self.head_logits(i, states, token_ids[..., : i + 1]) for i in heads])


def load_hydra(path: str | Path, target: ModelInfo) -> HydraHeads:
    """Read heads from a directory.

    Raises:
        ModelError: It cannot be read, is of another kind, or was made for another target; or the
            target's embedding cannot be read from its files.
        ConfigError: Its options are not allowed.
    """
    head = read_head(path, KIND, target)
    design = HydraDesign.read(head.options)
    module = HydraHeads(TargetShape.of(target), design, target_tensors(target.name))
    head.fill(module)
    return module
