"""Ways to grow a draft tree level by level from a distribution per node."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, DraftBudget, Draws, SiblingDraw
from foretoken.core.drawing import share_draws
from foretoken.core.tree import NO_PARENT, ROOT, TokenTree
from foretoken.errors import ConfigError

# Token ids, parents and log-probabilities of a draft.
Nodes = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


class GrowthPolicy(Protocol):
    """Decides how many children nodes get and which of them get children in turn."""

    def num_children(self, depth: int) -> int:
        """Return how many candidates a node at `depth` may offer."""
        ...

    def plan_draws(self, tree: DrawnTree, newest: Sequence[int], num_left: int) -> list[int]:
        """Return how many samples each of the newest nodes gets; 0 ends its path.

        Args:
            tree: All that was drawn so far.
            newest: Nodes of the newest level, the root at first.
            num_left: Nodes that the budget still has room for; what is asked beyond is shared.
        """
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
        max_depth: The lower one of the bounds on depth.
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
        self._final: Nodes | None = None
        self.max_depth = min(max_depth, budget.max_depth)
        self.frontier = [] if budget.max_nodes == 0 or self.max_depth == 0 else [ROOT]

    @property
    def num_children(self) -> int:
        """Candidates wanted for each node of the frontier."""
        wanted, max_width = self._policy.num_children(self.depth), self.budget.max_width
        return wanted if max_width is None else min(wanted, max_width)

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
        self.frontier = expandable if self.depth < self.max_depth else []

    def complete(
        self,
        token_ids: Sequence[int],
        parents: Sequence[int],
        logprobs: Sequence[float],
    ) -> None:
        """Take all nodes of the final draft, the root first, from who grew it elsewhere."""
        self._final = tuple(token_ids), tuple(parents), tuple(logprobs)
        self.frontier = []

    def finish(self, source: str, siblings: SiblingDraw) -> Draft:
        """Return the draft within its budget."""
        token_ids, parents, logprobs = self._final or self._cut()
        tree = TokenTree(token_ids, parents)
        return Draft.from_drafter(source, tree, siblings=siblings, draft_logprobs=logprobs)

    def _cut(self) -> Nodes:
        """Return the nodes that the policy keeps."""
        nodes = self._policy.finish(self)
        new_index = {node: index for index, node in enumerate(nodes)}
        return (
            tuple([self.token_ids[node] for node in nodes]),
            (NO_PARENT, *[new_index[self.parents[node]] for node in nodes[1:]]),
            tuple([self.logprobs[node] for node in nodes]),
        )


class DrawnTree(GrowingTree):
    """A draft tree whose children are samples; it keeps to the rule that `Draws` states.

    The numbers of draws of a level are settled, and within the budget, before the level is
    drawn; every draw stands. So `grow_drawn` and `finish` leave nothing out.

    Attributes:
        num_draws: Samples wanted for each node of the frontier, at least one each.
        draws: What was drawn, by node.
    """

    def __init__(
        self, root_id: int, budget: DraftBudget, policy: GrowthPolicy, max_depth: int
    ) -> None:
        super().__init__(root_id, budget, policy, max_depth)
        self.draws: dict[int, tuple[Draws, ...]] = {}
        self.num_draws: list[int] = []
        self._plan(self.frontier)

    @property
    def num_levels_left(self) -> int:
        """Levels that may still be drawn below the newest nodes."""
        return self.max_depth - self.depth

    def grow_drawn(self, drawn: Sequence[tuple[Sequence[int], NDArray[np.float64]]]) -> None:
        """Add one level.

        Args:
            drawn: For each node of the frontier the tokens in the order of their drawing, at most
                `num_draws` of them, and the distribution of the first draw.
        """
        num_before = len(self.token_ids)
        for parent, (token_ids, probs) in zip(self.frontier, drawn, strict=True):
            child_of: dict[int, int] = {}
            for place, token_id in enumerate(token_ids):
                if token_id not in child_of:
                    child_of[token_id] = len(self.token_ids)
                    self._add(parent, token_id, estimate_draw(place, float(probs[token_id])))
            nodes = tuple(child_of[token_id] for token_id in token_ids)
            self.draws[parent] = (Draws(nodes=nodes, probs=probs),)
        self.depth += 1
        self._plan(range(num_before, len(self.token_ids)))

    def finish(self, source: str, siblings: SiblingDraw) -> Draft:
        """Return the draft; the policy has no say in what was drawn."""
        tree = TokenTree(tuple(self.token_ids), tuple(self.parents))
        return Draft.from_drafter(
            source, tree, siblings=siblings, draft_logprobs=tuple(self.logprobs), draws=self.draws
        )

    def _add(self, parent: int, token_id: int, logprob: float) -> None:
        self.token_ids.append(token_id)
        self.parents.append(parent)
        self.logprobs.append(logprob)
        self.totals.append(self.totals[parent] + logprob)
        self.paths.append((*self.paths[parent], token_id))

    def _plan(self, newest: Sequence[int]) -> None:
        """Settle how often each of the newest nodes is drawn from."""
        num_left = self.budget.max_nodes - (len(self.token_ids) - 1)
        if num_left <= 0 or self.num_levels_left <= 0:
            newest = []
        wanted = self._policy.plan_draws(self, newest, num_left) if newest else []
        if self.budget.max_width is not None:
            wanted = [min(count, self.budget.max_width) for count in wanted]
        shares = share_draws(wanted, num_left)
        self.frontier = [node for node, share in zip(newest, shares, strict=True) if share]
        self.num_draws = [share for share in shares if share]


# Share of nodes at which the first, second, ... draw is the one that is accepted. Measured on the
# embedded pair at temperature 1, 2400 positions: 0.65, 0.08, 0.04, 0.02 by `mss`, and 0.67, 0.10,
# 0.04, 0.03 by `rrs`. It says which draws are worth a node, and has no influence on what is kept.
_ACCEPTANCE = (0.66, 0.09, 0.04, 0.025)


def draw_acceptance(place: int) -> float:
    """Return the estimated probability that a node's draw at this place is the accepted one."""
    beyond = max(0, place - len(_ACCEPTANCE) + 1)
    return _ACCEPTANCE[min(place, len(_ACCEPTANCE) - 1)] * 0.6**beyond


def estimate_draw(place: int, draft_prob: float) -> float:
    """Return the log of the estimated probability that a draw is accepted.

    The likelier the draft model found the token, the likelier is the target to agree; in the same
    measurement the first draw was accepted with about (1 + q) / 2, within 0.06 for any q.

    Args:
        place: Draws made before it at its node.
        draft_prob: The token's probability q in the node's distribution.
    """
    return math.log(draw_acceptance(place) / draw_acceptance(0) * (1 + draft_prob) / 2)


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

    def plan_draws(self, tree: DrawnTree, newest: Sequence[int], num_left: int) -> list[int]:
        """Return the level's width for every node."""
        return [self.widths[tree.depth]] * len(newest)

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

    def plan_draws(self, tree: DrawnTree, newest: Sequence[int], num_left: int) -> list[int]:
        """Plan the rest of the tree with average acceptance; return what it has for this level.

        The plan is the best connected tree of `num_left` draws below the newest nodes, each at
        its own estimate; nothing of the levels below is known yet, so the next level plans anew.
        """
        estimates = [math.exp(tree.totals[node]) for node in newest]
        max_width = min(self.width, tree.budget.max_width or self.width)
        counts = _plan_best_first(estimates, num_left, max_width, tree.num_levels_left)
        worth = sum(value for value, count in zip(estimates, counts, strict=True) if count)
        min_gain = max(self.min_gain, tree.budget.min_gain)
        return counts if worth >= min_gain else [0] * len(newest)

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
        return chosen if gain >= max(self.min_gain, tree.budget.min_gain) else []

    def finish(self, tree: GrowingTree) -> list[int]:
        """Keep the best nodes."""
        return [ROOT, *sorted([-node for _, node in tree.best])]


def _plan_best_first(
    estimates: Sequence[float], num_draws: int, max_width: int, num_levels: int
) -> list[int]:
    """Return how many of the `num_draws` most promising draws are at each of some nodes.

    Args:
        estimates: Probability that each node is reached.
        num_draws: Draws to be made at the nodes and below them.
        max_width: Most draws of one node.
        num_levels: Levels below the nodes.
    """
    counts = [0] * len(estimates)
    ties = itertools.count()
    # (-probability that it is accepted, tie, index of the node above, levels above it, place).
    heap = [
        (-estimate * draw_acceptance(0), next(ties), index, 0, 0)
        for index, estimate in enumerate(estimates)
    ]
    heapq.heapify(heap)
    for _ in range(num_draws):
        if not heap:
            break
        gain, _, index, level, place = heapq.heappop(heap)
        counts[index] += level == 0
        if place + 1 < max_width:
            ratio = draw_acceptance(place + 1) / draw_acceptance(place)
            heapq.heappush(heap, (gain * ratio, next(ties), index, level, place + 1))
        if level + 1 < num_levels:
            heapq.heappush(heap, (gain * draw_acceptance(0), next(ties), index, level + 1, 0))
    return counts
