"""What is in flight of one request: rows at different depths, a tree below the pending token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from foretoken.core.draft import Draft, DraftBudget
from foretoken.core.tree import NO_PARENT
from foretoken.drafters.in_flight import Guess
from foretoken.engine.request import Request
from foretoken.engine.scheduler import Work
from foretoken.models.cache import CachedSequence, KVCache
from foretoken.models.in_flight import InFlight


@dataclass(eq=False, slots=True)
class Node:
    """A row in flight.

    Args:
        token_id: Its token.
        parent: The row before it; None for the root.
        source: The drafter that guessed it; "" for a token that stood when its row began.
        depth: Loops that it has behind it.
        row: Where its state is in what the last tick gave back.
        guesses: What may come after it, in the order in which it was said.
        looks: Depths at which it was looked at, with the token that it would have led to.
    """

    token_id: int
    parent: Node | None = None
    source: str = ""
    depth: int = 0
    row: int = 0
    guesses: tuple[Guess, ...] = ()
    looks: list[tuple[int, int | None]] = field(default_factory=list)


class Flight:
    """The rows in flight of one request, parents first and older ones before younger ones.

    Younger rows have never more loops behind them than older ones: all advance together. The
    cache's staged nodes are the first of the rows, in the same order; those that are new follow.

    Args:
        work: The request's share of the step in which it begins.

    Attributes:
        request: Whose it is.
        sequence: Its place in the cache.
        work: Its share of this step.
        nodes: The rows; the first is the root, the request's pending token.
        asked: Drafters that were asked what to put below the root when it began.
    """

    def __init__(self, work: Work) -> None:
        self.request: Request = work.request
        self.sequence: CachedSequence = work.sequence
        self.work = work
        self.nodes: list[Node] = []
        self.asked: tuple[str, ...] = ()
        self._staged: list[Node] = []
        self.restart()

    @property
    def root(self) -> Node:
        """The oldest row."""
        return self.nodes[0]

    @property
    def num_staged(self) -> int:
        """Rows that have begun; the others do with the next tick."""
        return len(self._staged)

    def restart(self) -> None:
        """Begin with the pending token alone."""
        self.nodes = [Node(self.request.token_ids[-1])]
        self.asked = ()

    def child(self, node: Node, token_id: int) -> Node | None:
        """Return the row below another one that carries a token, if there is one."""
        return next(
            (it for it in self.nodes if it.parent is node and it.token_id == token_id), None
        )

    @staticmethod
    def path(node: Node) -> list[int]:
        """Return the tokens below the root, down to a row's own."""
        token_ids = []
        while node.parent is not None:
            token_ids.append(node.token_id)
            node = node.parent
        return token_ids[::-1]

    # -- what changes it -------------------------------------------------------------------

    def graft(self, draft: Draft) -> None:
        """Put a draft below the root, which is alone."""
        rows = [self.root]
        for node in range(1, len(draft.tree)):
            parent = rows[draft.tree.parents[node]]
            rows.append(Node(draft.tree.token_ids[node], parent, draft.source[node]))
        self.nodes = rows
        for node, row in enumerate(rows):
            row.guesses = _children(draft, node)

    def grow(self, node: Node, guesses: Sequence[Guess], source: str, max_rows: int) -> list[Node]:
        """Let a row have the children that are guessed now; return those that are dropped.

        Args:
            node: A row.
            guesses: What may come after it from now on.
            source: Who says so.
            max_rows: Most rows in flight; guesses beyond have none.
        """
        node.guesses = tuple(guesses)
        wanted = {guess.token_id for guess in guesses}
        wrong = [it for it in self.nodes if it.parent is node and it.token_id not in wanted]
        dropped = self._drop(self._below(wrong)) if wrong else []
        for guess in guesses:
            if len(self.nodes) < max_rows and self.child(node, guess.token_id) is None:
                self.nodes.append(Node(guess.token_id, node, source))
        return dropped

    def trim(self, budget: DraftBudget | None) -> list[Node]:
        """Drop the rows beyond the bounds of a draft, the youngest first; return them."""
        if len(self.nodes) == 1 or budget is None:
            return []
        kept = {self.root: 0}  # with the distance from the root
        for node in self.nodes[1 : 1 + (0 if budget.is_empty else budget.max_nodes)]:
            distance = kept.get(node.parent or self.root, budget.max_depth) + 1
            if distance <= budget.max_depth:
                kept[node] = distance
        return self._drop({node for node in self.nodes if node not in kept})

    def go_on(self, child: Node | None) -> list[Node]:
        """Make a child of the root the new root; return the rows that leave, the root first.

        Without a child all rows leave, and `restart` is to be called when the request has its
        next token.
        """
        if child is None:
            left, self.nodes = self.nodes, []
            return left
        below = self._below([child])
        self.asked = ()
        return self._drop({node for node in self.nodes if node not in below})

    def _below(self, tops: Iterable[Node]) -> set[Node]:
        """Return rows and all that hang on them."""
        found = set(tops)
        for node in self.nodes:
            if node.parent in found:
                found.add(node)
        return found

    def _drop(self, dropped: Set[Node]) -> list[Node]:
        left = [node for node in self.nodes if node in dropped]
        self.nodes = [node for node in self.nodes if node not in dropped]
        return left

    # -- the cache ----------------------------------------------------------------------------

    def settle(self, cache: KVCache, final: Sequence[Node] = ()) -> None:
        """Let the cache drop the rows that have left, but for those that now stand.

        Args:
            cache: The target's.
            final: Rows that have left because they stand, from the old root downward.
        """
        index = {node: place for place, node in enumerate(self._staged)}
        kept = [node for node in self.nodes if node in index]
        if final or len(kept) < len(self._staged):
            cache.advance(
                self.sequence, [index[node] for node in final], [index[node] for node in kept]
            )
            self._staged = kept
        if self.nodes:
            self.root.parent = None  # what stands is not held on to

    def stage(self, cache: KVCache) -> list[InFlight]:
        """Stage the rows that are new; return all rows as segments of a tick, by depth."""
        new = self.nodes[len(self._staged) :]
        if new:
            index = {node: place for place, node in enumerate(self.nodes)}
            parents = [index[node.parent] if node.parent else NO_PARENT for node in new]
            cache.stage(self.sequence, parents)
            self._staged = list(self.nodes)
        segments, first = [], 0
        for depth, group in itertools.groupby(self.nodes, lambda node: node.depth):
            token_ids = [node.token_id for node in group]
            segments.append(InFlight(self.sequence, first, token_ids, depth))
            first += len(token_ids)
        return segments


def _children(draft: Draft, node: int) -> tuple[Guess, ...]:
    """Return what a draft has below a node, draw by draw where it was sampled."""
    token_ids = draft.tree.token_ids
    if node in draft.draws:
        return tuple(
            Guess(token_ids[child], group.probs)
            for group in draft.draws[node]
            for child in group.nodes
        )
    return tuple(Guess(token_ids[child]) for child in draft.tree.children[node])
