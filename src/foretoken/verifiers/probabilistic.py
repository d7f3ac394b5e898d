"""What all rules share that decide by probabilities: refusals, the greedy case, the verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from foretoken.core.draft import Draft, Draws, SiblingDraw
from foretoken.core.noise import Stream
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT, TokenTree
from foretoken.core.verdict import Exactness, FinalKind, Verdict
from foretoken.errors import RequestError
from foretoken.verifiers.base import NextToken, TargetRows
from foretoken.verifiers.dice import Dice, GeneratorDice, Probs
from foretoken.verifiers.walk import choose_next, follow_target

TargetProbs = Callable[[int], Probs]
"""Maps a node to the target's distribution of the token after it, every control applied.

The same array each time, not to be written to.
"""

_SAMPLED = (SiblingDraw.IID, SiblingDraw.WITHOUT_REPLACEMENT)


class Decision(NamedTuple):
    """Where a rule ended.

    Args:
        node: The last accepted node; the root if nothing was.
        final_id: The target's own token after it.
    """

    node: int
    final_id: int


class ProbabilisticVerifier(ABC):
    """Base of rules that look at the target's probabilities and roll dice of their own.

    The dice of a step depend on the request's seed and on how many tokens it has, on nothing
    else: neither on what the drafters drew nor on other requests. With temperature 0 the rule is
    greedy verification and takes every draft.

    Attributes:
        name: As registered, for messages.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness] = Exactness.DISTRIBUTION
    draws: ClassVar[tuple[SiblingDraw, ...]]
    max_width: ClassVar[int | None] = None
    max_drafters: ClassVar[int | None] = None

    @abstractmethod
    def decide(self, draft: Draft, target_probs: TargetProbs, dice: Dice) -> Decision:
        """Return where the rule ends; the draft is one that it takes."""

    def verify(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> Verdict:
        """Return what the rule keeps of a draft.

        Raises:
            RequestError: The draft's siblings were drawn in a way that the rule is not exact for.
        """
        if sampler.is_greedy:
            return follow_target(draft.tree, rows, sampler, token_ids)
        self.check(draft)
        target_probs = _Target(draft.tree, rows, sampler, token_ids)
        decision = self.decide(draft, target_probs, dice_of(sampler, token_ids))
        target_probs.report_failure(decision.node)
        return as_verdict(draft.tree, decision)

    def check(self, draft: Draft) -> None:
        """Refuse drafts about which the rule would be wrong; an empty one never is.

        Raises:
            RequestError: See `verify`.
        """
        if not draft.tree.num_draft_tokens:
            return
        if draft.siblings not in self.draws:
            allowed = " or ".join(way.value for way in self.draws)
            raise self._refusal(f"siblings drawn as {allowed}", f"{draft.siblings.value} ones")
        widest = max(map(len, draft.tree.children))
        if self.max_width is not None and widest > self.max_width:
            raise self._refusal(
                f"at most {self.max_width} child per node", f"a node with {widest} children"
            )
        if draft.siblings in _SAMPLED:
            self._check_draws(draft)

    def _check_draws(self, draft: Draft) -> None:
        for node, children in enumerate(draft.tree.children):
            groups = draft.draws.get(node, ())
            drawn = {child for group in groups for child in group.nodes}
            if drawn != set(children):
                raise self._refusal(
                    "sampled siblings with the draws that made them",
                    f"children {list(children)} of node {node} with draws of {sorted(drawn)}",
                )
            if self.max_drafters is not None and len(groups) > self.max_drafters:
                raise self._refusal(
                    f"siblings sampled by {self.max_drafters} drafter",
                    f"those of {len(groups)} at node {node}",
                )
            num_draws = sum(len(group.nodes) for group in groups)
            if self.max_width is not None and num_draws > self.max_width:
                raise self._refusal(
                    f"at most {self.max_width} draw per node", f"{num_draws} at node {node}"
                )
            for group in groups:
                self._check_group(draft, group)

    def _check_group(self, draft: Draft, group: Draws) -> None:
        token_ids = [draft.tree.token_ids[child] for child in group.nodes]
        if not (group.probs[token_ids] > 0).all():
            raise self._refusal(
                "draws from the distribution that stands beside them",
                f"tokens {token_ids}, some of probability 0",
            )
        is_repeated = len(set(token_ids)) < len(token_ids)
        if is_repeated and draft.siblings is SiblingDraw.WITHOUT_REPLACEMENT:
            raise self._refusal("different tokens without replacement", f"draws of {token_ids}")

    def _refusal(self, allowed: str, got: str) -> RequestError:
        return RequestError(
            f"verifier {self.name!r} takes {allowed}; got {got}",
            hint="use the verifier coupled, which takes every draft, or another drafter",
        )


class NodewiseVerifier(ProbabilisticVerifier):
    """Base of rules that settle one node after the other, from the root down.

    What happens at a node depends on the target's distribution there and on the draws that made
    its children, on nothing deeper.
    """

    def decide(self, draft: Draft, target_probs: TargetProbs, dice: Dice) -> Decision:
        """Descend until no draw is accepted."""
        node = ROOT
        while True:
            token_id, child = self.settle(draft, node, target_probs(node), dice)
            if child is None:
                return Decision(node, token_id)
            node = child

    def decide_next(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> NextToken:
        """Settle the root of a draft; see `NodeRule`.

        Raises:
            RequestError: The siblings were drawn in a way that the rule is not exact for.
        """
        if sampler.is_greedy:
            return choose_next(draft.tree, rows, sampler, token_ids)
        self.check(draft)
        target_probs = sampler.distribution(rows.logits[ROOT], token_ids)
        return self.settle(draft, ROOT, target_probs, dice_of(sampler, token_ids))

    def settle(self, draft: Draft, node: int, target_probs: Probs, dice: Dice) -> NextToken:
        """Return the token after a node, and the child that stands if one does."""
        child, rest = self._test_draws(draft, node, target_probs, dice)
        if child is None:
            return NextToken(dice.draw(rest), None)
        return NextToken(draft.tree.token_ids[child], child)

    @staticmethod
    @abstractmethod
    def _test_draws(
        draft: Draft, node: int, target_probs: Probs, dice: Dice
    ) -> tuple[int | None, Probs]:
        """Return the accepted child, or None and the distribution of the final token."""


class _Target:
    """The target's distributions at the nodes of a draft, computed when they are asked for.

    Some rules look at nodes that plain decoding would not have come to. If a control of the
    request's own fails there, nothing has happened.
    """

    def __init__(
        self, tree: TokenTree, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> None:
        self._tree = tree
        self._rows = rows
        self._sampler = sampler
        self._token_ids = token_ids
        self._known: dict[int, Probs] = {}
        self._failures: dict[int, tuple[RequestError, int]] = {}

    def __call__(self, node: int) -> Probs:
        if node not in self._known:
            sampler, path = self._sampler, self._tree.sequence(node)[1:]
            probs = sampler.distribution(self._rows.logits[node], self._token_ids, path)
            self._known[node] = probs
            if sampler.failure is not None and sampler.failed_at is not None:
                self._failures[node] = sampler.failure, sampler.failed_at
                sampler.failure = sampler.failed_at = None
        return self._known[node]

    def report_failure(self, node: int) -> None:
        """Let the sampler know of a failure on the way to a node, which decoding did come to."""
        for step in self._tree.path(node):
            if step in self._failures:
                self._sampler.fail(*self._failures[step])


def dice_of(sampler: Sampler, token_ids: Sequence[int]) -> Dice:
    """Return the dice of what follows some tokens of a request."""
    return GeneratorDice(sampler.generator(Stream.VERIFY, len(token_ids)))


def as_verdict(tree: TokenTree, decision: Decision) -> Verdict:
    """Return the verdict that a decision stands for."""
    node, final_id = decision
    accepted = tree.path(node)[1:]
    return Verdict(
        tuple(accepted),
        (*(tree.token_ids[step] for step in accepted), final_id),
        FinalKind.RECOVERED if tree.children[node] else FinalKind.BONUS,
    )
