"""Ways to grow a draft tree level by level from a distribution per node."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.core.tree import NO_PARENT, ROOT, TokenTree
from foretoken.errors import ConfigError


class GrowthPolicy(Protocol):
    """Decides how many children nodes get and which of them get children in turn."""

    def num_children(self, depth: int) -> int:
        """Return how many candidates a node at `depth` may offer."""
        ...

    def admit(self, tree: GrowingTree, total: float) -> bool:
        """Return whether to add a node, the next one, whose path has this log-probability."""
        ...

    def select(self, tree: GrowingTree, offered: range) -> list[int]:
        """Return the nodes among those just added that are to be expanded next."""
        ...

    def finish(self, tree: GrowingTree) -> list[int]:
        """Return the nodes of the final draft, ascending, each with its parent."""
        ...


class GrowingTree:
    """A draft tree under construction for one request.

    Args:
        root_id: The pending token.
        budget: Bounds of the draft.
        policy: How to grow.
        max_depth: The drafter's own bound on depth.

    Attributes:
        token_ids: Of every node added so far.
        parents: Likewise.
        logprobs: Log of each node's estimated probability of being taken after its parent.
        totals: Their sums along each path from the root.
        paths: Draft tokens from below the root to each node, itself included.
        best: For the policy: the nodes worth keeping so far, as a heap of (total, -node).
        depth: Of the frontier.
        frontier: Nodes whose candidates are wanted next; empty when the tree is complete.
    """

    def __init__(
        self, root_id: int, budget: DraftBudget, policy: GrowthPolicy, max_depth: int
    ) -> None:
        self.budget = budget
        self.token_ids = [root_id]
        self.parents = [NO_PARENT]
        self.logprobs = [0.0]
        self.totals = [0.0]
        self.paths: list[tuple[int, ...]] = [()]
        self.best: list[tuple[float, int]] = []
        self.depth = 0
        self._policy = policy
        self._max_depth = min(max_depth, budget.max_depth)
        self.frontier = [] if budget.max_nodes == 0 or self._max_depth == 0 else [ROOT]

    @property
    def num_children(self) -> int:
        """Candidates wanted for each node of the frontier."""
        return self._policy.num_children(self.depth)

    def grow(self, token_ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> None:
        """Add one level: candidates of each frontier node, and the logs of their probabilities.

        Args:
            token_ids: For each node of the frontier, best first.
            logprobs: Likewise, descending.
        """
        num_before = len(self.token_ids)
        for parent, ids, values in zip(self.frontier, token_ids, logprobs, strict=True):
            total, path = self.totals[parent], self.paths[parent]
            for token_id, logprob in zip(ids, values, strict=True):
                if not self._policy.admit(self, total + logprob):
                    break  # those after it are worth no more
                self.token_ids.append(token_id)
                self.parents.append(parent)
                self.logprobs.append(logprob)
                self.totals.append(total + logprob)
                self.paths.append((*path, token_id))
        self.depth += 1
        expandable = self._policy.select(self, range(num_before, len(self.token_ids)))
        self.frontier = expandable if self.depth < self._max_depth else []

    def finish(self, source: str, siblings: SiblingDraw) -> Draft:
        """Return the draft within its budget."""
        nodes = self._policy.finish(self)
        new_index = {node: index for index, node in enumerate(nodes)}
        tree = TokenTree(
            tuple([self.token_ids[node] for node in nodes]),
            (NO_PARENT, *[new_index[self.parents[node]] for node in nodes[1:]]),
        )
        logprobs = tuple([self.logprobs[node] for node in nodes])
        return Draft.from_drafter(source, tree, siblings=siblings, draft_logprobs=logprobs)


@dataclass(frozen=True, slots=True)
class StaticExpansion:
    """SpecInfer's expansion vector <k1, ..., km>: every node of level i gets k_i children.

    Levels are filled in order; the budget cuts the last one that does not fit.
    Source: arXiv:2305.09781, section 3.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(
                f"an expansion is one width of at least 1 per level; got {self.widths}",
                hint="for example expansion=1-1-3-1-1",
            )

    def num_children(self, depth: int) -> int:
        """Return the width of the level below `depth`."""
        return self.widths[depth]

    def admit(self, tree: GrowingTree, total: float) -> bool:
        """Add every node."""
        return True

    def select(self, tree: GrowingTree, offered: range) -> list[int]:
        """Expand every new node, as long as the budget has room for children."""
        return list(offered) if len(tree.token_ids) <= tree.budget.max_nodes else []

    def finish(self, tree: GrowingTree) -> list[int]:
        """Keep nodes in the order of their making, up to the budget."""
        return list(range(min(len(tree.token_ids), tree.budget.max_nodes + 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BestFirst:
    """The connected nodes of highest path probability, found with one pass per level.

    A node that is not among the best `max_nodes` so far never will be, because paths only get
    less likely; the others at the newest level are expanded together.

    Args:
        width: Most children of one node.
        min_gain: Stop when the nodes of the newest level are together worth less than this many
            expected tokens: another draft pass would cost more than it brings.

    Source: SpecExec, arXiv:2406.02532; EAGLE-2, arXiv:2406.16858.
    """

    width: int
    min_gain: float

    def __post_init__(self) -> None:
        if self.width < 1 or not self.min_gain >= 0:
            raise ConfigError(
                f"width is at least 1 and min_gain not negative; "
                f"got {self.width} and {self.min_gain}",
                hint="change width or min_gain",
            )

    def num_children(self, depth: int) -> int:
        """Return the same width at every depth."""
        return self.width

    def admit(self, tree: GrowingTree, total: float) -> bool:
        """Add a node that is among the best so far; it may push out another."""
        # Ties go to the older node, so a parent is never pushed out before its child.
        entry = (total, -len(tree.token_ids))
        if len(tree.best) < tree.budget.max_nodes:
            heapq.heappush(tree.best, entry)
            return True
        return heapq.heappushpop(tree.best, entry) is not entry

    def select(self, tree: GrowingTree, offered: range) -> list[int]:
        """Expand the newest nodes that are among the best, if they are worth a pass."""
        # Children of the worst node of a full tree could only replace it by something worse.
        is_full = len(tree.best) == tree.budget.max_nodes
        worth_more_than = tree.best[0][0] if is_full else -math.inf
        chosen = sorted(
            [-node for total, node in tree.best if -node in offered and total > worth_more_than]
        )
        gain = sum([math.exp(tree.totals[node]) for node in chosen])
        return chosen if gain >= self.min_gain else []

    def finish(self, tree: GrowingTree) -> list[int]:
        """Keep the best nodes."""
        return [ROOT, *sorted([-node for _, node in tree.best])]
