"""What a plan says of each request: a way to draft, and the size of its draft."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, DraftBudget, source_names
from foretoken.core.jit import jit
from foretoken.core.verdict import Verdict
from foretoken.planner.base import Order, Share, StepTimes
from foretoken.planner.gains import Arm

Choice = tuple[Arm, int]
PLAIN: Choice = ((), 0)


@dataclass(slots=True)
class PlannedStep:
    """What a planned step keeps until it is over.

    Args:
        at_work: Drafters that drafted in the step before, with the request that they did it for.
        probs: Of each proposed draft, the probability that each node is reached.
        draft_ms: What drafting was expected to take.
        own_s: What planning took so far.
        arm: The way that is used.
        trial_loss: If that is not the one that the plan prefers, the part of its time that it is
            expected to waste.
        is_new: Whether the one that it prefers is another than that of the last plan.
        is_plain: Whether that is plain decoding.
    """

    at_work: set[tuple[str, str]]
    probs: list[list[float]] = field(default_factory=list)
    draft_ms: float = 0.0
    own_s: float = 0.0
    arm: Arm = ()
    trial_loss: float | None = None
    is_new: bool = False
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan for batches of one size.

    Args:
        choice: A way to draft, and the size of each draft.
        rate: Tokens per millisecond that it promises.
        plain_rate: Those of plain decoding.
    """

    choice: Choice
    rate: float
    plain_rate: float


class Seen(NamedTuple):
    """What came of a step. A tuple, because there is one of every step.

    Args:
        shares: Its requests.
        orders: Who drafted for them.
        proposed: Their drafts, nothing cut away.
        scored: What was left of them.
        verdicts: What the target said.
        times: Of the step.
    """

    shares: Sequence[Share]
    orders: Sequence[Order]
    proposed: Sequence[Draft]
    scored: Sequence[Draft]
    verdicts: Sequence[Verdict | None]
    times: StepTimes

    @property
    def num_rows(self) -> int:
        """Rows of the pass."""
        known = sum(share.num_rows for share in self.shares)
        return known + sum(draft.tree.num_draft_tokens for draft in self.scored)

    @property
    def num_tokens(self) -> int:
        """Tokens that it gave."""
        return sum(len(verdict.token_ids) for verdict in self.verdicts if verdict)

    @property
    def has_prompts(self) -> bool:
        """Whether prompts were read: times say little then about what comes after them."""
        return any(share.num_rows > 1 for share in self.shares)


@dataclass(slots=True)
class Passed:
    """What came of steps that nobody looks at, in numbers, so that nothing else of them stays.

    Args:
        shares: Their requests.
        taken: For each of them, how many tokens of its draft were taken in each step.
        num_tokens: Of each step in which somebody drafted, those of all requests.
        seconds: Of each of these steps.
        num_plain: Of the other steps.
        num_plain_tokens: Of these together.
        plain_s: Likewise.
    """

    shares: Sequence[Share]
    taken: list[list[int]]
    num_tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_plain: int = 0
    num_plain_tokens: int = 0
    plain_s: float = 0.0

    @property
    def num_steps(self) -> int:
        """All of them."""
        return len(self.seconds) + self.num_plain

    def add(self, verdicts: Sequence[Verdict | None], times: StepTimes) -> None:
        """Add a step."""
        num_tokens, has_drafts = 0, bool(times.draft_s)
        for taken, verdict in zip(self.taken, verdicts, strict=True):
            if verdict is not None:
                num_taken = len(verdict.path)
                num_tokens += 1 + num_taken
                if has_drafts:
                    taken.append(num_taken)
        if has_drafts:
            self.num_tokens.append(num_tokens)
            self.seconds.append(times.total_s)
        else:
            self.num_plain += 1
            self.num_plain_tokens += num_tokens
            self.plain_s += times.total_s


def compile_ahead() -> None:
    """Have what is compiled here compiled, or found in the cache, before a step waits for it."""
    nodes = np.zeros((1, 2, 1))
    _shares_of_best(nodes[:, 0], 1)
    _best_count(nodes[0, 0], 1, np.ones(2))


def ways_of(decoding: Sequence[Share], arms: Sequence[Arm]) -> NDArray[np.bool_]:
    """Return which requests may have all drafters of which way, [B, A]."""
    able = {
        drafters: [all(label in drafters for label in arm) for arm in arms]
        for drafters in {tuple(share.drafters) for share in decoding}
    }
    return np.array([able[tuple(share.drafters)] for share in decoding])


def who_drafts(choices: Mapping[str, Choice], beside: Sequence[str]) -> set[tuple[str, str]]:
    """Return who drafts by a plan, with the request that it is for.

    Args:
        choices: By request id.
        beside: Drafters that draft for everybody.
    """
    return {
        (label, request_id) for request_id, (arm, _) in choices.items() for label in (*arm, *beside)
    }


def with_free(size: int, draft: Draft, free: Collection[str]) -> int:
    """Return the size that a draft may have: what is certain and free comes on top of a plan's.

    Args:
        size: Nodes that the plan gives it.
        draft: What was proposed; one that is no larger has no need of more.
        free: Drafters whose nodes do not count.
    """
    if draft.tree.num_draft_tokens <= size:
        return size
    free_sources = [it for it in set(draft.source) if any(n in free for n in source_names(it))]
    return size + sum(map(draft.source.count, free_sources))


def share_out(
    shares: Sequence[Share], arm: Arm, nodes: NDArray[np.float64], num_best: int
) -> dict[str, Choice]:
    """Return for each request how many of the best nodes of all are its own.

    Args:
        shares: The requests, B.
        arm: The way to draft.
        nodes: What its nodes are worth, [B, N].
        num_best: Nodes to share out; more, where several are worth as much as the last.
    """
    sizes = _shares_of_best(nodes, num_best).tolist()
    return {
        request_id: (arm, size) if size else PLAIN
        for request_id, size in zip(ids_of(shares), sizes, strict=True)
    }


def keep_best(
    drafts: Sequence[Draft],
    probs: Sequence[Sequence[float]],
    scouts: Sequence[Collection[int]],
    num_requests: int,
    cost_ms: NDArray[np.float64],
) -> list[Draft]:
    """Return drafts with the n likeliest nodes of all of them, for the n of most tokens per time.

    Args:
        drafts: As proposed.
        probs: Of each draft, the probability that each node is reached, the root's included.
        scouts: Of each draft, the nodes that stay whatever their chances.
        num_requests: Requests that are given a token of their own.
        cost_ms: Of a step that keeps 0, 1, ... nodes beside the scouts, all there are at most.
    """
    pooled = [
        prob
        for own, kept in zip(probs, scouts, strict=True)
        for node, prob in enumerate(own)
        if node and node not in kept
    ]
    num_best, least = _best_count(np.array(pooled), num_requests, cost_ms)
    if num_best == len(pooled):
        return list(drafts)
    return [
        draft.keep(
            [node for node, prob in enumerate(own) if not node or prob >= least or node in kept]
        )
        for draft, own, kept in zip(drafts, probs, scouts, strict=True)
    ]


@jit
def _shares_of_best(nodes: NDArray[np.float64], num_best: int) -> NDArray[np.int64]:
    """Return how many of each row's nodes are among the best, those worth as much as the last."""
    least = np.sort(nodes.ravel())[nodes.size - num_best]
    sizes = np.zeros(len(nodes), np.int64)
    for row in range(len(nodes)):
        for worth in nodes[row]:
            sizes[row] += worth >= least
    return sizes


@jit
def _best_count(
    probs: NDArray[np.float64], num_requests: int, cost_ms: NDArray[np.float64]
) -> tuple[int, float]:
    """Return how many of the likeliest nodes to keep, and the probability of the last of them."""
    ascending = np.sort(probs)
    tokens = float(num_requests)
    num_best, least, best = 0, np.inf, tokens / cost_ms[0]
    for count in range(1, len(probs) + 1):
        tokens += ascending[-count]
        if tokens / cost_ms[count] > best:
            num_best, least, best = count, ascending[-count], tokens / cost_ms[count]
    return num_best, least


def longer(size: int, most: int) -> int:
    """Return how many nodes drafts have that are to be longer than a plan wants; none if it is 0.

    Args:
        size: What it wants.
        most: That a draft may have.
    """
    return min(size + 2 + size // 2, most) if size else 0


def are_ample(before: DraftBudget | None, now: DraftBudget | None, size: int) -> bool:
    """Return whether neither of two bounds of a request is one for drafts of so many nodes.

    Towards the end of a request its bounds shrink in every step, most of them far above the plan's.
    """
    if before is None or now is None:
        return False
    return min(before.max_nodes, before.max_depth, now.max_nodes, now.max_depth) >= size


def ids_of(shares: Sequence[Share]) -> list[str]:
    """Return the ids of some requests."""
    return [share.request_id for share in shares]


__all__ = [
    "PLAIN",
    "Choice",
    "Passed",
    "Plan",
    "PlannedStep",
    "Seen",
    "are_ample",
    "compile_ahead",
    "ids_of",
    "keep_best",
    "longer",
    "share_out",
    "ways_of",
    "who_drafts",
]
