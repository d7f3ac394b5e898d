"""One draft model of a cascade: it scores nodes of a tree to which others contribute, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from foretoken.core.tree import ROOT, TokenTree
from foretoken.drafters.base import DraftContext, DrafterHost, RequestView
from foretoken.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from foretoken.drafters.growth import DrawnTree, GrowingTree, GrowthPolicy, StaticExpansion
from foretoken.drafters.model_drafter import DraftState
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment


@dataclass(frozen=True, slots=True)
class PolicyPerLevel:
    """Best-first growth whose width and least gain differ from level to level.

    Args:
        levels: The policy of each level; all of them `BestFirst`.
    """

    levels: tuple[GrowthPolicy, ...]

    def num_children(self, depth: int) -> int:
        """Return the width of the level below `depth`."""
        return self.levels[depth].num_children(depth)

    def plan_draws(self, tree: DrawnTree, newest: Sequence[int], num_left: int) -> list[int]:
        """Plan as the newest nodes' own level does."""
        return self.levels[tree.depth].plan_draws(tree, newest, num_left)

    def admit(self, tree: GrowingTree, total: float) -> bool:
        """Add a node that is among the best so far."""
        return self.levels[0].admit(tree, total)

    def select(self, tree: GrowingTree, offered: range) -> list[int]:
        """Expand the newest nodes that are worth a pass of the model of their level."""
        return self.levels[min(tree.depth, len(self.levels) - 1)].select(tree, offered)

    def finish(self, tree: GrowingTree) -> list[int]:
        """Keep the best nodes."""
        return self.levels[0].finish(tree)


def joint_policy(models: Sequence[DraftModelOptions]) -> GrowthPolicy:
    """Return how one tree grows to which several draft models contribute their levels.

    Raises:
        ConfigError: Some trees grow by an expansion, others best first.
    """
    if len(models) == 1:
        return models[0].policy()
    num_static = sum(it.expansion is not None for it in models)
    if num_static == 0:
        return PolicyPerLevel(
            tuple(policy for it in models for policy in [it.policy()] * it.depth_limit)
        )
    if num_static < len(models):
        raise ConfigError(
            f"the draft models of a cascade grow one tree, all by an expansion or all best first; "
            f"got {num_static} of {len(models)} with an expansion",
            hint="give an expansion to every one, or to none",
        )
    return StaticExpansion(
        tuple(width for it in models for width in (it.expansion or ())[: it.depth_limit])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions(DraftModelOptions):
    """One draft model's options, except that trees grow as those of all models together say.

    Args:
        models: All of them.
    """

    models: tuple[DraftModelOptions, ...]

    @classmethod
    def of(cls, models: tuple[DraftModelOptions, ...], index: int) -> StageOptions:
        """Return the options of one of the models; the smallest bound on nodes is that of all."""
        bounds = [it.max_nodes for it in models if it.max_nodes is not None]
        own = models[index]
        return cls(
            path=own.path,
            expansion=own.expansion,
            max_depth=own.max_depth,
            width=max(it.width for it in models),
            max_nodes=min(bounds, default=None),
            models=models,
        )

    def policy(self) -> GrowthPolicy:
        """Return the way in which the whole tree grows."""
        return joint_policy(self.models)

    @property
    def num_levels(self) -> int:
        """Levels that are this model's own."""
        return min(self.max_depth, len(self.expansion)) if self.expansion else self.max_depth

    @property
    def depth_limit(self) -> int:
        """Longest path through the levels of all models."""
        return sum(it.depth_limit for it in self.models)


@dataclass(slots=True)
class StageState(DraftState):
    """One request's place in the model's cache, with what was computed there in this step.

    Args:
        rows: Index of a staged node to its logits, [V].
        new_ids: Token ids of nodes that are to be fed with the next pass ...
        new_parents: ... and the indices of their parents.
    """

    rows: dict[int, Tensor] = field(default_factory=dict)
    new_ids: list[int] = field(default_factory=list)
    new_parents: list[int] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was fed since the last commit."""
        DraftState.reset(self)
        self.rows.clear()
        self.new_ids.clear()
        self.new_parents.clear()

    def child(self, parent: int, token_id: int) -> int:
        """Return the index of a node's child; one that is new waits for the next pass."""
        key = (parent, token_id)
        if key not in self.child_at:
            self.child_at[key] = self.sequence.num_staged + len(self.new_ids)
            self.new_ids.append(token_id)
            self.new_parents.append(parent)
        return self.child_at[key]

    def place(self, tree: GrowingTree, node: int) -> int:
        """Return the index of a tree's node; it waits for the next pass if it is new."""
        if node not in self.staged_at:
            parent = self.place(tree, tree.parents[node])
            self.staged_at[node] = self.child(parent, tree.token_ids[node])
        return self.staged_at[node]


class CascadeStage(DraftModelDrafter):
    """A draft model that remembers every row of a step, so that guesses which come true are free.

    In each step a cascade lets it `begin`; then it may `ask` for the rows of a frontier, let a pass
    `run` if they are not there, and take the `rows`.

    Attributes:
        num_levels: Levels of a tree that are its own.
    """

    def __init__(self, model: LanguageModel, options: StageOptions, host: DrafterHost) -> None:
        super().__init__(model, options, host)
        self.num_levels = options.num_levels

    def start(self, request: RequestView) -> None:
        """Open the request's place in the cache; it is fed when rows are asked for."""
        self._states[request.request_id] = StageState(self._cache.open())

    def begin(self, context: DraftContext) -> int:
        """Forget what an earlier step left; return for how many more tokens there are positions."""
        state = self._states[context.request_id]
        self._cache.rollback(state.sequence)
        state.reset()
        return self._model.info.context_limit - len(context.token_ids)

    def plant(self, context: DraftContext) -> GrowingTree:
        """Return a tree of the root alone; its samples, if any, are this drafter's."""
        return self._plant(context)

    def ask(self, context: DraftContext, tree: GrowingTree) -> bool:
        """Return whether all rows of a frontier were run; those that were not wait for a pass."""
        state = self._state(context)
        if ROOT not in state.staged_at:
            self._catch_up(state, context)
            new_ids, parents = state.feed_known(context.token_ids)
            state.new_ids += new_ids
            state.new_parents += parents
        # Of all nodes, or some of them would not wait.
        places = [state.place(tree, node) for node in tree.frontier]
        return all(place in state.rows for place in places)

    def add_guess(self, context: DraftContext, node: int, guess: TokenTree) -> None:
        """Let a tree that may come below a node of the frontier wait for the next pass."""
        state = self._state(context)
        places = [state.staged_at[node]]
        for token_id, parent in zip(guess.token_ids[1:], guess.parents[1:], strict=True):
            places.append(state.child(places[parent], token_id))

    def run(self, waiting: Sequence[tuple[DraftContext, GrowingTree]]) -> None:
        """Run everything that waits in one pass."""
        states = [self._state(context) for context, _ in waiting]
        segments = [
            Segment(state.sequence, self._clamped(state.new_ids), state.new_parents)
            for state in states
        ]
        firsts = [state.sequence.num_staged for state in states]
        batch = self._model.batch(self._cache, segments)
        rows, places = [], []
        for state, first, start in zip(states, firsts, batch.starts, strict=False):
            root = state.num_known - 1  # of the tokens that stand, only the last one's row
            for place in range(max(root, first), state.sequence.num_staged):
                rows.append(start + place - first)
                places.append((state, place))
        logits = self._scored(batch, rows, waiting)
        for (state, place), row in zip(places, logits, strict=True):
            state.rows[place] = row
        for state in states:
            state.new_ids.clear()
            state.new_parents.clear()

    def rows(self, context: DraftContext, tree: GrowingTree) -> list[Tensor]:
        """Return the logits of each node of a frontier, [V] each; all of them were run."""
        state = self._state(context)
        return [state.rows[state.staged_at[node]] for node in tree.frontier]

    def grow(
        self,
        ready: Sequence[tuple[DraftContext, GrowingTree]],
        logits: Tensor,  # [F, V]
    ) -> None:
        """Add a level to every tree, given the logits of its frontier."""
        self._grow(ready, logits)

    def _state(self, context: DraftContext) -> StageState:
        return cast(StageState, self._states[context.request_id])
