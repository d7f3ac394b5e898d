"""The configuration of a Llama whose layers are run in loops."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from foretoken.errors import ModelError
from foretoken.models.loops import MODEL_TYPE, LoopShape


@strict
class LoopedLlamaConfig(LlamaConfig):  # type: ignore[misc]  # transformers has no types
    """A Llama with a group of layers that runs several times, between a prelude and a coda.

    Args:
        prelude_layers: Layers that run once, before the loops.
        group_layers: Layers that each loop runs again, with the same weights.
        num_loops: How often the group runs.
        coda_layers: Layers that run once, after the loops.
        num_hidden_layers: Layers that run, each with keys and values of its own; it follows from
            the others, and None leaves it to them.

    Raises:
        ModelError: A number is too small, or num_hidden_layers contradicts the others.
    """

    model_type = MODEL_TYPE

    prelude_layers: int = 0
    group_layers: int = 2
    num_loops: int = 4
    coda_layers: int = 0
    num_hidden_layers: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        num_layers = self.loop_shape.num_layers
        if self.num_hidden_layers not in (None, num_layers):
            raise ModelError(
                f"num_hidden_layers of a looped model is prelude_layers + group_layers x num_loops "
                f"+ coda_layers = {num_layers}; got {self.num_hidden_layers}",
                hint="leave num_hidden_layers out of the configuration",
            )
        self.num_hidden_layers = num_layers
        super().__post_init__(**kwargs)

    @classmethod
    def of_llama(cls, config: LlamaConfig, shape: LoopShape) -> LoopedLlamaConfig:
        """Return a Llama's configuration with its layers run in loops.

        Args:
            config: A Llama's; it has as many layers as the shape.
            shape: Which of them share their weights.

        Raises:
            ModelError: The numbers of layers differ.
        """
        values = config.to_dict()
        for name in ("model_type", "architectures", "transformers_version"):
            values.pop(name, None)
        return cls(
            **values,
            prelude_layers=shape.prelude,
            group_layers=shape.group,
            num_loops=shape.loops,
            coda_layers=shape.coda,
        )

    @property
    def loop_shape(self) -> LoopShape:
        """Which layers share their weights."""
        return LoopShape(
            prelude=self.prelude_layers,
            group=self.group_layers,
            loops=self.num_loops,
            coda=self.coda_layers,
        )


__all__ = ["LoopedLlamaConfig"]
