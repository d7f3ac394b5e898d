"""Some of the target's layers, trained to go on from its states, draft a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

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
from foretoken.models.batch import Segment
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.heads.files import TargetShape, read_head
from foretoken.models.heads.graft import DRAFT_FOLDER, GraftDesign, load_fc
from foretoken.models.heads.graft_served import NO_TOKEN, ServedGraft
from foretoken.models.loading import load_model
from foretoken.models.state_rows import join_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftOptions(GrowthOptions):
    """Options of `graft`, besides how trees grow.

    Args:
        path: Directory of the head, as `foretoken train head graft` wrote it.
    """

    name: ClassVar[str] = "graft"
    path: str


@dataclass(slots=True)
class _Text:
    """What is cached of a request besides its place.

    Args:
        prompt_ids: Of the request.
        is_exact: Whether all that is cached was made from the target's states.
    """

    prompt_ids: Sequence[int]
    is_exact: bool = True


class GraftDrafter(ModelDrafter):
    """Drafts with layers that began as the target's, over keys and values of its states.

    What the target has run is cached from its states as soon as they are told; only the pending
    token and those of the draft go through the layers. Where states were never told, since the
    target found tokens in its prefix cache, the layers run over these tokens themselves.

    Args:
        head: Served beside the target.
        options: How trees grow.
        host: What there is.

    Source: GLIDE, arXiv:2402.02082, for drafts that attend to what the target computed; here keys
        and values are made from its states, by its own layers.
    """

    Options: ClassVar[type[Any]] = GraftOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="layers cut from the target, on its states",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="GLIDE, arXiv:2402.02082",
    )

    def __init__(self, head: ServedGraft, options: GrowthOptions, host: DrafterHost) -> None:
        super().__init__(head.model, options, host)
        self._head = head
        self.needs = replace(self.needs, hidden_layers=tuple(sorted(set(head.target_layers))))
        self._texts: dict[str, _Text] = {}

    @classmethod
    def create(cls, options: GraftOptions, host: DrafterHost) -> Self:
        """Load the layers and what joins them to the target.

        Raises:
            ModelError: They cannot be read, or are for another target.
        """
        files = read_head(options.path, "graft", TargetShape.of(host.target.info))
        folder = str(Path(options.path).expanduser() / DRAFT_FOLDER)
        model = load_model(folder, dtype=host.dtype, device=host.device)
        design = GraftDesign.from_options(files.options)
        fc = load_fc(files, model.info.hidden_size)
        return cls(ServedGraft(model, fc, design.layers), options, host)

    def start(self, request: RequestView) -> None:
        """Open the request's place, with what the cache has of its prompt."""
        sequence = self._cache.open(request.prompt_ids)
        self._states[request.request_id] = DraftState(sequence)
        self._texts[request.request_id] = _Text(request.prompt_ids)

    def stop(self, request_id: str) -> None:
        """Free what is held of a request."""
        super().stop(request_id)
        self._texts.pop(request_id, None)

    # -- states ------------------------------------------------------------------------------

    def observe(self, standing: Sequence[StandingStates]) -> None:
        """Cache keys and values of the positions that the target has run."""
        known = [told for told in standing if told.request_id in self._states]
        for told in known:
            self._settle(told.request_id, told.start)
            self._bridge(told)
        segments, places, num_free = [], [], self._cache.num_free_blocks
        for told in known:
            sequence = self._states[told.request_id].sequence
            first = sequence.num_cached - told.start
            num_rows = len(told.hidden[self._head.target_layers[0]]) - first
            num_free -= -(-num_rows // BLOCK_SIZE) + 1
            if first < 0 or num_rows < 1 or num_free < 0:
                continue
            segments.append(Segment(sequence, [NO_TOKEN] * num_rows, range(-1, num_rows - 1)))
            places.append((told, first))
        if not segments:
            return
        hidden = {
            layer: join_rows([told.hidden[layer][first:] for told, first in places])
            for layer in self._head.target_layers
        }
        self._head.fill(self._cache, segments, hidden)
        for told, _ in places:
            self._share(told.request_id)

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Drop what the draft cached: keys and values of the target's states take its place."""
        for outcome in outcomes:
            self._settle(outcome.request_id, 0)

    def _settle(self, request_id: str, start: int) -> None:
        """Drop the rows of the last draft but those of tokens that stand before a position."""
        state = self._states[request_id]
        num_kept = min(state.num_known, start - state.sequence.num_cached)
        if num_kept > 0:
            self._texts[request_id].is_exact = False
            self._cache.commit([(state.sequence, range(num_kept))])
        else:
            self._cache.rollback(state.sequence)
        state.reset()

    def _bridge(self, told: StandingStates) -> None:
        """Run over tokens of the prompt before the states told, if they are not cached."""
        state, text = self._states[told.request_id], self._texts[told.request_id]
        if told.start:
            self._take_over(told.request_id)
        while state.sequence.num_cached < told.start <= len(text.prompt_ids):
            start = state.sequence.num_cached
            chunk = text.prompt_ids[start : min(told.start, start + PREFILL_ROWS)]
            if self._cache.num_free_blocks < -(-len(chunk) // BLOCK_SIZE) + 1:
                return
            text.is_exact = False
            with self._cache.speculate([state.sequence]):
                segment = Segment(state.sequence, chunk, range(-1, len(chunk) - 1))
                self._model.forward(self._model.batch(self._cache, [segment]), [])
                self._cache.commit([(state.sequence, range(len(chunk)))])

    def _take_over(self, request_id: str) -> None:
        """Look again for what the prompt begins with: other requests may have cached it since."""
        state = self._states[request_id]
        if not state.sequence.num_cached:
            self._cache.close(state.sequence)
            state.sequence = self._cache.open(self._texts[request_id].prompt_ids)

    def _share(self, request_id: str) -> None:
        """Let requests with the same beginning have what was made of the target's states."""
        state, text = self._states[request_id], self._texts[request_id]
        if text.is_exact:
            self._cache.share(state.sequence, text.prompt_ids)

    # -- one step ----------------------------------------------------------------------------

    def _plant(self, context: DraftContext) -> GrowingTree:
        """Return a tree of the root alone; one that cannot grow before the states of a long text.

        A short one is worth a pass over its tokens for a draft in the very first step.
        """
        self._take_over(context.request_id)
        num_cached = self._states[context.request_id].sequence.num_cached
        if len(context.token_ids) - num_cached > PREFILL_ROWS:
            context = replace(context, budget=NOTHING)
        return super()._plant(context)


__all__ = ["GraftDrafter", "GraftOptions"]
