"""What drafters that run a model have in common: a tree grown by one pass per level.

The model may be a small one, or a view of the target. A drafter derives from `ModelDrafter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Verdict
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Outcome,
    RequestView,
)
from foretoken.drafters.growth import (
    BestFirst,
    DrawnTree,
    GrowingTree,
    GrowthPolicy,
    StaticExpansion,
)
from foretoken.drafters.levels import SAMPLERS, Growing, add_level
from foretoken.drafters.whole_trees import WholeTrees
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import BLOCK_SIZE, CachedSequence

PREFILL_ROWS = 512
# What a level takes; a drafter that does it in its own way has to be asked level by level.
LEVEL = ("_run", "_scored", "_forward", "_segment", "_grow")
NOTHING = DraftBudget(max_nodes=0, max_depth=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthOptions:
    """How a tree grows; a drafter's own options derive from it.

    Args:
        expansion: Children per level, such as `1-1-3-1-1`; without it the tree grows best
            first.
        max_depth: Longest path, which is also the most draft passes per step.
        width: Most children of one node when growing best first.
        min_gain: Best first stops when a level is worth less than this many expected tokens.
        max_nodes: Most nodes of a tree, if that is less than the step allows; for targets so small
            that every row of their pass counts.

    Attributes:
        name: The drafter's, for messages.
    """

    name: ClassVar[str]
    expansion: tuple[int, ...] | None = None
    max_depth: int = 8
    width: int = 4
    min_gain: float = 0.1
    max_nodes: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("max_depth", self.max_depth), ("max_nodes", self.max_nodes)):
            if value is not None and value < 1:
                raise ConfigError(
                    f"{self.name}:{option} is at least 1; got {value}",
                    hint=f"change {option}, or use the drafter none",
                )
        self.policy()  # raises for bad values

    def policy(self) -> GrowthPolicy:
        """Return the way to grow that the options describe."""
        if self.expansion is not None:
            return StaticExpansion(self.expansion)
        return BestFirst(width=self.width, min_gain=self.min_gain)

    @property
    def depth_limit(self) -> int:
        """Longest path, the expansion's length included."""
        return min(self.max_depth, len(self.expansion)) if self.expansion else self.max_depth


@dataclass(slots=True)
class DraftState:
    """One request's place in the model's cache.

    Rows fed since the last commit are staged in the cache: tokens that stand, as a chain, then
    nodes of the tree in the making.

    Args:
        sequence: Its keys and values.
        num_known: How many of the staged tokens stand; the last of them is the root.
        staged_at: Tree node to its index among the staged.
        child_at: Index of a staged node and token id of a child to that child's index.
        hidden: For drafters that hand them on, states of the staged rows, pass by pass.
        generator: Of this step's samples, when children are sampled.
    """

    sequence: CachedSequence
    num_known: int = 0
    staged_at: dict[int, int] = field(default_factory=dict)
    child_at: dict[tuple[int, int], int] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)
    generator: np.random.Generator | None = None

    def reset(self) -> None:
        """Forget what was fed since the last commit."""
        self.staged_at.clear()
        self.child_at.clear()
        self.hidden.clear()
        self.num_known = 0

    def kept(self, verdict: Verdict) -> list[int]:
        """Return which of the staged nodes stand: the known tokens and the accepted path."""
        nodes = list(range(self.num_known))
        parent = self.num_known - 1
        # Not the final token: it is the next root, and the root's row must be run for its logits.
        for token_id in verdict.token_ids[:-1]:
            node = self.child_at.get((parent, token_id))
            if node is None:
                break
            nodes.append(node)
            parent = node
        return nodes

    def feed_known(self, token_ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Return what is to be fed for the root's logits: token ids, and parents as staged."""
        new_ids = token_ids[self.sequence.num_cached :]
        self.num_known = len(new_ids)
        self.staged_at[ROOT] = self.num_known - 1
        return new_ids, range(-1, self.num_known - 1)

    def feed_frontier(self, tree: GrowingTree) -> tuple[Sequence[int], Sequence[int]]:
        """Return what is to be fed for the frontier's logits, likewise."""
        new_ids = [tree.token_ids[node] for node in tree.frontier]
        parents = [self.staged_at[tree.parents[node]] for node in tree.frontier]
        first = self.sequence.num_staged
        for index, node in enumerate(tree.frontier):
            self.staged_at[node] = first + index
            self.child_at[parents[index], new_ids[index]] = first + index
        return new_ids, parents

    def note_fed(self, token_ids: Sequence[int], parents: Sequence[int]) -> None:
        """Take note of draft tokens that were fed behind those that stand, parents as staged."""
        first = self.num_known
        places = range(first, first + len(token_ids))
        self.child_at.update(zip(zip(parents, token_ids, strict=True), places, strict=True))


class ModelDrafter(Drafter):
    """Runs a model once per level of the tree, for all requests together.

    When sampling, coupled candidates are ranked by the race that the target will run (same
    noise), not by probability alone: the first child is then the draft's own sample under the
    target's noise. For other rules children are the likeliest, or samples of the draft's
    distribution with every control of the request applied.

    Args:
        model: Speaks the target's tokens, or the first of them.
        options: How trees grow.
        host: What there is.
    """

    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(SiblingDraw)

    def __init__(self, model: LanguageModel, options: GrowthOptions, host: DrafterHost) -> None:
        self.needs = DrafterNeeds(draft_cache=True)
        self._name = options.name
        self._policy = options.policy()
        self._max_depth = options.depth_limit
        self._max_nodes = options.max_nodes
        self._target_vocab_size = host.target.info.vocab_size
        # A tree in the making holds more nodes than the draft that comes of it.
        self._max_level = max(64, options.width)  # nodes of a level that there is room for
        scratch = self._max_depth * self._max_level * host.max_requests
        self._num_cache_tokens = host.kv_cache_tokens + scratch
        self._states: dict[str, DraftState] = {}
        self._take_model(model)

    def _take_model(self, model: LanguageModel) -> None:
        """Draft with a model from now on; requests that run begin anew in its cache."""
        self._model = model
        self._has_fewer_tokens = model.info.vocab_size < self._target_vocab_size
        self._cache = model.new_cache(self._num_cache_tokens)
        self._whole_trees = self._find_whole_trees()
        for state in self._states.values():
            state.reset()
            state.sequence = self._cache.open()

    def _find_whole_trees(self) -> WholeTrees | None:
        """Return what grows trees in one call, if that is the same as to go level by level."""
        if any(getattr(type(self), name) is not getattr(ModelDrafter, name) for name in LEVEL):
            return None
        return WholeTrees.of(
            self._model.tree_grower, self._cache, self._policy, self._target_vocab_size
        )

    def start(self, request: RequestView) -> None:
        """Open the request's place in the cache; the prompt is fed with the first draft."""
        self._states[request.request_id] = DraftState(self._cache.open())

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return one tree per context, grown with one pass per level for all of them."""
        trees = [self._plant(context) for context in self.fitting(contexts)]
        growing = [pair for pair in zip(contexts, trees, strict=True) if pair[1].frontier]
        if growing and self._whole_trees is not None:
            growing = self._grow_whole(self._whole_trees, growing)
        while growing:
            self._grow(growing, self._run(growing))
            growing = [pair for pair in growing if pair[1].frontier]
        return [
            tree.finish(self._name, context.siblings)
            for context, tree in zip(contexts, trees, strict=True)
        ]

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the keys and values of the tokens that stand; drop the other branches."""
        kept = []
        for outcome in outcomes:
            state = self._states[outcome.request_id]
            if state.num_known:
                kept.append((state.sequence, state.kept(outcome.verdict)))
                state.reset()
        if kept:
            self._cache.commit(kept)

    def stop(self, request_id: str) -> None:
        """Free the request's place in the cache."""
        state = self._states.pop(request_id, None)
        if state is not None:
            self._cache.close(state.sequence)

    def fitting(self, contexts: Sequence[DraftContext], num_extra: int = 0) -> list[DraftContext]:
        """Return a step's contexts, without a budget where the cache has no room.

        It is as large as the target's; but there requests that begin alike share blocks.

        Args:
            contexts: All of them.
            num_extra: Nodes that may be fed beside those of each level.
        """
        fitting, num_free = [], self._cache.num_free_blocks
        for context in contexts:
            num_wanted = self._num_blocks_wanted(context, num_extra)
            has_room = num_wanted <= num_free
            num_free -= num_wanted if has_room else 0
            fitting.append(context if has_room else replace(context, budget=NOTHING))
        return fitting

    def _num_blocks_wanted(self, context: DraftContext, num_extra: int) -> int:
        budget, sequence = context.budget, self._states[context.request_id].sequence
        if budget.is_empty:
            return 0
        num_nodes = min(budget.max_nodes, self._max_level) + num_extra
        num_positions = len(context.token_ids) + min(self._max_depth, budget.max_depth) * num_nodes
        return -(-num_positions // BLOCK_SIZE) - -(-sequence.num_cached // BLOCK_SIZE)

    def _grow_whole(self, whole: WholeTrees, growing: Sequence[Growing]) -> list[Growing]:
        """Grow all levels of the trees that it can be done for; return the others."""
        chosen = [pair for pair in growing if whole.takes(*pair)]
        states = [self._states[context.request_id] for context, _ in chosen]
        planted = []
        for (context, tree), state in zip(chosen, states, strict=True):
            known_ids = self._clamped(state.feed_known(context.token_ids)[0])
            planted.append(whole.plant(context, tree, state.sequence, known_ids))
        grown_trees = whole.grow(planted) if planted else None
        if grown_trees is None:
            return list(growing)
        for (_, tree), state, grown in zip(chosen, states, grown_trees, strict=True):
            state.note_fed(grown.fed_ids, grown.fed_parents)
            token_ids = (tree.token_ids[ROOT], *grown.token_ids)
            tree.complete(token_ids, grown.parents, grown.logprobs)
        return [pair for pair in growing if pair[1].frontier]

    # -- one level ---------------------------------------------------------------------------

    def _plant(self, context: DraftContext) -> GrowingTree:
        """Return a tree of the root alone, with everything before the root's row cached."""
        state = self._states[context.request_id]
        if state.sequence.num_staged:  # an earlier step failed before its commit
            self._cache.rollback(state.sequence)
        state.reset()
        room = self._model.info.context_limit - len(context.token_ids)
        max_depth = max(0, min(self._max_depth, room))
        budget = context.budget
        if self._max_nodes is not None and self._max_nodes < budget.max_nodes:
            budget = _cut_budget(budget, self._max_nodes)
        kind = GrowingTree
        if context.siblings in SAMPLERS:
            kind = DrawnTree
            state.generator = context.generator()
        tree = kind(context.token_ids[-1], budget, self._policy, max_depth)
        if tree.frontier:
            self._catch_up(state, context)
        return tree

    def _catch_up(self, state: DraftState, context: DraftContext) -> None:
        """Cache all but the last `PREFILL_ROWS` tokens that the model has not seen."""
        sequence, token_ids = state.sequence, context.token_ids
        while len(token_ids) - sequence.num_cached > PREFILL_ROWS:
            start = sequence.num_cached
            chunk = self._clamped(token_ids[start : start + PREFILL_ROWS])
            segment = Segment(sequence, chunk, range(-1, len(chunk) - 1))
            with self._cache.speculate([sequence]):
                self._model.forward(self._model.batch(self._cache, [segment]), [])
                self._cache.commit([(sequence, range(len(chunk)))])

    def _run(self, growing: Sequence[tuple[DraftContext, GrowingTree]]) -> Tensor:
        """Run the frontier of every tree in one pass; return its logits, [F, V], tree by tree."""
        segments = [self._segment(context, tree) for context, tree in growing]
        batch = self._model.batch(self._cache, segments)
        rows: Sequence[int] = range(batch.num_rows)
        if growing[0][1].depth == 0 and len(growing) < batch.num_rows:
            rows = [stop - 1 for stop in batch.starts[1:]]  # the roots; all trees are as deep
        return self._scored(batch, rows, growing)

    def _scored(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        growing: Sequence[tuple[DraftContext, GrowingTree]],
    ) -> Tensor:
        """Run a pass; return the logits wanted with a column for every token of the target's."""
        logits = self._forward(batch, rows, growing)
        num_missing = self._target_vocab_size - logits.shape[1]
        if num_missing:  # too many if negative; the processors expect the target's vocabulary
            logits = functional.pad(logits, (0, num_missing), value=-math.inf)
        return logits

    def _forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        growing: Sequence[tuple[DraftContext, GrowingTree]],
    ) -> Tensor:
        """Run a pass for some trees, a segment each; return the logits wanted, [F, V]."""
        return self._model.forward(batch, rows).logits

    def _segment(self, context: DraftContext, tree: GrowingTree) -> Segment:
        """Return the rows to feed: tokens that stand if this is the root, else draft tokens."""
        state = self._states[context.request_id]
        token_ids, parents = (
            state.feed_frontier(tree) if tree.depth else state.feed_known(context.token_ids)
        )
        return Segment(state.sequence, self._clamped(token_ids), parents)

    def _clamped(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return the ids with those that the draft does not have replaced by its last one."""
        if not self._has_fewer_tokens:
            return token_ids
        return [min(token_id, self._model.info.vocab_size - 1) for token_id in token_ids]

    def _grow(
        self,
        growing: Sequence[tuple[DraftContext, GrowingTree]],
        logits: Tensor,  # [F, V]
    ) -> None:
        """Add a level to every tree."""
        add_level(growing, logits, self._generator)

    def _generator(self, context: DraftContext) -> np.random.Generator:
        """Return the generator of this step's samples."""
        return self._states[context.request_id].generator or context.generator()


@lru_cache(maxsize=256)
def _cut_budget(budget: DraftBudget, max_nodes: int) -> DraftBudget:
    """Return a budget of so many nodes; steps have few different ones."""
    return replace(budget, max_nodes=max_nodes)
