"""Hydra: Medusa's heads, where each also sees the drafted tokens before its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from foretoken.drafters.base import DrafterHost, Taxonomy
from foretoken.drafters.head_drafter import Generators, HeadDrafter
from foretoken.drafters.levels import Growing, add_level, frontier_paths
from foretoken.drafters.model_drafter import GrowthOptions
from foretoken.models.heads.hydra import HydraHeads, load_hydra
from foretoken.models.state_rows import join_columns, take_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class HydraOptions(GrowthOptions):
    """Options of `hydra`, besides how trees grow.

    Args:
        path: Directory of heads that were trained for the target.
        max_depth: As there; never more than there are heads.
        min_gain: As there; a level costs one head.
    """

    name: ClassVar[str] = "hydra"
    path: str
    min_gain: float = 0.05


class HydraDrafter(HeadDrafter):
    """Grows trees best first, or to an expansion, with one head per level for all nodes of it.

    Args:
        heads: Made for the host's target.
        options: How trees grow.
        host: What there is.
    """

    Options: ClassVar[type[Any]] = HydraOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="heads on the target's states",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="Hydra, arXiv:2402.05109",
    )

    def __init__(self, heads: HydraHeads, options: HydraOptions, host: DrafterHost) -> None:
        super().__init__(options, heads, heads.design.heads, host)
        self._embedding = heads.embedding

    @classmethod
    def create(cls, options: HydraOptions, host: DrafterHost) -> Self:
        """Load the heads.

        Raises:
            ModelError: They cannot be read, are of another kind or were made for another target.
        """
        return cls(load_hydra(options.path, host.target.info), options, host)

    def _levels(self, growing: Sequence[Growing]) -> Callable[[Sequence[Growing], int], None]:
        generators = Generators()

        def add(growing: Sequence[Growing], depth: int) -> None:
            logits = self._served.logits(self._seen(growing), depth, num_heads=1)
            add_level(growing, logits[0], generators)

        return add

    def _seen(self, growing: Sequence[Growing]) -> Tensor:
        """Return the state and the tokens since of every frontier node, one after the other."""
        paths = [
            (context.token_ids[-1], *path)
            for context, tree in growing
            for path in frontier_paths(tree)
        ]
        trees = [index for index, (_, tree) in enumerate(growing) for _ in tree.frontier]
        states = take_rows(self._last_states(growing), trees)
        tokens = take_rows(self._embedding, list(itertools.chain.from_iterable(paths)))
        return join_columns([states.to(tokens.dtype), tokens.view(len(states), -1)])
