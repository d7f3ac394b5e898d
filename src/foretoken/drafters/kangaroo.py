"""Kangaroo: the target's first layers and a trained adapter draft; the unsure stop early."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from foretoken.drafters.base import (
    DraftContext,
    DrafterHost,
    Outcome,
    RequestView,
    StandingStates,
    Taxonomy,
)
from foretoken.drafters.early_exit import FirstLayersDrafter
from foretoken.drafters.growth import DrawnTree, GrowingTree
from foretoken.drafters.model_drafter import NOTHING, PREFILL_ROWS, DraftState, GrowthOptions
from foretoken.errors import ConfigError
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import BLOCK_SIZE, CachedSequence
from foretoken.models.heads.files import read_head
from foretoken.models.heads.kangaroo import KIND, KangarooAdapter
from foretoken.models.heads.target import TargetShape
from foretoken.models.state_rows import join_rows

NO_TOKEN = 0  # the adapter reads states, and its embedding has one row


@dataclass(frozen=True, slots=True, kw_only=True)
class KangarooOptions(GrowthOptions):
    """Options of `kangaroo`, besides how trees grow.

    Args:
        path: Directory of the adapter.
        eta: A branch ends below a node whose likeliest next token has less than this probability;
            0 for never. The children of such a node are still drafted, as in the paper.
        max_depth: As there; the paper's chains have up to 6 tokens.
        width: As there; 1 for the paper's chains.
        min_gain: As there.
    """

    name: ClassVar[str] = "kangaroo"
    path: str
    eta: float = 0.6
    max_depth: int = 6
    width: int = 2
    min_gain: float = 0.3

    def __post_init__(self) -> None:
        GrowthOptions.__post_init__(self)
        if not 0 <= self.eta <= 1:
            raise ConfigError(
                f"kangaroo:eta is a probability, from 0 to 1; got {self.eta}", hint="change eta"
            )


@dataclass(slots=True)
class _Place:
    """What the adapter knows of a request.

    Args:
        sequence: Its keys and values.
        told: States after the first layers, from the target's passes, of tokens whose keys and
            values are not cached, or not long since.
        told_from: Position of the first of them, at most `sequence.num_cached`.
        num_ahead: In this step, rows that only the adapter was fed before those that the layers
            were fed too; negative if the layers had some to themselves.
    """

    sequence: CachedSequence
    told: list[Tensor] = field(default_factory=list)
    told_from: int = 0
    num_ahead: int = 0

    @property
    def num_known(self) -> int:
        """Positions from the first on whose keys and values are cached or follow from `told`."""
        return max(self.sequence.num_cached, self.told_from + sum(map(len, self.told)))

    @property
    def num_waiting(self) -> int:
        """How many of these are not cached."""
        return self.num_known - self.sequence.num_cached

    def take(self, start: int, states: Tensor) -> None:
        """Learn of states, of the positions from `start` on."""
        if start <= self.num_known:
            if not self.told:
                self.told_from = start
            self.told.append(states)

    def forget(self) -> None:
        """Drop states whose keys and values are cached."""
        while self.told and self.told_from + len(self.told[0]) <= self.sequence.num_cached:
            self.told_from += len(self.told.pop(0))

    def waiting(self, stop: int) -> Tensor:
        """Return the states of the positions that are not cached, up to `stop`."""
        first = self.sequence.num_cached
        return join_rows(self.told)[first - self.told_from : stop - self.told_from]


class KangarooDrafter(FirstLayersDrafter):
    """Drafts with the target's first layers, a trained adapter and the target's head.

    Exits twice: after the first layers, and from a branch as soon as the adapter is unsure. What
    the first layers compute is not lost, see `FirstLayersDrafter`. The adapter has keys and values
    of its own. States of tokens that only the target has run come from its passes; those of
    tokens that it has found in its prefix cache are in the adapter's own, or are computed again by
    the first layers.

    Args:
        options: How trees grow, and where branches end.
        host: Its target's layers draft.
        adapter: Made for this target.

    Source: arXiv:2404.18911, section 3.
    """

    Options: ClassVar[type[Any]] = KangarooOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="target itself and a trained layer",
        is_trained=True,
        termination="adaptive (confidence)",
        structure="tree",
        reference="Kangaroo, arXiv:2404.18911",
    )

    def __init__(
        self, options: KangarooOptions, host: DrafterHost, adapter: KangarooAdapter
    ) -> None:
        super().__init__(adapter.options.layers, options, host)
        self.needs = replace(self.needs, hidden_layers=(self._num_layers,))
        self._adapter = adapter.serve(host.target)
        self._adapter_cache = self._adapter.new_cache(self._num_cache_tokens)
        self._places: dict[str, _Place] = {}
        self._eta = options.eta

    @classmethod
    def create(cls, options: KangarooOptions, host: DrafterHost) -> KangarooDrafter:
        """Load the adapter.

        Raises:
            ModelError: It cannot be read, or was not made for this target.
        """
        files = read_head(options.path, KIND, host.target.info)
        return cls(options, host, KangarooAdapter.load(files, TargetShape.of(host.target.info)))

    # -- what is known of a request ----------------------------------------------------------

    def start(self, request: RequestView) -> None:
        """Open the request's places, with what the adapter's cache has of the prompt."""
        super().start(request)
        self._places[request.request_id] = _Place(self._adapter_cache.open(request.prompt_ids))

    def observe(self, standing: Sequence[StandingStates]) -> None:
        """Note the states; the adapter runs over them with the next draft, or if they are many."""
        for it in standing:
            place = self._places[it.request_id]
            place.take(it.start, it.hidden[self._num_layers])
            # In the midst of a draft there is no more than a chunk of them.
            if place.num_waiting > PREFILL_ROWS and not place.sequence.num_staged:
                self._run_waiting(place)

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the keys and values of the tokens that stand, of the layers and of the adapter."""
        kept = []
        for outcome in outcomes:
            state, place = self._states[outcome.request_id], self._places[outcome.request_id]
            if state.num_known:
                rows = [node + place.num_ahead for node in state.kept(outcome.verdict)]
                own = [*range(place.num_ahead), *(row for row in rows if row >= 0)]
                kept.append((place.sequence, own))
        super().commit(outcomes)
        if kept:
            self._adapter_cache.commit(kept)

    def stop(self, request_id: str) -> None:
        """Free the request's places."""
        super().stop(request_id)
        place = self._places.pop(request_id, None)
        if place is not None:
            self._adapter_cache.close(place.sequence)

    def fitting(self, contexts: Sequence[DraftContext], num_extra: int = 0) -> list[DraftContext]:
        """Return a step's contexts, without a budget where one of the caches has no room."""
        fitting, num_free = [], self._adapter_cache.num_free_blocks
        for context in super().fitting(contexts, num_extra):
            wanted = 0
            if not context.budget.is_empty:
                num_nodes = self._max_depth * min(context.budget.max_nodes, self._max_level)
                num_blocks = -(-(len(context.token_ids) + num_nodes) // BLOCK_SIZE)
                wanted = num_blocks - len(self._places[context.request_id].sequence.blocks)
            has_room = wanted <= num_free
            num_free -= wanted if has_room else 0
            fitting.append(context if has_room else replace(context, budget=NOTHING))
        return fitting

    # -- passes ------------------------------------------------------------------------------

    def _catch_up(self, state: DraftState, context: DraftContext) -> None:
        """Bring both to where the target is, or to where the rest fits into one pass."""
        place, sequence = self._places[context.request_id], state.sequence
        self._adapter_cache.rollback(place.sequence)
        self._adapter_cache.share(place.sequence, context.token_ids)
        place.forget()
        if context.past is not None:
            stop = min(context.past.sequence.num_cached, place.num_known)
            self._take_past(state, context.past, stop)
        while len(context.token_ids) - sequence.num_cached > PREFILL_ROWS:
            start = sequence.num_cached
            chunk = context.token_ids[start : start + PREFILL_ROWS]
            segment = Segment(sequence, chunk, range(-1, PREFILL_ROWS - 1))
            with self._cache.speculate([sequence]):
                [hidden] = self._exit_states(self._view.batch(self._cache, [segment]))
                own, states = self._first_rows(place, segment, hidden)
                self._keep(place, own, states)
                self._cache.commit([(sequence, range(PREFILL_ROWS))])

    def _run_waiting(self, place: _Place) -> None:
        """Run the adapter over the states that it was told."""
        num_rows = place.num_waiting
        if -(-num_rows // BLOCK_SIZE) < self._adapter_cache.num_free_blocks:
            own = Segment(place.sequence, [NO_TOKEN] * num_rows, range(-1, num_rows - 1))
            self._keep(place, own, place.waiting(place.num_known))
        place.told = []  # without room, the first layers compute them again when there is some

    def _keep(self, place: _Place, segment: Segment, states: Tensor) -> None:
        """Run the adapter over states of tokens that stand, if any, and keep what it caches."""
        if len(states):
            with self._adapter_cache.speculate([place.sequence]):
                self._run_adapter([segment], states, [])
                self._adapter_cache.commit([(place.sequence, range(len(states)))])

    def _forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        growing: Sequence[tuple[DraftContext, GrowingTree]],
    ) -> Tensor:
        hidden = self._exit_states(batch)
        self._keep_states(growing, hidden)
        is_first = growing[0][1].depth == 0  # of all: they are as deep
        feed = self._first_rows if is_first else _later_rows
        fed = [
            feed(self._places[context.request_id], segment, states)
            for (context, _), segment, states in zip(growing, batch.segments, hidden, strict=True)
        ]
        stops = list(itertools.accumulate(len(states) for _, states in fed))
        wanted = [stop - 1 for stop in stops] if is_first else range(stops[-1])
        return self._run_adapter([it for it, _ in fed], join_rows([it for _, it in fed]), wanted)

    def _exit_states(self, batch: RaggedBatch) -> tuple[Tensor, ...]:
        """Run the first layers; return the states after them, [R, D] for each segment."""
        output = self._view.forward(batch, [], hidden_layers=[self._num_layers])
        states: tuple[Tensor, ...] = output.hidden[self._num_layers].split(batch.lengths)
        return states

    def _first_rows(
        self, place: _Place, segment: Segment, states: Tensor
    ) -> tuple[Segment, Tensor]:
        """Return what the adapter is fed where the layers are fed tokens that stand."""
        num_ahead = segment.sequence.num_cached - place.sequence.num_cached
        place.num_ahead = num_ahead
        if num_ahead > 0:
            states = join_rows((place.waiting(segment.sequence.num_cached), states))
        states = states[max(0, -num_ahead) :]
        num_rows = len(states)
        return Segment(place.sequence, [NO_TOKEN] * num_rows, range(-1, num_rows - 1)), states

    def _run_adapter(
        self, segments: Sequence[Segment], states: Tensor, rows: Sequence[int]
    ) -> Tensor:
        batch = self._adapter.batch(self._adapter_cache, segments)
        return self._adapter.forward(batch, rows, states=states).logits

    def _grow(self, growing: Sequence[tuple[DraftContext, GrowingTree]], logits: Tensor) -> None:
        """Add a level to every tree, and end it below the nodes that are not sure of the next."""
        parents = [list(tree.frontier) for _, tree in growing]
        super()._grow(growing, logits)
        logprobs = logits.amax(dim=1) - logits.logsumexp(dim=1)
        is_sure = iter((logprobs.exp() >= self._eta).tolist())
        for (_, tree), nodes in zip(growing, parents, strict=True):
            _end_below(tree, {node for node in nodes if not next(is_sure)})


def _later_rows(place: _Place, segment: Segment, states: Tensor) -> tuple[Segment, Tensor]:
    """Return what the adapter is fed where the layers are fed nodes of the tree."""
    parents = [parent + place.num_ahead for parent in segment.parents]
    return Segment(place.sequence, [NO_TOKEN] * len(parents), parents), states


def _end_below(tree: GrowingTree, parents: set[int]) -> None:
    """Take the children of some nodes out of the frontier."""
    stays = [tree.parents[node] not in parents for node in tree.frontier]
    tree.frontier = list(itertools.compress(tree.frontier, stays))
    if isinstance(tree, DrawnTree):
        tree.num_draws = list(itertools.compress(tree.num_draws, stays))
