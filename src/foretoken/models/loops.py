"""Where the layers of a model that shares them lie: a prelude, a group run in loops, a coda."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from foretoken.errors import ModelError

MODEL_TYPE = "looped_llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopShape:
    """How many layers there are, as they are run and as they are stored.

    Virtual layers are those that run, each with keys and values of its own; stored layers are
    those that have weights of their own. Both count the prelude first and the coda last.

    Args:
        prelude: Layers that run once, before the loops.
        group: Layers that each loop runs again, with the same weights.
        loops: How often the group runs, G.
        coda: Layers that run once, after the loops.

    Raises:
        ModelError: Nothing is looped, or a number is negative.
    """

    prelude: int = 0
    group: int
    loops: int
    coda: int = 0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, least = getattr(self, entry.name), int(entry.name in ("group", "loops"))
            if not isinstance(value, int) or value < least:
                raise ModelError(
                    f"a looped model needs {entry.name} to be an integer of at least {least}; "
                    f"got {value!r}",
                    hint="check the layers and loops in config.json",
                )

    @classmethod
    def of(cls, config: Any) -> LoopShape | None:
        """Return the shape that a configuration asks for; None for models without shared layers.

        Args:
            config: Of transformers, or its fields as read from config.json.

        Raises:
            ModelError: The configuration is of a looped model and makes no sense.
        """
        if getattr(config, "model_type", None) != MODEL_TYPE:
            return None
        return cls(
            prelude=config.prelude_layers,
            group=config.group_layers,
            loops=config.num_loops,
            coda=config.coda_layers,
        )

    @property
    def num_layers(self) -> int:
        """Virtual layers."""
        return self.prelude + self.group * self.loops + self.coda

    @property
    def num_stored(self) -> int:
        """Layers with weights of their own."""
        return self.prelude + self.group + self.coda

    @property
    def first_of_coda(self) -> int:
        """The virtual layer that the coda begins with."""
        return self.prelude + self.group * self.loops

    def stored_of(self, layer: int) -> int:
        """Return the stored layer whose weights a virtual layer has.

        Raises:
            ValueError: There is no such virtual layer.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"virtual layers are 0 to {self.num_layers - 1}; got {layer}")
        if layer < self.prelude:
            return layer
        if layer >= self.first_of_coda:
            return layer - self.first_of_coda + self.prelude + self.group
        return self.prelude + (layer - self.prelude) % self.group

    @property
    def stored_layers(self) -> tuple[int, ...]:
        """The stored layer of each virtual layer."""
        return tuple(map(self.stored_of, range(self.num_layers)))

    def layers_of_loop(self, loop: int) -> range:
        """Return the virtual layers that a loop runs.

        Args:
            loop: From 0 to `loops` - 1; the loop that takes a row from depth `loop` to the next.

        Raises:
            ValueError: There is no such loop.
        """
        if not 0 <= loop < self.loops:
            raise ValueError(f"loops are 0 to {self.loops - 1}; got {loop}")
        start = self.prelude + loop * self.group
        return range(start, start + self.group)
