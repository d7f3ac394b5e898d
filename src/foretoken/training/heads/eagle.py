"""Training of `eagle` heads: EAGLE-1 on the target's next states, EAGLE-3 on its own outputs."""

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
from foretoken.models.heads.eagle import (
    EAGLE_1,
    EAGLE_3,
    EagleDesign,
    EagleModule,
    fused_layers,
)
from foretoken.models.heads.eagle_init import initialise
from foretoken.models.heads.eagle_layer import LayerSizes
from foretoken.models.heads.files import save_head
from foretoken.models.heads.target import TargetShape, TargetTensors
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.kinds import HeadKind
from foretoken.training.losses import Divergence

# Weight of each step's loss after the one before it, and of EAGLE-1's divergence beside the
# distance between states: those of the papers' code.
STEP_DECAY = 0.8
DIVERGENCE_WEIGHT = 0.1
_HEAD_DIMS = (64, 32, 16, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What a user may say of a head's layer.

    Args:
        variant: `eagle-3` reads low, middle and high states of the target and has a language-model
            head of its own; `eagle-1` reads its last states and shares its head.
        steps: How far drafts go in training.
        width: Columns of the layer; the target's if it is not given. Of `eagle-3` only: narrow
            heads are as good as wide ones for wide targets, and draft faster.
        heads: Of attention; `width` divided by 64, or by less if that does not go.
        kv_heads: Of keys and values; as many if it is not given.
        intermediate: Of the feed-forward part; 8/3 of `width` if it is not given.
        draft_vocab: How many of the target's tokens it can say: the first ones, which are the
            frequent ones of byte-pair vocabularies. All if it is not given. Of `eagle-3` only.
        rope_theta: Base of the rotary frequencies.
    """

    variant: str = EAGLE_3
    steps: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None
    draft_vocab: int | None = None
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.variant not in (EAGLE_1, EAGLE_3):
            raise ConfigError(
                f"variant is {EAGLE_1} or {EAGLE_3}; got {self.variant!r}", hint="change variant"
            )
        if self.variant == EAGLE_1 and (self.width or self.draft_vocab):
            raise ConfigError(
                f"width and draft_vocab are for {EAGLE_3}: {EAGLE_1} shares the target's head",
                hint=f"leave them out, or write variant={EAGLE_3}",
            )
        names = ("steps", "width", "heads", "kv_heads", "intermediate", "draft_vocab")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is at least 1; got {value}", hint=f"change {name}")

    def sizes(self, target: TargetShape) -> LayerSizes:
        """Return the layer's sizes.

        Raises:
            ConfigError: The heads do not divide what they should.
        """
        width = self.width or target.hidden_size
        heads = self.heads or next((width // dim for dim in _HEAD_DIMS if width % dim == 0), 1)
        kv_heads = self.kv_heads or heads
        if width % (2 * heads) or heads % kv_heads:
            raise ConfigError(
                f"a layer of width {width} has heads of even width, and as many or fewer of keys; "
                f"got {heads} heads and {kv_heads} of keys",
                hint="change heads, kv_heads or width",
            )
        return LayerSizes(
            hidden=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width // heads,
            intermediate=self.intermediate or -(-8 * width // 96) * 32,
            rope={"rope_type": "default", "rope_theta": self.rope_theta},
        )

    def design(self, target: TargetShape, num_steps: int) -> EagleDesign:
        """Return the head that the options describe.

        Raises:
            ConfigError: They do not fit together, or not the target.
        """
        sizes = self.sizes(target)
        if self.variant == EAGLE_1:
            return EagleDesign(
                variant=EAGLE_1,
                sizes=sizes,
                target_layers=(target.num_layers,),
                fc_bias=True,
                num_steps=num_steps,
            )
        if self.draft_vocab is not None and self.draft_vocab > target.vocab_size:
            raise ConfigError(
                f"draft_vocab is at most the target's {target.vocab_size} tokens; "
                f"got {self.draft_vocab}",
                hint="change draft_vocab",
            )
        return EagleDesign(
            variant=EAGLE_3,
            sizes=sizes,
            target_layers=fused_layers(target.num_layers),
            draft_vocab_size=self.draft_vocab,
            has_embedding=sizes.hidden != target.hidden_size,
            has_head=True,
            has_output_norm=True,
            num_steps=num_steps,
        )


def read_layers(num_layers: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers whose states a head with such options reads; errors as for `HeadKind`."""
    asked = build_options(LayerOptions, ComponentSpec("head", options))
    return (num_layers,) if asked.variant == EAGLE_1 else fused_layers(num_layers)


def build(target: TargetShape, shared: TargetTensors, options: Mapping[str, Any]) -> EagleModule:
    """Make a new head; errors as for `HeadKind`."""
    asked = build_options(LayerOptions, ComponentSpec("eagle", options))
    num_steps = asked.steps or (1 if asked.variant == EAGLE_1 else 3)
    module = EagleModule(asked.design(target, num_steps), target, shared)
    initialise(module, shared)
    return module


def loss(module: nn.Module, batch: HeadBatch, divergence: Divergence) -> Tensor:
    """Return the loss of drafts from every position, as far as the design says.

    EAGLE-1: at each step smooth L1 between the head's output and the target's next state, plus a
    tenth of the divergence between what they say. EAGLE-3: the divergence alone, the states being
    free. Steps count 0.8 as much as those before.

    Args:
        module: An `EagleModule`.
        batch: Texts.
        divergence: Between logits.

    Source: arXiv:2401.15077, section 4.1 (`L = L_reg + 0.1 L_cls`); arXiv:2503.01840, section 3.2.
    """
    head: EagleModule = module  # type: ignore[assignment]
    steps = unrolled(head, batch)
    total = said_loss(head, steps, batch, divergence)
    if head.design.is_eagle3:
        return total
    return DIVERGENCE_WEIGHT * total + state_loss(head, steps, batch)


def unrolled(head: EagleModule, batch: HeadBatch) -> list[Tensor]:
    """Return drafts from every position as far as the design says and the texts are long."""
    num_steps = min(head.design.num_steps, batch.token_ids.shape[1] - 2)
    return head(batch.token_ids, batch.hidden, num_steps) if num_steps > 0 else []


def said_loss(
    head: EagleModule, steps: list[Tensor], batch: HeadBatch, divergence: Divergence
) -> Tensor:
    """Return the mean divergence between what a head's steps and the target say, steps weighted.

    Of a head that knows some tokens only, the target's distribution over these is what it should
    say, and places where the target's first choice is another one do not count.
    """
    losses = []
    for step, states in enumerate(steps):
        counts = batch.is_output[:, 2 + step :]
        wanted = batch.logits[:, 1 + step : -1][counts]
        said = head.logits(states[counts])  # of the rest there is no need
        if head.design.draft_vocab_size:
            choices, wanted = wanted.argmax(dim=-1), wanted[:, head.draft_ids]
            is_known = choices == head.draft_ids[wanted.argmax(dim=-1)]
            said, wanted = said[is_known], wanted[is_known]
        losses.append(_mean(divergence(said, wanted)))
    return _weighted(losses, head)


def state_loss(head: EagleModule, steps: list[Tensor], batch: HeadBatch) -> Tensor:
    """Return the mean smooth L1 distance between outputs and the target's next states."""
    [layer] = head.design.target_layers
    losses = []
    for step, states in enumerate(steps):
        counts = batch.is_output[:, 2 + step :]
        wanted = batch.hidden[layer][:, 1 + step : -1][counts]
        losses.append(_mean(functional.smooth_l1_loss(states[counts], wanted, reduction="none")))
    return _weighted(losses, head)


def _mean(values: Tensor) -> Tensor:
    """Return the mean; 0 of nothing."""
    return values.sum() / max(1, values.numel())


def _weighted(losses: list[Tensor], head: EagleModule) -> Tensor:
    """Return the mean of the steps' losses, weighted; of texts too short for one, 0."""
    if not losses:
        return head.fc.weight.sum() * 0  # which has a gradient: none
    weights = torch.tensor([STEP_DECAY**step for step in range(len(losses))]).to(losses[0])
    return torch.stack(losses) @ weights / weights.sum()


def save(module: nn.Module, target: TargetShape, folder: Path, card: str) -> None:
    """Write a head's directory; arguments as for `HeadKind`."""
    head: EagleModule = module  # type: ignore[assignment]
    save_head(head.state_dict(), "eagle", target, head.design.as_options(), folder, card)


KIND = HeadKind(name="eagle", hidden_layers=read_layers, build=build, loss=loss, save=save)
