"""What drafters have in common whose heads know a request by one state of the target's.

The state is that of the last token before the pending one. They need no cache of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    RequestView,
    StandingStates,
)
from foretoken.drafters.growth import DrawnTree, GrowingTree
from foretoken.drafters.levels import SAMPLERS, Growing
from foretoken.drafters.model_drafter import NOTHING, GrowthOptions
from foretoken.models.heads.linear import StateHeads
from foretoken.models.heads.served import serve_heads
from foretoken.models.state_rows import join_rows


@dataclass(slots=True)
class LastState:
    """The newest of the target's states that stand.

    Args:
        position: Of its token.
        state: [D].
    """

    position: int
    state: Tensor


class HeadDrafter(Drafter):
    """Grows trees level by level with one head per level, for all requests together.

    Until the target's state before the pending token is known, it drafts nothing.

    Args:
        options: How trees grow.
        heads: What drafts; converted in place where it is not compiled.
        num_heads: How many heads there are, and so levels at most.
        host: What there is.
    """

    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(SiblingDraw)

    def __init__(
        self, options: GrowthOptions, heads: StateHeads, num_heads: int, host: DrafterHost
    ) -> None:
        info = host.target.info
        self.needs = DrafterNeeds(hidden_layers=(info.num_layers,))
        self._layer = info.num_layers
        self._device = info.device
        self._served = serve_heads(heads, info.dtype, info.device)
        self._name = options.name
        self._policy = options.policy()
        self._max_depth = min(num_heads, options.depth_limit)
        self._max_nodes = options.max_nodes
        self._states: dict[str, LastState] = {}

    def start(self, request: RequestView) -> None:
        """Nothing is known of a request that begins, or begins anew."""
        self._states.pop(request.request_id, None)

    def observe(self, standing: Sequence[StandingStates]) -> None:
        """Keep the last state of each request."""
        for it in standing:
            states = it.hidden[self._layer]
            if len(states):
                # A copy: a view would keep the whole pass alive.
                last = states[-1].to(self._device, copy=True)
                self._states[it.request_id] = LastState(it.start + len(states) - 1, last)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return one tree per context."""
        trees = [self._plant(context) for context in contexts]
        growing = [pair for pair in zip(contexts, trees, strict=True) if pair[1].frontier]
        if growing:
            add = self._levels(growing)
            while growing:
                add(growing, growing[0][1].depth)
                growing = [pair for pair in growing if pair[1].frontier]
        return [
            tree.finish(self._name, context.siblings)
            for context, tree in zip(contexts, trees, strict=True)
        ]

    def stop(self, request_id: str) -> None:
        """Forget the request's state."""
        self._states.pop(request_id, None)

    def _levels(self, growing: Sequence[Growing]) -> Callable[[Sequence[Growing], int], None]:
        """Return what adds the children of all frontiers of one depth, in this step.

        Args:
            growing: All trees that have a frontier at the beginning.
        """
        raise NotImplementedError

    def _plant(self, context: DraftContext) -> GrowingTree:
        """Return a tree of the root alone; one that cannot grow if the state is not known."""
        budget = self._budget(context)
        is_drawn = context.siblings in SAMPLERS
        kind = DrawnTree if is_drawn else GrowingTree
        return kind(context.token_ids[-1], budget, self._policy, self._max_depth)

    def _budget(self, context: DraftContext) -> DraftBudget:
        known = self._states.get(context.request_id)
        if known is None or known.position != len(context.token_ids) - 2:
            return NOTHING
        if self._max_nodes is not None and self._max_nodes < context.budget.max_nodes:
            return replace(context.budget, max_nodes=self._max_nodes)
        return context.budget

    def _last_states(self, growing: Sequence[Growing]) -> Tensor:
        """Return the state of every tree's request, [trees, D]."""
        return join_rows([self._states[context.request_id].state[None] for context, _ in growing])


class Generators:
    """The randomness of one step's samples: for each request one generator for all levels."""

    def __init__(self) -> None:
        self._of: dict[str, np.random.Generator] = {}

    def __call__(self, context: DraftContext) -> np.random.Generator:
        """Return a request's generator."""
        return self._of.setdefault(context.request_id, context.generator())
