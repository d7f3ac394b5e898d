"""A log of steps: what was drafted, what became of every node, and where the time went.

Source of the counts: "Decoding Speculative Decoding", arXiv:2402.01528, whose TAR (tokens per
step) counts the target's own token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from foretoken.core.draft import Draft
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Verdict
from foretoken.planner.base import FixedPlanner, PassingPlanner, Planner, Share, StepTimes

NUM_CONFIDENCE_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """One drafted token and what became of it.

    Args:
        depth: Distance from the root, >= 1.
        rank: Place among its siblings in the draft's own order, from 0.
        draft_logprob: The drafter's log-probability that it is taken once its parent is.
        is_parent_taken: Whether it was judged at all.
        is_taken: Whether the output goes on with it.
    """

    depth: int
    rank: int
    draft_logprob: float
    is_parent_taken: bool
    is_taken: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRecord:
    """One request's draft in one step.

    Args:
        request_id: Whose it is.
        nodes: Drafted tokens, the root not among them; empty in plain decoding.
        num_tokens: Tokens that the verdict gives, the target's own included.
    """

    request_id: str
    nodes: tuple[NodeRecord, ...]
    num_tokens: int

    @property
    def depth(self) -> int:
        """Longest path; 0 if nothing was drafted."""
        return max((node.depth for node in self.nodes), default=0)

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that were taken."""
        return sum(node.is_taken for node in self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of all requests that took part.

    Args:
        drafts: Of the requests that were given tokens.
        num_rows: Rows of the pass, prompts and roots included.
        num_keys: Positions that the requests' rows look back on, summed over requests.
        num_requests: Requests in the pass.
        has_prompt: Whether a part of a prompt was among the rows.
        times: Where the time went.
    """

    drafts: tuple[DraftRecord, ...]
    num_rows: int
    num_keys: int
    num_requests: int
    has_prompt: bool
    times: StepTimes

    @property
    def num_tokens(self) -> int:
        """Tokens given, all requests together."""
        return sum(draft.num_tokens for draft in self.drafts)

    @property
    def draft_s(self) -> float:
        """Seconds that drafters took to propose."""
        return math.fsum(self.times.draft_s.values())

    @property
    def other_s(self) -> float:
        """Seconds neither drafting nor in the target's pass: books, verdicts, text."""
        return self.times.total_s - self.times.pass_s - self.draft_s


@dataclass(slots=True)
class Tally:
    """How often something held.

    Args:
        count: Cases.
        num_taken: Cases in which it held.
    """

    count: int = 0
    num_taken: int = 0

    @property
    def rate(self) -> float:
        """Share of the cases; 0 if there were none."""
        return self.num_taken / self.count if self.count else 0.0

    def add(self, is_taken: bool) -> None:
        """Count a case."""
        self.count += 1
        self.num_taken += is_taken


class StepLog(PassingPlanner):
    """Leaves every decision to another planner and writes down what came of it.

    What it does itself happens after the step's clock has stopped.

    Args:
        planner: Who decides; None for everybody drafting all the time.

    Attributes:
        steps: The log, in order.
    """

    def __init__(self, planner: Planner | None = None) -> None:
        super().__init__(planner or FixedPlanner())
        self.steps: list[StepRecord] = []

    def observe(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        """Write the step down, then pass it on."""
        rows = [
            share.num_rows + draft.tree.num_draft_tokens
            for share, draft in zip(shares, scored, strict=True)
        ]
        records = [
            judge(share.request_id, draft, verdict)
            for share, draft, verdict in zip(shares, scored, verdicts, strict=True)
            if verdict is not None
        ]
        self.steps.append(
            StepRecord(
                drafts=tuple(records),
                num_rows=sum(rows),
                num_keys=sum(share.num_keys for share in shares),
                num_requests=len(shares),
                has_prompt=any(share.num_rows > 1 for share in shares),
                times=times,
            )
        )
        super().observe(shares, scored, verdicts, times)


def judge(request_id: str, draft: Draft, verdict: Verdict) -> DraftRecord:
    """Return a draft's nodes, each with what the verdict's tokens say of it."""
    tree = draft.tree
    taken = set(tree.match(verdict.token_ids))
    num_siblings: dict[int, int] = defaultdict(int)
    nodes = []
    for node, parent in enumerate(tree.parents[1:], start=1):
        nodes.append(
            NodeRecord(
                depth=tree.depths[node],
                rank=num_siblings[parent],
                draft_logprob=draft.draft_logprobs[node],
                is_parent_taken=parent == ROOT or parent in taken,
                is_taken=node in taken,
            )
        )
        num_siblings[parent] += 1
    return DraftRecord(request_id=request_id, nodes=tuple(nodes), num_tokens=len(verdict.token_ids))


def acceptance_by_depth(drafts: Iterable[DraftRecord]) -> dict[int, Tally]:
    """Return how often a level that was reached held the target's token, by depth from 1.

    A level counts if the node above it was taken and has children: rates are conditional, as
    `planner.analysis` wants them.
    """
    tallies: dict[int, Tally] = defaultdict(Tally)
    for draft in drafts:
        for depth, is_taken in _levels(draft):
            tallies[depth].add(is_taken)
    return dict(sorted(tallies.items()))


def acceptance_by_rank(drafts: Iterable[DraftRecord]) -> dict[int, Tally]:
    """Return how often the first, second, ... child of a taken node was taken, by rank from 0.

    Each rank counts the nodes that there were; drafters widen a tree where they are unsure, so
    later ranks are of harder places.
    """
    tallies: dict[int, Tally] = defaultdict(Tally)
    for node in _judged(drafts):
        tallies[node.rank].add(node.is_taken)
    return dict(sorted(tallies.items()))


def rank_acceptances(drafts: Sequence[DraftRecord]) -> list[float]:
    """Return the probability that the child of each rank is the taken one, of all taken parents.

    A rank that a parent did not have counts as not taken, so the sum is at most 1: what
    `planner.sequoia` wants.
    """
    num_levels = sum(tally.count for tally in acceptance_by_depth(drafts).values())
    by_rank = acceptance_by_rank(drafts)
    return [tally.num_taken / num_levels for tally in by_rank.values()]


def acceptance_by_confidence(drafts: Iterable[DraftRecord]) -> dict[float, Tally]:
    """Return how often nodes of like `draft_logprob` were taken, by the bin's lower bound.

    Bins are tenths of the probability; only nodes whose parent was taken count. A drafter whose
    estimates are right has rates within the bins' bounds.
    """
    tallies: dict[float, Tally] = defaultdict(Tally)
    for node in _judged(drafts):
        place = min(
            NUM_CONFIDENCE_BINS - 1, int(math.exp(node.draft_logprob) * NUM_CONFIDENCE_BINS)
        )
        tallies[place / NUM_CONFIDENCE_BINS].add(node.is_taken)
    return dict(sorted(tallies.items()))


def tallies_as_record(
    tallies: Mapping[int, Tally] | Mapping[float, Tally],
) -> dict[str, dict[str, float]]:
    """Return tallies for JSON."""
    return {
        str(key): {"count": tally.count, "num_taken": tally.num_taken, "rate": round(tally.rate, 4)}
        for key, tally in tallies.items()
    }


def _judged(drafts: Iterable[DraftRecord]) -> Iterator[NodeRecord]:
    return (node for draft in drafts for node in draft.nodes if node.is_parent_taken)


def _levels(draft: DraftRecord) -> list[tuple[int, bool]]:
    """Return each depth that was judged, and whether one of its nodes was taken."""
    levels: dict[int, bool] = {}
    for node in draft.nodes:
        if node.is_parent_taken:
            levels[node.depth] = levels.get(node.depth, False) or node.is_taken
    return list(levels.items())


__all__ = [
    "DraftRecord",
    "NodeRecord",
    "StepLog",
    "StepRecord",
    "Tally",
    "acceptance_by_confidence",
    "acceptance_by_depth",
    "acceptance_by_rank",
    "judge",
    "rank_acceptances",
    "tallies_as_record",
]
