"""Medusa: heads on the target's last state draft all levels of a tree at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from foretoken.core.draft import SiblingDraw
from foretoken.core.ranking import LogprobLists, TokenLists
from foretoken.core.sampling import Frontier, best_guesses
from foretoken.drafters.base import DraftContext, DrafterHost, Taxonomy
from foretoken.drafters.head_drafter import Generators, HeadDrafter
from foretoken.drafters.levels import RACE_TEMPERATURE, SAMPLERS, Growing, add_level
from foretoken.drafters.model_drafter import GrowthOptions
from foretoken.models.heads.medusa import MedusaHeads, load_medusa
from foretoken.models.state_rows import join_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaOptions(GrowthOptions):
    """Options of `medusa`, besides how trees grow.

    Args:
        path: Directory of heads that were trained for the target: our own or as published.
        max_depth: As there; never more than there are heads.
        width: As there.
        min_gain: As there; all heads run in any case.
    """

    name: ClassVar[str] = "medusa"
    path: str
    width: int = 8
    min_gain: float = 0.05


class MedusaDrafter(HeadDrafter):
    """Grows trees over products of the heads' probabilities, best first or to an expansion.

    A head says the same after every token of its level: one call runs all heads for all requests.

    Args:
        heads: Made for the host's target.
        options: How trees grow.
        host: What there is.
    """

    Options: ClassVar[type[Any]] = MedusaOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="heads on the target's states",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="Medusa, arXiv:2401.10774",
    )

    def __init__(self, heads: MedusaHeads, options: MedusaOptions, host: DrafterHost) -> None:
        super().__init__(options, heads, heads.design.heads, host)

    @classmethod
    def create(cls, options: MedusaOptions, host: DrafterHost) -> Self:
        """Load the heads.

        Raises:
            ModelError: They cannot be read, are of another kind or were made for another target.
        """
        return cls(load_medusa(options.path, host.target.info), options, host)

    def _levels(self, growing: Sequence[Growing]) -> Callable[[Sequence[Growing], int], None]:
        depth = min(self._max_depth, max(context.budget.max_depth for context, _ in growing))
        logits = self._served.logits(self._last_states(growing), 0, depth)
        width = max(map(self._policy.num_children, range(depth)))
        return MedusaLevels(growing, logits.transpose(0, 1), width).add


class MedusaLevels:
    """What the heads say in one step.

    Args:
        growing: The trees of the step.
        logits: Of every tree and depth, [trees, depths, V].
        width: Most children of a node at any depth.
    """

    def __init__(self, growing: Sequence[Growing], logits: Tensor, width: int) -> None:
        self._generators = Generators()
        self._logits = {
            context.request_id: rows for (context, _), rows in zip(growing, logits, strict=True)
        }
        racing = [context for context, _ in growing if _is_same_everywhere(context)]
        self._guesses: dict[str, tuple[TokenLists, LogprobLists]] = {}
        if racing:
            self._rank(racing, width)

    def add(self, growing: Sequence[Growing], depth: int) -> None:
        """Add the children of all frontiers, which are of this depth."""
        others = []
        for context, tree in growing:
            if context.request_id not in self._guesses:
                others.append((context, tree))
                continue
            token_ids, logprobs = self._guesses[context.request_id]
            count, num_nodes = tree.num_children, len(tree.frontier)
            tree.grow([token_ids[depth][:count]] * num_nodes, [logprobs[depth][:count]] * num_nodes)
        if others:
            rows = [
                self._logits[context.request_id][depth].expand(len(tree.frontier), -1)
                for context, tree in others
            ]
            add_level(others, join_rows(rows), self._generators)

    def _rank(self, racing: Sequence[DraftContext], width: int) -> None:
        """Rank all levels of some requests in one go: whatever the path, ranks are the same."""
        logits = [self._logits[context.request_id] for context in racing]
        depth = len(logits[0])
        frontiers = [
            Frontier(context.sampler, context.token_ids, [(0,) * level])  # any path of this length
            for context in racing
            for level in range(depth)
        ]
        ids, values = best_guesses(join_rows(logits), frontiers, width, RACE_TEMPERATURE)
        for index, context in enumerate(racing):
            levels = slice(index * depth, (index + 1) * depth)
            self._guesses[context.request_id] = (ids[levels], values[levels])


def _is_same_everywhere(context: DraftContext) -> bool:
    """Whether a level's candidates are the same for all of its nodes, and raced for."""
    is_race = context.siblings is SiblingDraw.COUPLED or context.sampler.is_greedy
    return is_race and context.siblings not in SAMPLERS and context.sampler.is_plain
