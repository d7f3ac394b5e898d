"""What a run that makes a draft model depends on, and what it may choose anew when resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from foretoken.core.params import SamplingParams
from foretoken.errors import ConfigError, UnsupportedModelError
from foretoken.models.decoder_config import MODEL_TYPES
from foretoken.models.draft_shape import DraftShape
from foretoken.models.pruning import check_prunable
from foretoken.training.draft.distil import DistilConfig
from foretoken.training.draft.initialise import Method
from foretoken.training.draft.study_record import StudySettings
from foretoken.training.settings import check_counts, check_positive, check_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSettings:
    """What a draft model depends on, beside the prompts.

    Args:
        model: The target: a directory, hub id, or the name of an embedded pair.
        num_prompts: Prompts to train on; the target writes those that are not given.
        max_new_tokens: Of every output.
        temperature: Of the outputs, of the loss, and of serving.
        shape: Sizes of the draft as `DraftShape.parse` reads them, what is left out being the
            target's; None lets the shape study choose.
        method: How it begins, "prune" or "scratch".
        loss: One of `losses.DIVERGENCES`.
        on_policy: Share of the steps on the draft's own outputs.
        minutes: Of distillation; sets the steps by what one takes on this machine.
        steps: Of distillation; None leaves it to `minutes`.
        batch_size: Most texts per step.
        learning_rate: The highest.
        precision: Of training; see `LoopConfig`.
        seed: Of everything random.

    Raises:
        ConfigError: A value is not allowed.
    """

    model: str = "stories"
    num_prompts: int = 2048
    max_new_tokens: int = 128
    temperature: float = 0.0
    shape: str | None = None
    method: Method = "prune"
    loss: str = "forward-kl"
    on_policy: float = 0.0
    minutes: float = 20.0
    steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, ("num_prompts", "max_new_tokens", "steps"))
        check_positive(self, ("minutes",))
        check_seed(self.seed)
        if self.method not in get_args(Method):
            raise ConfigError(
                f"a draft begins by {' or '.join(get_args(Method))}; got {self.method!r}",
                hint="change --method",
            )
        self.sampling()
        self.distillation(self.steps or 1).loop()

    def sampling(self) -> SamplingParams:
        """Return how the target writes."""
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature)

    def distillation(self, num_steps: int) -> DistilConfig:
        """Return how the draft is distilled in so many steps."""
        return DistilConfig(
            num_steps=num_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            loss=self.loss,
            temperature=self.temperature,
            on_policy=self.on_policy,
            precision=self.precision,
            seed=self.seed,
        )

    def study(self, device: str) -> StudySettings:
        """Return what shapes are compared, if none was asked for."""
        return StudySettings(
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            loss=self.loss,
            method=self.method,
            temperature=self.temperature,
            precision=self.precision,
            device=device,
            seed=self.seed,
        )

    def given_shape(self, config: Any) -> DraftShape | None:
        """Return the shape that was asked for; None if the study is to choose.

        Args:
            config: The target's, which says what was left out.

        Raises:
            ConfigError: It is no shape, or none that the target can be pruned to.
            UnsupportedModelError: The target is of a family that can neither be cut nor studied.
        """
        is_known = config.model_type in MODEL_TYPES
        if not is_known and (self.shape is None or self.method == "prune"):
            raise UnsupportedModelError(
                f"drafts are cut from models of type {', '.join(MODEL_TYPES)}, and shapes compared "
                f"for those; got {config.model_type!r}",
                hint="use --method scratch and give every size: --layers, --hidden, --heads, "
                "--kv-heads, --head-dim and --intermediate",
            )
        if self.shape is None:
            return None
        shape = DraftShape.parse(self.shape, DraftShape.of(config) if is_known else None)
        if self.method == "prune":
            check_prunable(config, shape)
        return shape


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMachine:
    """What a session of a run may choose anew: it changes times, not the draft.

    Args:
        device: Where the models run.
        max_nodes: Most draft tokens per step when serving.
        against: More drafters to serve, name to spec, such as the draft model that there was.
    """

    device: str = "auto"
    max_nodes: int = 8
    against: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_counts(self, ("max_nodes",))


__all__ = ["DraftMachine", "DraftSettings"]
