"""What becomes final in a tick: from a request's root downward, as far as rows are final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from foretoken.core.draft import Draft, Draws, SiblingDraw
from foretoken.core.tree import NO_PARENT, ROOT, TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.engine.in_flight import Flight, Node
from foretoken.engine.logprobs import TokenLogprobs, output_logprobs
from foretoken.engine.request import Emission
from foretoken.errors import RequestError
from foretoken.models.cache import KVCache
from foretoken.verifiers.base import NodeRule, TargetRows


@dataclass(frozen=True, slots=True)
class TickRows:
    """Logits that a tick gave: of rows that have become final, and of some that have not.

    Args:
        logits: The final rows first, then the early ones, [rows, V].
        final: Place of each final row.
        largest_ids: Of each final row, its largest logit; empty if nobody wants them.
        early: Rows that are looked at early, each with the flight that it belongs to.
    """

    logits: Tensor
    final: dict[Node, int]
    largest_ids: Sequence[int]
    early: Sequence[tuple[Flight, Node]]

    def target_rows(self, node: Node) -> TargetRows:
        """Return the logits of one final row."""
        place = self.final[node]
        return TargetRows(self.logits, self.largest_ids, slice(place, place + 1))


@dataclass(slots=True)
class Walk:
    """What became final of one request in a tick, from its root downward.

    Args:
        flight: Its rows.
        asked: Drafters that were asked what to put below the first root.
        final: The rows that stand now.
        left: All rows that have left, the first root first, each with its parent.
        token_ids: The target's next token after each of the final rows.
        emissions: What the request got.
    """

    flight: Flight
    asked: tuple[str, ...]
    final: list[Node] = field(default_factory=list)
    left: list[Node] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    emissions: list[Emission] = field(default_factory=list)

    def judged(self) -> tuple[Draft, Verdict]:
        """Return the rows that have left as a draft, and what stands of them as its verdict."""
        index = {node: place for place, node in enumerate(self.left)}
        parents = [index[node.parent] for node in self.left[1:] if node.parent is not None]
        draft = Draft(
            tree=TokenTree(tuple(node.token_id for node in self.left), (NO_PARENT, *parents)),
            siblings=SiblingDraw.DETERMINISTIC,
            source=("", *(node.source for node in self.left[1:])),
            draft_logprobs=(0.0,) * len(self.left),
        )
        path = tuple(index[node] for node in self.final[1:])
        is_leaf = not draft.tree.children[path[-1] if path else ROOT]
        kind = FinalKind.BONUS if is_leaf else FinalKind.RECOVERED
        return draft, Verdict(path, tuple(self.token_ids), kind)

    def settled(self, num_loops: int) -> list[tuple[int, int]]:
        """Return since which depth each final row has led to its token, as `right_since`."""
        found = (
            right_since(node, token_id, num_loops)
            for node, token_id in zip(self.final, self.token_ids, strict=True)
        )
        return [since for since in found if since is not None]


def walk_down(
    flight: Flight, rows: TickRows, rule: NodeRule, siblings: SiblingDraw, cache: KVCache
) -> Walk:
    """Give a request the tokens that follow from its final rows; its cache moves on with it.

    Args:
        flight: Its rows, of which the root may be final.
        rows: The logits.
        rule: Says what comes after a row.
        siblings: How guesses of sampled requests were drawn.
        cache: The target's.
    """
    walk, request = Walk(flight, flight.asked), flight.request
    while flight.nodes and flight.root in rows.final:
        root = flight.root
        token_id = _decide(flight, rows, rule, siblings)
        if token_id is None:
            if request.sampler.failure is not None:
                walk.emissions.append(request.fail(request.sampler.failure))
            break
        child = flight.child(root, token_id)
        left = flight.go_on(child)
        walk.final.append(root)
        walk.left += left
        walk.token_ids.append(token_id)
        walk.emissions.append(_take(flight, rows.target_rows(root), token_id, child, left))
        if request.finish_reason is not None:
            request.stats.add_drafted([node.source for node in flight.nodes[1:]])
        elif child is None:
            flight.restart()
        else:
            continue
        break
    if walk.final:
        flight.settle(cache, walk.final)
    return walk


def _decide(flight: Flight, rows: TickRows, rule: NodeRule, siblings: SiblingDraw) -> int | None:
    """Return the target's token after the root; None if something of the request's failed."""
    request, root = flight.request, flight.root
    if request.sampler.is_greedy:
        siblings = SiblingDraw.DETERMINISTIC
    try:
        return rule.decide_next(
            choices_after(root, siblings),
            rows.target_rows(root),
            request.sampler,
            request.token_ids,
        ).token_id
    except RequestError as error:
        request.sampler.fail(error, len(request.token_ids))
        return None


def _take(
    flight: Flight, row: TargetRows, token_id: int, child: Node | None, left: Sequence[Node]
) -> Emission:
    """Let a request have its next token; the rows that left with its root are judged now."""
    request = flight.request
    logprobs: list[TokenLogprobs] = []
    if request.params.logprobs is not None:
        verdict = Verdict((), (token_id,), FinalKind.BONUS)
        logprobs = output_logprobs(
            row.logits, verdict, request.sampler, request.params, request.token_ids
        )
    judged = [node.source for node in left[1:]] + ([child.source] if child else [])
    return request.take(
        [token_id], [child.source if child else ""], judged, logprobs, is_pass=False
    )


def choices_after(node: Node, siblings: SiblingDraw) -> Draft:
    """Return a row with all that was guessed to come after it, as a draft for one decision.

    Guesses are part of it whether they have a row in flight or not.
    """
    place_of: dict[int, int] = {}
    for guess in node.guesses:
        place_of.setdefault(guess.token_id, 1 + len(place_of))
    draws = tuple(
        Draws(nodes=(place_of[guess.token_id],), probs=guess.probs)
        for guess in node.guesses
        if guess.probs is not None
    )
    return Draft(
        tree=TokenTree((node.token_id, *place_of), (NO_PARENT, *[ROOT] * len(place_of))),
        siblings=siblings,
        source=("", *[""] * len(place_of)),
        draft_logprobs=(0.0,) * (1 + len(place_of)),
        draws={ROOT: draws} if draws else {},
    )


def right_since(node: Node, token_id: int, num_loops: int) -> tuple[int, int] | None:
    """Return the least and the most depth from which a row may have led to its final token.

    Args:
        node: A row whose final token is known.
        token_id: That token.
        num_loops: G, the depth at which every row leads to it.

    Returns:
        None if the row was never looked at before.
    """
    least, most = 1, num_loops
    for depth, best_id in node.looks:
        if best_id != token_id:
            least, most = depth + 1, num_loops
        elif most == num_loops:
            most = depth
    return (least, most) if node.looks else None
