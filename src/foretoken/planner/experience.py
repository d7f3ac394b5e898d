"""What came of drafts: how likely nodes are to be emitted, and what whole drafts are worth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, source_names
from foretoken.core.verdict import Verdict
from foretoken.planner.acceptance import Acceptance, judged_nodes
from foretoken.planner.base import Order, Share, Text
from foretoken.planner.gains import Arm, Gains, temperature_class
from foretoken.planner.holding import Counts

_LUCK_DECAY = 0.98  # of a judged guess's weight in how a drafter does on one request
_LUCK_STRENGTH = 5.0  # guesses that count for it doing there as everywhere
_MOST_CERTAIN = 0.98  # nothing is taken for more certain than this
_LEAST_PROB = 1e-6  # under it nodes are as good as certain not to be taken
_BOAST_RATE = 0.05  # weight of the newest draft in how a drafter's deepest guesses are off


class _Luck:
    """How a drafter does on one request, compared with how it does on all."""

    __slots__ = ("_expected", "_taken")

    def __init__(self) -> None:
        self._taken = self._expected = 0.0

    @property
    def factor(self) -> float:
        """Guesses that were taken, per guess that was expected to be."""
        return (self._taken + _LUCK_STRENGTH) / (self._expected + _LUCK_STRENGTH)

    def learn(self, estimate: float, is_taken: bool) -> None:
        """Learn what came of a guess that was expected to be taken with some probability."""
        self._taken = _LUCK_DECAY * self._taken + is_taken
        self._expected = _LUCK_DECAY * self._expected + estimate


class Experience:
    """Estimates nodes and drafts from what became of earlier ones; all of it fades.

    Args:
        arms: Ways to draft.
        labels: All drafters, those that are in no way to draft included.
        max_nodes: N, most nodes of a draft.
        first_guess: For each drafter of the arms, how often its first guess is taken, as far as
            known before.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        labels: Sequence[str],
        max_nodes: int,
        first_guess: Mapping[str, float],
    ) -> None:
        self._arms = arms
        self._max_nodes = max_nodes
        self._labels = frozenset(labels)
        # By the names that nodes carry: those of inner drafters join as they come.
        self._acceptance = defaultdict(Acceptance, {label: Acceptance() for label in labels})
        self._gains = Gains(arms, max_nodes, first_guess)
        self._luck: dict[tuple[str, str], _Luck] = {}
        self._boast: defaultdict[str, float] = defaultdict(float)  # logarithms

    def boast(self, label: str) -> float:
        """Return what a drafter says its deepest guesses are worth, per token they are worth."""
        return math.exp(self._boast[label])

    def path_probs(self, share: Share, draft: Draft) -> list[float]:
        """Return the probability that each node of a request's draft is reached, [N]."""
        tree, logprobs = draft.tree, draft.draft_logprobs
        depths, parents = tree.depths, tree.parents
        probs, rank = [1.0] * len(tree), [0] * len(tree)
        known: dict[str, list[tuple[Acceptance, float]]] = {}  # most nodes are of few sources
        for node in range(1, len(tree)):
            source, parent = draft.source[node], parents[node]
            if source not in known:
                known[source] = self._estimators(share.request_id, source)
            estimates = [
                factor * acceptance.estimate(depths[node], rank[parent], logprobs[node])
                for acceptance, factor in known[source]
            ]
            probs[node] = probs[parent] * min(_MOST_CERTAIN, max(estimates))
            rank[parent] += 1
        return probs

    def cut(self, share: Share, draft: Draft, size: int) -> Draft:
        """Return a request's draft with its likeliest nodes, the root and so many more at most."""
        if draft.tree.num_draft_tokens <= size:
            return draft
        probs = () if draft.tree.is_chain else self.path_probs(share, draft)
        return draft.keep(draft.tree.top_nodes(probs, size))

    def _estimators(self, request_id: str, source: str) -> list[tuple[Acceptance, float]]:
        """Return what estimates the nodes of a source, and how it does on a request."""
        found = []
        for label in source_names(source):
            luck = self._luck.get((request_id, label))
            found.append((self._acceptance[label], 1.0 if luck is None else luck.factor))
        return found

    def gains(self, shares: Sequence[Share]) -> NDArray[np.float64]:
        """Return what the nodes of drafts are worth for some requests, best first, [B, A, N]."""
        return self._gains.of([_request(share) for share in shares])

    def learn(
        self,
        share: Share,
        order: Order,
        draft: Draft,
        probs: Sequence[float],
        verdict: Verdict,
    ) -> None:
        """Learn from one draft of one request.

        Args:
            share: Whose it is.
            order: Who drafted, within which bounds.
            draft: What they proposed together, nothing cut away.
            probs: What `path_probs` said of it.
            verdict: What the target said.
        """
        self.judge(share, order, draft, verdict)
        sources = [source_names(name) for name in draft.source]
        self._learn_boasts(sources, draft, probs)
        # Nodes of drafters made of others carry the inner names; they are of who gives no own.
        given = {name for names in sources for name in names}
        silent = [label for label in order if label not in given]
        sources = [
            names if self._labels.issuperset(names) else [*names, *silent] for names in sources
        ]
        for index, arm in enumerate(self._arms):
            if all(label in order for label in arm):
                own = [
                    prob
                    for names, prob in zip(sources, probs, strict=True)
                    if any(label in names for label in arm)
                ]
                worth = np.array(sorted(own, reverse=True))
                num_asked = max(order[label].max_nodes for label in arm)
                self._gains.learn(_request(share), index, worth, min(num_asked, self._max_nodes))

    def learn_all(
        self,
        shares: Sequence[Share],
        orders: Sequence[Order],
        drafts: Sequence[Draft],
        probs: Sequence[Sequence[float]],
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Learn from the drafts of a step; arguments as for `learn`, of all requests."""
        for share, order, draft, own, verdict in zip(
            shares, orders, drafts, probs, verdicts, strict=True
        ):
            if verdict is not None and order:
                self.learn(share, order, draft, own, verdict)

    def judge(self, share: Share, order: Order, draft: Draft, verdict: Verdict) -> None:
        """Learn which guesses of a draft were right; arguments as for `learn`."""
        for label in order:
            self._acceptance[label].fade()
        for node, depth, rank, is_taken in judged_nodes(draft, verdict.token_ids):
            logprob = draft.draft_logprobs[node]
            for label in source_names(draft.source[node]):
                acceptance = self._acceptance[label]
                luck = self._luck.get((share.request_id, label))
                if luck is None:
                    luck = self._luck[share.request_id, label] = _Luck()
                luck.learn(acceptance.estimate(depth, rank, logprob), is_taken)
                acceptance.learn(depth, rank, logprob, is_taken)

    def judge_all(
        self,
        shares: Sequence[Share],
        orders: Sequence[Order],
        drafts: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
    ) -> None:
        """Learn which guesses of a step were right; arguments as for `learn`, of all requests."""
        for share, order, draft, verdict in zip(shares, orders, drafts, verdicts, strict=True):
            if verdict is not None and order:
                self.judge(share, order, draft, verdict)

    def learn_counts(self, request_id: str, arm: Arm, size: int, counts: Counts) -> None:
        """Learn how many tokens the drafts of some steps gave a request.

        Each drafter of a union is worth what it would have given: two that copy the same are both
        worth all of it.

        Args:
            request_id: Whose they were.
            arm: How they were drafted.
            size: Most nodes of each, at least one.
            counts: What came of them; nothing is learned of a request that may not have them all.
        """
        if not all(label in counts.drafters for label in arm):
            return
        size = min(size, self._max_nodes)
        parts = arm if len(arm) > 1 else ()
        taken = {arm: counts.taken} | {(label,): counts.alone[label] for label in parts}
        request = request_id, temperature_class(counts.temperature)
        for way, tally in taken.items():
            index, num_steps = self._arms.index(way), counts.num_steps
            factor = self._gains.learn_count(
                request, index, size, num_steps, tally.num_taken, tally.num_squares
            )
            if way == arm:
                for label in arm:  # guesses that are worth more than was thought boast less
                    self._boast[label] -= math.log(factor)

    def learn_text(self, text: Text, label: str, counts: NDArray[np.int64]) -> float:
        """Learn what a drafter would have given alone along a text, whatever was used for it.

        Args:
            text: Of a request.
            label: The drafter.
            counts: Its drafts, at least one, and those of which each node was taken, [1 + N].

        Returns:
            How many tokens more a draft is worth to others than before.
        """
        arm = self._arms.index((label,))
        return self._gains.learn_text(_request(text), arm, counts)

    def learn_difference(
        self, text: Text, label: str, other: str, parts: NDArray[np.float64]
    ) -> None:
        """Have a drafter be worth what another one is worth, but for a difference.

        Args:
            text: Of a request.
            label: The drafter.
            other: The one that it is compared with, of which a text has been learned.
            parts: Of each node, as for `Gains.learn_difference`, [N].
        """
        arm, than = self._arms.index((label,)), self._arms.index((other,))
        self._gains.learn_difference(_request(text), arm, than, parts)

    def _learn_boasts(
        self, sources: Sequence[Sequence[str]], draft: Draft, probs: Sequence[float]
    ) -> None:
        depths, claims = draft.tree.depths, draft.path_logprobs()
        deepest: dict[str, int] = {}
        for node, names in enumerate(sources):
            for label in names:
                if depths[node] >= depths[deepest.setdefault(label, node)]:
                    deepest[label] = node
        for label, node in deepest.items():
            off = claims[node] - math.log(max(probs[node], _LEAST_PROB))
            self._boast[label] += _BOAST_RATE * (off - self._boast[label])

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended; what it taught about others stays."""
        self._gains.forget(request_id)
        for label in self._acceptance:
            self._luck.pop((request_id, label), None)


def _request(share: Share | Text) -> tuple[str, int]:
    return share.request_id, temperature_class(share.temperature)


__all__ = ["Experience"]
