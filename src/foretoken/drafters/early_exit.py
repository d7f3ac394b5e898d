"""The target's first layers draft; what they have computed the target does not compute again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from foretoken.core.draft import Draft
from foretoken.core.tree import ROOT
from foretoken.drafters.base import DraftContext, DrafterHost, Taxonomy
from foretoken.drafters.growth import GrowingTree
from foretoken.drafters.model_drafter import DraftState, GrowthOptions, ModelDrafter
from foretoken.errors import ConfigError
from foretoken.models.adapter import LayerView
from foretoken.models.batch import RaggedBatch, RowStates
from foretoken.models.partial import CachedPast, LayerSet, copy_past
from foretoken.models.state_rows import join_rows, take_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyExitOptions(GrowthOptions):
    """Options of `early-exit`, besides how trees grow.

    Args:
        layers: How many of the target's layers draft, from the first; half of them if it is not
            given. What they compute is not lost, so the cost of a draft is that of its nodes that
            are not taken.
        max_depth: As there; a pass costs a good part of the target's, so trees are small.
        width: Likewise.
        min_gain: Likewise.
    """

    name: ClassVar[str] = "early-exit"
    layers: int | None = None
    max_depth: int = 4
    width: int = 2
    min_gain: float = 0.5

    def num_layers(self, num_target_layers: int) -> int:
        """Return how many layers draft.

        Raises:
            ConfigError: The target has no layer left to verify with.
        """
        layers = num_target_layers // 2 if self.layers is None else self.layers
        if not 1 <= layers < num_target_layers:
            raise ConfigError(
                f"early-exit:layers is from 1 to {num_target_layers - 1} for a target of "
                f"{num_target_layers} layers; got {layers}",
                hint="change layers, or use another drafter",
            )
        return layers


class FirstLayersDrafter(ModelDrafter):
    """Runs the target's first layers for its drafts; the target goes on from what they gave.

    The rows of the root and of the nodes that the drafter expands go through the first layers
    here, and through the others in the target's pass, so no row goes through a layer twice.

    Args:
        num_layers: How many of the target's layers it runs.
        options: How trees grow.
        host: What there is.

    Raises:
        UnsupportedModelError: The layers of the target's architecture cannot be run apart.
    """

    def __init__(self, num_layers: int, options: GrowthOptions, host: DrafterHost) -> None:
        self._num_layers = num_layers
        self._view: LayerView = host.target.with_layers(LayerSet.all(num_layers))
        super().__init__(self._view, options, host)
        self.needs = replace(self.needs, shared_layers=num_layers, target_past=True)

    def row_states(self, request_id: str, positions: range, draft: Draft) -> RowStates | None:
        """Return the states of the rows that were run for this step's draft."""
        state = self._states[request_id]
        sequence = state.sequence
        is_current = sequence.num_cached + state.num_known == positions.stop
        # Tokens that were fed before the target is would hang on rows that are not known.
        if not state.num_known or not is_current or sequence.num_cached > positions.start:
            return None
        num_skipped = positions.start - sequence.num_cached
        staged = {row: row + num_skipped for row in range(len(positions))}
        staged |= _staged_nodes(state, draft, root_row=len(positions) - 1)
        slots = self._cache.slots(
            sequence, sequence.num_cached, sequence.num_cached + sequence.num_staged
        )
        rows, indices = sorted(staged), [staged[row] for row in sorted(staged)]
        hidden = take_rows(join_rows(state.hidden), indices)
        return RowStates(self._num_layers, rows, hidden, self._cache, slots[indices])

    def _take_past(self, state: DraftState, past: CachedPast, stop: int) -> None:
        """Take the keys and values that the target has cached, up to a position."""
        copy_past(past, self._view.layers.attention, self._cache, state.sequence, stop)

    def _keep_states(
        self, growing: Sequence[tuple[DraftContext, GrowingTree]], hidden: Sequence[Tensor]
    ) -> None:
        """Keep the states of a pass for the target, one tensor for each tree."""
        for (context, _), states in zip(growing, hidden, strict=True):
            self._states[context.request_id].hidden.append(states)


class EarlyExitDrafter(FirstLayersDrafter):
    """Drafts with the target's first layers, its final norm and its head.

    The keys and values of the text come from the target's own cache. Any model will do; one that
    was trained with early-exit loss (LayerSkip) drafts far better.

    Args:
        options: How many layers, and how trees grow.
        host: Its target's layers draft.

    Raises:
        ConfigError: The target has fewer layers.
        UnsupportedModelError: Its architecture's layers cannot be run apart.
    """

    Options: ClassVar[type[Any]] = EarlyExitOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="target itself",
        is_trained=False,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="LayerSkip, arXiv:2404.16710; Kangaroo, arXiv:2404.18911",
    )

    def __init__(self, options: EarlyExitOptions, host: DrafterHost) -> None:
        super().__init__(options.num_layers(host.target.info.num_layers), options, host)

    @classmethod
    def create(cls, options: EarlyExitOptions, host: DrafterHost) -> EarlyExitDrafter:
        """Build it on the host's target; nothing is loaded."""
        return cls(options, host)

    def _catch_up(self, state: DraftState, context: DraftContext) -> None:
        """Take what the target has cached, so that the rows left are those that it will run."""
        if context.past is None:
            super()._catch_up(state, context)
        else:
            self._take_past(state, context.past, context.past.sequence.num_cached)

    def _forward(
        self,
        batch: RaggedBatch,
        rows: Sequence[int],
        growing: Sequence[tuple[DraftContext, GrowingTree]],
    ) -> Tensor:
        layer = self._num_layers
        output = self._model.forward(batch, rows, hidden_layers=[layer])
        self._keep_states(growing, output.hidden[layer].split(batch.lengths))
        return output.logits


def _staged_nodes(state: DraftState, draft: Draft, root_row: int) -> dict[int, int]:
    """Return the rows of draft nodes that were fed, with their indices among the staged."""
    staged = {ROOT: state.staged_at[ROOT]}
    tree = draft.tree
    for node in range(1, len(tree)):
        parent = staged.get(tree.parents[node])
        index = state.child_at.get((parent, tree.token_ids[node])) if parent is not None else None
        if index is not None:
            staged[node] = index
    return {root_row + node: index for node, index in staged.items()}
