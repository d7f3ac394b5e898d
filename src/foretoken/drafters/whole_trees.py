"""Trees that a model grows on its own, all levels in one call, where drafts stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from foretoken.core.draft import SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext
from foretoken.drafters.growth import BestFirst, GrowingTree, GrowthPolicy
from foretoken.drafters.levels import RACE_TEMPERATURE
from foretoken.models.adapter import TreeGrower
from foretoken.models.cache import CachedSequence, KVCache
from foretoken.models.growing import GrownTree, PlantedTree


class WholeTrees:
    """Grows trees whole, to what they would have become level by level.

    Args:
        grower: Of the draft model.
        cache: The draft model's.
        policy: How trees grow.
        vocab_size: Tokens of the target.
    """

    def __init__(
        self, grower: TreeGrower, cache: KVCache, policy: BestFirst, vocab_size: int
    ) -> None:
        self._grower = grower
        self._cache = cache
        self._policy = policy
        self._vocab_size = vocab_size

    @classmethod
    def of(
        cls, grower: TreeGrower | None, cache: KVCache, policy: GrowthPolicy, vocab_size: int
    ) -> WholeTrees | None:
        """Return what grows trees whole; None if the model cannot, or they do not grow best first.

        Args:
            grower: Of the draft model, if there is one.
            cache: As for the class, and so are the others.
            policy: Likewise.
            vocab_size: Likewise.
        """
        if grower is None or type(policy) is not BestFirst:
            return None
        return cls(grower, cache, policy, vocab_size)

    def takes(self, context: DraftContext, tree: GrowingTree) -> bool:
        """Whether a tree's candidates race by their logits and a temperature alone.

        Controls are Python, and so are samples.
        """
        sampler = context.sampler
        races = context.siblings is SiblingDraw.COUPLED or sampler.is_greedy
        return races and sampler.is_plain and type(tree) is GrowingTree

    def plant(
        self,
        context: DraftContext,
        tree: GrowingTree,
        sequence: CachedSequence,
        known_ids: Sequence[int],
    ) -> PlantedTree:
        """Return a tree of the root alone as the model wants it; the last known token is the root.

        Args:
            context: The request.
            tree: What is to become of its root.
            sequence: Its place in the cache.
            known_ids: Tokens that stand and are not cached, in the model's ids.
        """
        sampler, budget = context.sampler, tree.budget
        noise_from = None
        if not sampler.is_greedy:
            position = len(context.token_ids)
            noise_from = partial(_noise, sampler, position, tree.max_depth, self._vocab_size)
        return PlantedTree(
            sequence,
            known_ids,
            budget.max_nodes,
            tree.max_depth,
            tree.num_children,
            max(self._policy.min_gain, budget.min_gain),
            sampler.temperature,
            noise_from,
        )

    def grow(self, trees: Sequence[PlantedTree]) -> list[GrownTree] | None:
        """Grow trees to their ends; None if the model is faster level by level.

        Raises:
            CapacityError: The cache has no room; nothing is staged.
        """
        return self._grower.grow(
            self._cache,
            trees,
            num_columns=self._vocab_size,
            race_temperature=RACE_TEMPERATURE,
        )


def _noise(
    sampler: Sampler, position: int, max_depth: int, vocab_size: int, depth: int
) -> Sequence[Tensor]:
    """Return noise of the choices after nodes of a depth; the root's is at `position`."""
    return sampler.noise_rows(position + depth, vocab_size, max_depth - depth)
