"""What a run that trains a looped or plain decoder depends on, beside its texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.loops import LoopShape
from foretoken.training.loop import LoopConfig
from foretoken.training.looped.losses import depth_weights
from foretoken.training.settings import check_counts, check_positive, check_seed

Kind = Literal["shared", "shallow", "deep"]
WEIGHT_DECAY = 0.1
MAX_WARMUP_STEPS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopedSettings:
    """What a model depends on.

    Args:
        model: Whose tokens it speaks: a directory, hub id, or the name of an embedded model. What
            sizes are not given are this one's.
        kind: "shared" runs its group in loops; to compare it with, "shallow" is a plain Llama of
            the layers that it stores, and "deep" one of those that it runs.
        prelude: Layers before the loops.
        group: Layers of a loop.
        loops: How often the group runs.
        coda: Layers behind the loops.
        hidden: Channels between the layers; None for the model's, as below.
        heads: Query heads per layer.
        kv_heads: Key and value heads per layer.
        head_dim: Channels of a head.
        intermediate: Channels of the feed-forward part.
        copies_embedding: Whether the embedding begins as the model's, which needs its `hidden`.
        depth_weights: As `losses.depth_weights` reads them; plain kinds have the last depth alone.
        context: Tokens of a row.
        batch_size: Rows per step.
        minutes: Of training; sets the steps by what one takes on this machine.
        steps: Of training; None leaves it to `minutes`.
        learning_rate: The highest; it falls to zero.
        optimizer: One of `training.optimizers.OPTIMIZERS`.
        precision: Of training; see `LoopConfig`.
        compiles: Whether layers are compiled first, which takes a minute and then saves time.
        measure_steps: Steps between measurements on held-out texts, checkpoints and models left
            in the folder.
        seed: Of everything random.

    Raises:
        ConfigError: A value is not allowed.
        ModelError: Nothing is looped.
    """

    model: str = "stories"
    kind: Kind = "shared"
    prelude: int = 0
    group: int = 2
    loops: int = 4
    coda: int = 0
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate: int | None = None
    copies_embedding: bool = False
    depth_weights: str = "uniform"
    context: int = 256
    batch_size: int = 8
    minutes: float = 20.0
    steps: int | None = None
    learning_rate: float = 4e-3
    optimizer: str = "muon"
    precision: str = "auto"
    compiles: bool = False
    measure_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(
                f"kind is {', '.join(get_args(Kind))}; got {self.kind!r}", hint="change --kind"
            )
        check_counts(self, ("context", "batch_size", "steps", "measure_steps"))
        check_positive(self, ("minutes", "learning_rate"))
        check_seed(self.seed)
        depth_weights(self.depth_weights, self.loop_shape.loops)
        self.loop(self.steps or 1)

    @property
    def loop_shape(self) -> LoopShape:
        """Which layers share their weights, if it is the shared kind."""
        return LoopShape(prelude=self.prelude, group=self.group, loops=self.loops, coda=self.coda)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of every depth's loss."""
        if self.kind != "shared":
            return (1.0,)
        return depth_weights(self.depth_weights, self.loops)

    def shape(self, config: Any) -> DraftShape:
        """Return the sizes of the model.

        Args:
            config: Of the model whose tokens it speaks.

        Raises:
            ConfigError: Two sizes do not go together, or the embedding that is to be copied has
                another width.
        """
        like = DraftShape.of(config)
        shape = DraftShape(
            layers=_num_layers(self.kind, self.loop_shape),
            hidden=self.hidden or like.hidden,
            heads=self.heads or like.heads,
            kv_heads=self.kv_heads or like.kv_heads,
            head_dim=self.head_dim or like.head_dim,
            intermediate=self.intermediate or like.intermediate,
        )
        if self.copies_embedding and shape.hidden != like.hidden:
            raise ConfigError(
                f"an embedding of {like.hidden} channels cannot be copied to {shape.hidden}",
                hint="leave out --hidden or --copy-embedding",
            )
        return shape

    def loop(self, num_steps: int) -> LoopConfig:
        """Return how so many steps are trained."""
        return LoopConfig(
            num_steps=num_steps,
            learning_rate=self.learning_rate,
            num_warmup_steps=max(1, min(MAX_WARMUP_STEPS, num_steps // 10)),
            final_share=0.0,
            weight_decay=WEIGHT_DECAY,
            num_checkpoint_steps=self.measure_steps,
            seed=self.seed,
            precision=self.precision,
            optimizer=self.optimizer,
        )


def _num_layers(kind: Kind, shape: LoopShape) -> int:
    """Return how many layers run."""
    return shape.num_stored if kind == "shallow" else shape.num_layers


__all__ = ["Kind", "LoopedSettings"]
