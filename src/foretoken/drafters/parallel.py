"""A head on the target's states says several tokens in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from foretoken.drafters.base import DraftContext, DrafterHost, Taxonomy
from foretoken.drafters.eagle import EagleDrafter
from foretoken.drafters.growth import GrowingTree
from foretoken.drafters.model_drafter import GrowthOptions
from foretoken.models.batch import Segment
from foretoken.models.heads.eagle_served import ServedEagle
from foretoken.models.heads.files import TargetShape, read_head, target_tensors
from foretoken.models.heads.parallel import ParallelModule, load_parallel
from foretoken.models.state_rows import join_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelOptions(GrowthOptions):
    """Options of `parallel`, besides how trees grow.

    Args:
        path: Directory of the head.
        min_gain: As there; a level costs no pass, so none is left out by default.
    """

    name: ClassVar[str] = "parallel"
    path: str
    min_gain: float = 0.0


class ParallelDrafter(EagleDrafter):
    """Fills a tree from one pass of a head, which says several tokens one after the other.

    What a place says does not depend on the tokens chosen before it, so every node of a level has
    the same distribution; the tree is the best one by products of probabilities.

    Args:
        module: The head.
        options: How trees grow.
        host: What there is.

    Source: ParallelSpec, arXiv:2410.05589.
    """

    Options: ClassVar[type[Any]] = ParallelOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="head on the target's states",
        is_trained=True,
        termination="static",
        structure="tree",
        reference="ParallelSpec, arXiv:2410.05589",
    )

    def __init__(self, module: ParallelModule, options: GrowthOptions, host: DrafterHost) -> None:
        info = host.target.info
        head = ServedEagle(module, info, host.dtype, extra_embeddings=module.mask_embeddings)
        super().__init__(head, options, host)
        self._max_depth = min(self._max_depth, module.design.num_steps)
        self._mask_ids = [info.vocab_size + place for place in range(self._max_depth - 1)]
        self._mask_state = module.mask_state.detach().to(head.info.device, head.info.dtype)
        self._said: dict[str, Tensor] = {}  # logits of each place, of this step, [K, V]

    @classmethod
    def create(cls, options: ParallelOptions, host: DrafterHost) -> Self:  # type: ignore[override]
        """Read the head, and of the target what it shares.

        Raises:
            ModelError: It cannot be read, is of another kind or for another target.
        """
        shape = TargetShape.of(host.target.info)
        files = read_head(options.path, "parallel", shape)
        return cls(load_parallel(files, shape, target_tensors(shape.name)), options, host)

    def stop(self, request_id: str) -> None:
        """Free what is held of a request."""
        super().stop(request_id)
        self._said.pop(request_id, None)

    def _run(self, growing: Sequence[tuple[DraftContext, GrowingTree]]) -> Tensor:
        """Return the frontiers' logits, [F, V]: of all levels from the pass of the first."""
        if growing[0][1].depth == 0:
            self._say(growing)
        rows = [
            self._said[context.request_id][tree.depth].expand(len(tree.frontier), -1)
            for context, tree in growing
        ]
        return join_rows(rows)

    def _say(self, growing: Sequence[tuple[DraftContext, GrowingTree]]) -> None:
        """Run the tokens that stand and the mask tokens behind them, all requests together."""
        num_masks = [min(self._max_depth, context.budget.max_depth) - 1 for context, _ in growing]
        segments = [
            self._with_masks(self._segment(context, tree), count)
            for (context, tree), count in zip(growing, num_masks, strict=True)
        ]
        batch = self._head.batch(self._cache, segments)
        rows = [
            row
            for stop, count in zip(batch.starts[1:], num_masks, strict=True)
            for row in range(stop - count - 1, stop)
        ]
        states = []
        for (context, _), count in zip(growing, num_masks, strict=True):
            waiting = self._waiting[context.request_id]
            states += [waiting.first(len(waiting)), self._mask_state.expand(count, -1)]
        logits = self._head.score(batch, rows, join_rows(states)).logits
        lengths = [count + 1 for count in num_masks]
        for (context, _), said in zip(growing, logits.split(lengths), strict=True):
            self._said[context.request_id] = said

    def _with_masks(self, segment: Segment, num_masks: int) -> Segment:
        """Return a segment with mask tokens behind its last one."""
        num_known = len(segment.token_ids)
        token_ids = [*segment.token_ids, *self._mask_ids[:num_masks]]
        return Segment(segment.sequence, token_ids, range(-1, num_known + num_masks - 1))
