"""One decoder layer on the target's states drafts a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from foretoken.core.tree import ROOT
from foretoken.drafters.base import (
    DraftContext,
    DrafterHost,
    Outcome,
    RequestView,
    StandingStates,
    Taxonomy,
)
from foretoken.drafters.growth import GrowingTree
from foretoken.drafters.model_drafter import (
    NOTHING,
    PREFILL_ROWS,
    DraftState,
    GrowthOptions,
    ModelDrafter,
)
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.heads.eagle import load_eagle
from foretoken.models.heads.eagle_served import ServedEagle
from foretoken.models.heads.files import TargetShape, read_head, target_tensors
from foretoken.models.heads.state_reader import StateReader
from foretoken.models.state_rows import join_rows, take_rows

# Of a request that nobody drafts for, no more states than these are kept for the next draft.
MAX_WAITING = 4 * PREFILL_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleOptions(GrowthOptions):
    """Options of `eagle`, besides how trees grow.

    Args:
        path: Directory of the head: one that `foretoken train` wrote, or a published EAGLE-3 or
            speculators checkpoint.
    """

    name: ClassVar[str] = "eagle"
    path: str


@dataclass(slots=True)
class WaitingStates:
    """States of the target that the head has not run over.

    The head's row of position i reads the state there and the token after it. Rows that requests
    with the same beginning had are taken over, as the target takes over its own. Where only the
    target has them, rows begin with the first state that is told: rotations are relative, so they
    may begin anywhere.

    Args:
        prompt_ids: Of the request.
        stop: Position after the last state that was told or whose row was taken over.
        states: Of the positions before `stop`, those without a row in the cache, [n, D].
        is_whole: Whether the rows begin at position 0.
    """

    prompt_ids: Sequence[int]
    stop: int = 0
    states: Tensor | None = None
    is_whole: bool = True

    @property
    def start(self) -> int:
        """Position of the first state that waits."""
        return self.stop - len(self)

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def add(self, states: Tensor) -> None:
        """Take the states of the next positions."""
        self.states = join_rows((self.first(len(self)), states)) if len(self) else states
        self.stop += len(states)

    def first(self, num_states: int) -> Tensor:
        """Return the first states that wait; there are as many."""
        return self.states[:num_states]  # type: ignore[index]

    def drop(self, num_states: int) -> None:
        """Forget the first states: their rows are cached."""
        # A copy: a slice would keep the prompt's states alive.
        self.states = None if self.states is None else self.states[num_states:].clone()


class EagleDrafter(ModelDrafter):
    """Grows trees with a head that goes on from the target's states.

    The first pass of a step runs over the tokens that stand, with the target's own states; those
    rows stay in the head's cache. Deeper rows read the head's output in place of a state and are
    dropped after the step. One pass a level for all requests; trees grow as EAGLE-2's do, best
    first by the product of the head's probabilities.

    Args:
        head: Served beside the target.
        options: How trees grow.
        host: What there is.

    Source: EAGLE, arXiv:2401.15077; EAGLE-2, arXiv:2406.16858; EAGLE-3, arXiv:2503.01840.
    """

    Options: ClassVar[type[Any]] = EagleOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="head on the target's states",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="EAGLE-1/2/3, arXiv:2401.15077, 2406.16858, 2503.01840",
    )

    def __init__(self, head: StateReader, options: GrowthOptions, host: DrafterHost) -> None:
        super().__init__(head, options, host)
        self._head = head
        self.needs = replace(self.needs, hidden_layers=tuple(sorted(set(head.target_layers))))
        self._waiting: dict[str, WaitingStates] = {}

    @classmethod
    def create(cls, options: EagleOptions, host: DrafterHost) -> Self:
        """Read the head, and of the target what it shares.

        Raises:
            ModelError: It cannot be read, is of another kind or for another target.
        """
        shape = TargetShape.of(host.target.info)
        files = read_head(options.path, "eagle", shape)
        module = load_eagle(files, shape, target_tensors(shape.name))
        return cls(ServedEagle(module, host.target.info, host.dtype), options, host)

    def start(self, request: RequestView) -> None:
        """Open the request's place in the cache; drafts begin with the first states."""
        sequence = self._cache.open(self._row_keys(request.prompt_ids))
        self._states[request.request_id] = DraftState(sequence)
        self._waiting[request.request_id] = WaitingStates(request.prompt_ids, sequence.num_cached)

    def stop(self, request_id: str) -> None:
        """Free what is held of a request."""
        super().stop(request_id)
        self._waiting.pop(request_id, None)

    # -- states ------------------------------------------------------------------------------

    def observe(self, standing: Sequence[StandingStates]) -> None:
        """Take the states of tokens that stand; run over those of long prompts right away."""
        told = [it for it in standing if it.request_id in self._waiting]
        if not told:
            return
        layers = self.needs.hidden_layers
        fused = self._head.fuse(
            {layer: join_rows([it.hidden[layer] for it in told]) for layer in layers}
        )
        lengths = [len(it.hidden[layers[0]]) for it in told]
        for it, states in zip(told, fused.split(lengths), strict=True):
            self._take(it, states)

    def _take(self, told: StandingStates, states: Tensor) -> None:
        """Take one request's new states."""
        request_id, waiting = told.request_id, self._waiting[told.request_id]
        if told.start > waiting.stop:  # what is between was never told: begin anew behind it
            self._restart(request_id, told.start)
        waiting.add(states[waiting.stop - told.start :])
        if len(waiting) > PREFILL_ROWS and not self._states[request_id].num_known:
            self._run_over(request_id, waiting.prompt_ids)
        if len(waiting) > MAX_WAITING:
            newest = waiting.first(len(waiting))[-PREFILL_ROWS:]
            self._restart(request_id, waiting.stop - PREFILL_ROWS)
            waiting.add(newest)

    def _restart(self, request_id: str, start: int) -> None:
        """Forget a request's rows and states; the next state to be told is that at `start`."""
        state, waiting = self._states[request_id], self._waiting[request_id]
        state.reset()
        self._cache.close(state.sequence)
        state.sequence = self._cache.open()
        waiting.states, waiting.stop, waiting.is_whole = None, start, start == 0

    def _row_keys(self, token_ids: Sequence[int]) -> list[int]:
        """Return what tells rows from others at their place: the token read, and those before.

        The first row reads a state of the first token, which is told nowhere else.
        """
        keys = list(token_ids[1:])
        if keys:
            keys[0] += token_ids[0] * self._target_vocab_size
        return keys

    def _run_over(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Cache rows of all but the last `PREFILL_ROWS` states, as far as tokens are known."""
        state, waiting = self._states[request_id], self._waiting[request_id]
        while len(waiting) > PREFILL_ROWS:
            chunk = token_ids[waiting.start + 1 : waiting.start + 1 + PREFILL_ROWS]
            if not chunk or self._cache.num_free_blocks < -(-PREFILL_ROWS // BLOCK_SIZE) + 1:
                return
            segment = Segment(state.sequence, chunk, range(-1, len(chunk) - 1))
            with self._cache.speculate([state.sequence]):
                batch = self._head.batch(self._cache, [segment])
                self._head.score(batch, [], waiting.first(len(chunk)))
                self._cache.commit([(state.sequence, range(len(chunk)))])
            waiting.drop(len(chunk))

    # -- one step ----------------------------------------------------------------------------

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the rows that read the target's states; the others are run again with them."""
        kept = []
        for outcome in outcomes:
            state = self._states[outcome.request_id]
            if state.num_known:
                kept.append((state.sequence, range(state.num_known)))
                self._waiting[outcome.request_id].drop(state.num_known)
                state.reset()
        if kept:
            self._cache.commit(kept)

    def _plant(self, context: DraftContext) -> GrowingTree:
        waiting = self._waiting[context.request_id]
        # The root's row reads the state before it.
        if not len(waiting) or waiting.stop != len(context.token_ids) - 1:
            context = replace(context, budget=NOTHING)
        return super()._plant(context)

    def _catch_up(self, state: DraftState, context: DraftContext) -> None:
        sequence, waiting = state.sequence, self._waiting[context.request_id]
        if waiting.is_whole and sequence.num_cached // BLOCK_SIZE > sequence.num_shared:
            self._cache.share(sequence, self._row_keys(context.token_ids))
        self._run_over(context.request_id, context.token_ids)

    def _segment(self, context: DraftContext, tree: GrowingTree) -> Segment:
        state, waiting = self._states[context.request_id], self._waiting[context.request_id]
        token_ids: Sequence[int]
        parents: Sequence[int]
        if tree.depth:
            token_ids, parents = state.feed_frontier(tree)
        else:
            # The row of position i reads the token at i + 1, the pending one at last.
            token_ids = context.token_ids[waiting.start + 1 :]
            state.num_known, parents = len(token_ids), range(-1, len(token_ids) - 1)
            state.staged_at[ROOT] = len(token_ids) - 1
        return Segment(state.sequence, token_ids, parents)

    def _forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        growing: Sequence[tuple[DraftContext, GrowingTree]],
    ) -> Tensor:
        states = [
            self._states_read(context.request_id, segment)
            for (context, _), segment in zip(growing, batch.segments, strict=True)
        ]
        output = self._head.score(batch, rows, join_rows(states))
        for (context, _), outputs in zip(
            growing, output.hidden[1].split(batch.lengths), strict=True
        ):
            self._states[context.request_id].hidden.append(outputs)
        return output.logits

    def _states_read(self, request_id: str, segment: Segment) -> Tensor:
        """Return what a segment's rows read: the target's states, or their parents' outputs."""
        outputs = self._states[request_id].hidden
        if not outputs:
            return self._waiting[request_id].first(len(segment.token_ids))
        return take_rows(join_rows(outputs), segment.parents)
