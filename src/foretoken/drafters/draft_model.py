"""A small language model of the target's family drafts a tree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Verdict
from foretoken.drafters.base import (
    DraftContext,
    DrafterHost,
    DrafterNeeds,
    RequestView,
    Taxonomy,
)
from foretoken.drafters.growth import (
    BestFirst,
    Candidate,
    GrowingTree,
    GrowthPolicy,
    StaticExpansion,
)
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.cache import CachedSequence
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer, check_same_vocabulary

PREFILL_ROWS = 512
# How far target and draft disagree, as the temperature of the race between candidates when
# sampling; see docs/decisions for the measurement.
RACE_TEMPERATURE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModelOptions:
    """Options of `draft-model`.

    Args:
        path: Directory or hub id of the draft model; it shares the target's tokens.
        expansion: Children per level, such as `1-1-3-1-1`; without it the tree grows best
            first.
        max_depth: Longest path, which is also the most draft passes per step.
        width: Most children of one node when growing best first.
        min_gain: Best first stops when a level is worth less than this many expected tokens.
    """

    path: str
    expansion: tuple[int, ...] | None = None
    max_depth: int = 8
    width: int = 4
    min_gain: float = 0.1

    def __post_init__(self) -> None:
        if self.max_depth < 1:
            raise ConfigError(
                f"draft-model:max_depth is at least 1; got {self.max_depth}",
                hint="change max_depth, or use the drafter none",
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
class _DraftState:
    """One request's place in the draft model's cache.

    Args:
        sequence: Its keys and values.
        staged_ids: Tokens fed since the last commit, as staged: those that stand, then draft
            tokens.
        num_known: How many of them stand.
        staged_at: Tree node to its index among the staged.
    """

    sequence: CachedSequence
    staged_ids: list[int] = field(default_factory=list)
    num_known: int = 0
    staged_at: dict[int, int] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget what was fed since the last commit."""
        self.staged_ids.clear()
        self.staged_at.clear()
        self.num_known = 0

    def child(self, parent: int, token_id: int) -> int | None:
        """Return the staged draft token below `parent` that is `token_id`, if any."""
        for node in range(self.num_known, len(self.staged_ids)):
            if self.sequence.parents[node] == parent and self.staged_ids[node] == token_id:
                return node
        return None


class DraftModelDrafter:
    """Runs a small model once per level of the tree, for all requests together.

    When sampling, candidates are ranked by the race that the target will run (same noise), not
    by probability alone: the first child is then the draft's own sample under the target's noise.
    """

    Options: ClassVar[type[Any]] = DraftModelOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="independent model",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="SpecInfer, arXiv:2305.09781; SpecExec, arXiv:2406.02532",
    )

    def __init__(self, model: LanguageModel, options: DraftModelOptions, host: DrafterHost) -> None:
        self.needs = DrafterNeeds(draft_cache=True)
        self._model = model
        self._policy = options.policy()
        self._max_depth = options.depth_limit
        self._target_vocab_size = host.target.info.vocab_size
        # A tree in the making holds more nodes than the draft that comes of it.
        scratch = self._max_depth * max(64, options.width) * host.max_requests
        self._cache = model.new_cache(host.kv_cache_tokens + scratch)
        self._states: dict[str, _DraftState] = {}

    @classmethod
    def create(cls, options: DraftModelOptions, host: DrafterHost) -> DraftModelDrafter:
        """Load the draft model and check that it speaks the target's tokens.

        Raises:
            ModelError: It cannot be loaded, or its tokens are others.
        """
        model = load_model(options.path, dtype=host.dtype, device=host.device)
        check_same_vocabulary(host.target, host.tokenizer, model, Tokenizer.load(options.path))
        return cls(model, options, host)

    def start(self, request: RequestView) -> None:
        """Open the request's place in the cache; the prompt is fed with the first draft."""
        self._states[request.request_id] = _DraftState(self._cache.open())

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return one tree per context, grown with one pass per level for all of them."""
        trees = [self._plant(context) for context in contexts]
        growing = [pair for pair in zip(contexts, trees, strict=True) if pair[1].frontier]
        while growing:
            logits = self._run_frontiers(growing)
            for (context, tree), rows in zip(growing, logits, strict=True):
                tree.grow(self._candidates(context, tree, rows))
            growing = [pair for pair in growing if pair[1].frontier]
        return [
            tree.finish("draft-model", _siblings(context))
            for context, tree in zip(contexts, trees, strict=True)
        ]

    def commit(self, request_id: str, verdict: Verdict) -> None:
        """Keep the keys and values of the tokens that stand; drop the other branches."""
        state = self._states[request_id]
        kept = list(range(state.num_known))
        parent = state.num_known - 1
        # Not the final token: it is the next root, and the root's row must be run for its logits.
        for token_id in verdict.token_ids[:-1]:
            node = state.child(parent, token_id)
            if node is None:
                break
            kept.append(node)
            parent = node
        self._cache.commit([(state.sequence, kept)])
        state.reset()

    def stop(self, request_id: str) -> None:
        """Free the request's place in the cache."""
        state = self._states.pop(request_id, None)
        if state is not None:
            self._cache.close(state.sequence)

    # -- one level ---------------------------------------------------------------------------

    def _plant(self, context: DraftContext) -> GrowingTree:
        """Return a tree of the root alone, with everything before the root's row cached."""
        state = self._states[context.request_id]
        self._cache.rollback(state.sequence)  # an earlier step may have failed before its commit
        state.reset()
        room = self._model.info.context_limit - len(context.token_ids)
        max_depth = max(0, min(self._max_depth, room))
        tree = GrowingTree(context.token_ids[-1], context.budget, self._policy, max_depth)
        if tree.frontier:
            self._prefill(state, context.token_ids)
        return tree

    def _prefill(self, state: _DraftState, token_ids: Sequence[int]) -> None:
        """Cache all but the last `PREFILL_ROWS` tokens that the draft has not seen."""
        sequence = state.sequence
        while len(token_ids) - sequence.num_cached > PREFILL_ROWS:
            start = sequence.num_cached
            chunk = self._clamped(token_ids[start : start + PREFILL_ROWS])
            segment = Segment(sequence, chunk, range(-1, len(chunk) - 1))
            with self._cache.speculate([sequence]):
                self._model.forward(self._model.batch(self._cache, [segment]), [])
                self._cache.commit([(sequence, range(len(chunk)))])

    def _run_frontiers(self, growing: Sequence[tuple[DraftContext, GrowingTree]]) -> list[Tensor]:
        """Run the frontier of every tree in one pass; return the logits per tree, [F, V]."""
        segments = [self._segment(context, tree) for context, tree in growing]
        batch = self._model.batch(self._cache, segments)
        counts = [len(tree.frontier) for _, tree in growing]
        rows = [
            row
            for end, count in zip(batch.starts[1:], counts, strict=True)
            for row in range(end - count, end)
        ]
        wanted = range(len(rows)) if len(rows) == batch.num_rows else rows
        logits = self._model.forward(batch, wanted).logits[:, : self._target_vocab_size]
        num_missing = self._target_vocab_size - logits.shape[1]
        if num_missing:  # padded to different widths; the processors expect the target's
            logits = functional.pad(logits, (0, num_missing), value=-math.inf)
        return list(logits.split(counts))

    def _segment(self, context: DraftContext, tree: GrowingTree) -> Segment:
        """Return the rows to feed: tokens that stand if this is the root, else draft tokens."""
        state = self._states[context.request_id]
        if tree.depth == 0:
            new_ids = list(context.token_ids[state.sequence.num_cached :])
            state.num_known = len(new_ids)
            parents = list(range(-1, len(new_ids) - 1))
            state.staged_at[ROOT] = len(new_ids) - 1
        else:
            new_ids = [tree.token_ids[node] for node in tree.frontier]
            parents = [state.staged_at[tree.parents[node]] for node in tree.frontier]
            state.staged_at.update(zip(tree.frontier, itertools.count(len(state.staged_ids))))
        state.staged_ids += new_ids
        return Segment(state.sequence, self._clamped(new_ids), parents)

    def _clamped(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return the ids with those that the draft does not have replaced by its last one."""
        last_id = self._model.info.vocab_size - 1
        return token_ids if max(token_ids) <= last_id else [min(i, last_id) for i in token_ids]

    def _candidates(
        self,
        context: DraftContext,
        tree: GrowingTree,
        logits: Tensor,  # [F, V]
    ) -> list[list[Candidate]]:
        """Return the best children of each frontier node by the race, best first."""
        paths = [tree.path(node) for node in tree.frontier]
        scores = context.sampler.race_scores(logits, context.token_ids, paths)
        if not context.sampler.is_greedy:
            scores = scores.float() / RACE_TEMPERATURE  # an estimate needs no more digits
        width = min(tree.num_children, scores.shape[-1])
        best = scores.log_softmax(dim=-1).topk(width, dim=-1)
        # Tokens that top-k, top-p and the like have ruled out have probability 0.
        return [
            [pair for pair in zip(ids, logprobs, strict=True) if pair[1] > -math.inf]
            for ids, logprobs in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _siblings(context: DraftContext) -> SiblingDraw:
    return SiblingDraw.DETERMINISTIC if context.sampler.is_greedy else SiblingDraw.COUPLED
