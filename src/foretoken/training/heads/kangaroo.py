"""How adapters of `kangaroo` are trained: to say early what the target says at last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from foretoken.core.options import ComponentSpec, build_options
from foretoken.models.heads import kangaroo
from foretoken.models.heads.kangaroo import AdapterOptions, KangarooAdapter, default_exit
from foretoken.models.heads.target import TargetShape, TargetTensors
from foretoken.training.heads.data import HeadBatch
from foretoken.training.heads.kinds import HeadKind
from foretoken.training.losses import Divergence


def _read(options: Mapping[str, Any]) -> AdapterOptions:
    return build_options(AdapterOptions, ComponentSpec(kangaroo.KIND, options))


def hidden_layers(num_layers: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layer below the adapter; errors as for `HeadKind`."""
    return (_read(options).layers or default_exit(num_layers),)


def build(
    target: TargetShape, tensors: TargetTensors, options: Mapping[str, Any]
) -> KangarooAdapter:
    """Return a new adapter; errors as for `HeadKind`."""
    return KangarooAdapter.new(target, tensors, _read(options))


def loss(module: nn.Module, batch: HeadBatch, divergence: Divergence) -> Tensor:
    """Return the mean divergence from the target over the tokens that it wrote.

    The paper takes the cross-entropy with the target's distribution, whose gradient is that of
    the forward KL divergence.

    Source: arXiv:2404.18911, section 3.1.
    """
    adapter = cast(KangarooAdapter, module)
    text, position = batch.is_output[:, 1:].nonzero(as_tuple=True)  # the row before the token
    states = adapter(batch.hidden[adapter.options.layers])[text, position]
    divergences = divergence(adapter.head_logits(states), batch.logits[text, position])
    return divergences.sum() / max(1, len(position))  # no places give no loss rather than 0/0


def save(module: nn.Module, target: TargetShape, folder: Path, card: str) -> None:
    """Write an adapter to a folder that the drafter `kangaroo` reads."""
    cast(KangarooAdapter, module).save(target, folder, card)


KIND = HeadKind(name=kangaroo.KIND, hidden_layers=hidden_layers, build=build, loss=loss, save=save)
