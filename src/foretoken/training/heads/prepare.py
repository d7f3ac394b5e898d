"""From recorded texts to batches: which states are held, where, and where logits come from."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foretoken.core.progress import OnProgress, silent
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.training.corpus import Example
from foretoken.training.heads.data import HeadData
from foretoken.training.heads.states import (
    LOGITS,
    StateLayout,
    States,
    StoredStates,
    TargetStates,
    layer_name,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE_DTYPES = ("auto", *DTYPES)
# Logits in bfloat16 are off by up to 0.4 % of themselves; a head that caps or scales its logits,
# or has a bias, is off by more than this share of the largest.
MAX_LOGIT_ERROR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBounds:
    """Where states may be kept.

    Args:
        folder: For those on disk.
        max_bytes: Most that they may take there; states that take more are not kept.
        num_uses: How often each text is used.
    """

    folder: Path
    max_bytes: float
    num_uses: float

    @property
    def room_bytes(self) -> float:
        """Bytes that states may take and that the disk still has."""
        return min(self.max_bytes, shutil.disk_usage(self.folder.parent).free)


@dataclass(frozen=True, slots=True)
class StateSource:
    """How the states of a target come to a training.

    Args:
        target: The model that computes them.
        layers: Whose states batches have.
        layout: What is held of every token.
        head: The target's matrix to its logits, [V, D]; None where logits are held.
        device: Where batches go.
    """

    target: LanguageModel
    layers: tuple[int, ...]
    layout: StateLayout
    head: Tensor | None
    device: torch.device

    def computed(self, texts: Sequence[Example]) -> HeadData:
        """Return texts whose states are computed whenever a batch asks for them."""
        return self._data(texts, self._computed(texts))

    def held(
        self, texts: Sequence[Example], bounds: StateBounds, on_progress: OnProgress = silent
    ) -> tuple[HeadData, dict[str, Any]]:
        """Return texts whose states are kept on disk, if that is worth it and they fit.

        Args:
            texts: Recorded ones.
            bounds: Of what is kept.
            on_progress: Told about what is written.

        Returns:
            The texts, and for the report what became of their states.
        """
        token_ids = [text.token_ids for text in texts]
        num_bytes = StoredStates.num_bytes(token_ids, self.layout)
        is_stored = bounds.num_uses > 1 and num_bytes <= bounds.room_bytes
        states: States = self._computed(texts)
        if is_stored:
            stored = StoredStates(bounds.folder, token_ids, self.layout)
            stored.fill(states, on_progress)
            states = stored
        described = {
            "dtype": str(self.layout.dtype).removeprefix("torch."),
            "layers": list(self.layout.layers),
            "num_bytes": num_bytes,
            "is_on_disk": is_stored,
        }
        return self._data(texts, states), described

    def _computed(self, texts: Sequence[Example]) -> TargetStates:
        return TargetStates(self.target, [text.token_ids for text in texts], self.layout)

    def _data(self, texts: Sequence[Example], states: States) -> HeadData:
        last_layer = self.target.info.num_layers
        return HeadData(
            texts, states, self.layers, last_layer=last_layer, head=self.head, device=self.device
        )


def state_source(
    target: LanguageModel,
    layers: Sequence[int],
    head: Tensor,
    example: Example,
    *,
    dtype: str,
    device: torch.device,
) -> StateSource:
    """Return how a target's states come to a training.

    Its logits are V numbers a token, its last states D: they are held only where the head's
    matrix does not make logits of states.

    Args:
        target: The model that computes them.
        layers: Whose states are wanted.
        head: The target's matrix to its logits, [V, D].
        example: A text to find out with.
        dtype: In which states are held; "auto" is that in which the target computes.
        device: Where batches go.

    Raises:
        ConfigError: There is no such dtype, or no such layer.
    """
    info = target.info
    check_states_dtype(dtype)
    last = info.num_layers
    wanted = tuple(sorted({*layers, last}))
    held = DTYPES.get(dtype, info.dtype if info.dtype in DTYPES.values() else torch.float32)
    layout = StateLayout(wanted, info.hidden_size, info.vocab_size, torch.float32)
    [states] = TargetStates(target, [example.token_ids], layout).read([0])
    made = functional.linear(states[layer_name(last)], head.to(torch.float32))
    error = (made - states[LOGITS]).abs().max()
    if error <= MAX_LOGIT_ERROR * states[LOGITS].abs().max():
        layout = replace(layout, num_logits=0)
        return StateSource(target, tuple(layers), replace(layout, dtype=held), head, device)
    layout = replace(layout, layers=tuple(sorted(set(layers))), dtype=held)
    return StateSource(target, tuple(layers), layout, None, device)


def check_states_dtype(dtype: str) -> None:
    """Check the name of the type in which states are held.

    Raises:
        ConfigError: There is no such type.
    """
    if dtype not in STATE_DTYPES:
        raise ConfigError(
            f"states are held in {', '.join(STATE_DTYPES)}; got {dtype!r}",
            hint="change --states-dtype",
        )


__all__ = ["STATE_DTYPES", "StateBounds", "StateSource", "check_states_dtype", "state_source"]
