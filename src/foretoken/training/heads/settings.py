"""What a run that trains a head depends on, and what it may choose anew whenever it is resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from foretoken.core.options import ComponentSpec
from foretoken.core.params import SamplingParams
from foretoken.drafters import prepare_drafter
from foretoken.errors import ConfigError
from foretoken.training.heads.kinds import KINDS
from foretoken.training.heads.prepare import check_states_dtype
from foretoken.training.loop import LoopConfig
from foretoken.training.losses import Divergence, at_temperature, divergence
from foretoken.training.settings import check_counts, check_positive, check_seed

NUM_CHECKPOINT_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """What a head depends on, beside the prompts.

    Args:
        kind: One of `KINDS`.
        options: The kind's own, as text by name.
        model: The target: a directory, hub id, or the name of an embedded pair.
        num_prompts: Prompts to train on; the target writes those that are not given.
        max_new_tokens: Of every output.
        temperature: Of the outputs, of the loss, and of serving.
        loss: One of `losses.DIVERGENCES`.
        epochs: How often each text is used; sets the steps.
        steps: Of training; None leaves it to `epochs`.
        batch_size: Texts per step.
        learning_rate: The highest.
        precision: Of training; see `LoopConfig`.
        states_dtype: In which states are kept; one of `STATE_DTYPES`.
        seed: Of everything random.
    """

    kind: str
    options: Mapping[str, str] = field(default_factory=dict)
    model: str = "stories"
    num_prompts: int = 2048
    max_new_tokens: int = 128
    temperature: float = 0.0
    loss: str = "forward-kl"
    epochs: float = 4.0
    steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    precision: str = "auto"
    states_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        KINDS.load(self.kind)
        check_counts(self, ("num_prompts", "max_new_tokens", "steps", "batch_size"))
        check_positive(self, ("epochs", "learning_rate"))
        check_seed(self.seed)
        check_states_dtype(self.states_dtype)
        self.divergence()
        self.sampling()
        self.loop(1)

    def sampling(self) -> SamplingParams:
        """Return how the target writes."""
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature)

    def divergence(self) -> Divergence:
        """Return what the loss compares predictions by."""
        return at_temperature(divergence(self.loss), self.temperature)

    def loop(self, num_texts: int) -> LoopConfig:
        """Return how so many texts are trained on."""
        num_steps = self.steps or math.ceil(self.epochs * num_texts / self.batch_size)
        return LoopConfig(
            num_steps=num_steps,
            learning_rate=self.learning_rate,
            num_warmup_steps=max(1, min(20, num_steps // 10)),
            seed=self.seed,
            num_checkpoint_steps=NUM_CHECKPOINT_STEPS,
            precision=self.precision,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMachine:
    """What a session of a run may choose anew: it changes times, not the head.

    Args:
        device: Where target and head run.
        max_disk_bytes: Most that states may take on disk.
        max_nodes: Most draft tokens per step when serving.
        against: More drafters to serve, name to spec, such as a draft model.
    """

    device: str = "auto"
    max_disk_bytes: float = 8e9
    max_nodes: int = 8
    against: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(self, ("max_nodes",))
        for spec in self.against.values():
            prepare_drafter(ComponentSpec.parse(spec))
        if not self.max_disk_bytes >= 0:
            raise ConfigError(
                f"max_disk is a number >= 0; got {self.max_disk_bytes}", hint="change --max-disk"
            )


__all__ = ["HeadMachine", "HeadSettings"]
