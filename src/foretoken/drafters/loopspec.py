"""LoopSpec: two guesses per row in flight, the second one where the row changed its mind.

A row of a looped model is asked what it would say after d1 loops and again after d2. With p_d its
distribution after d loops, p that after the last one, and norm(.)+ as in `docs/verifiers.md`:

    x1 ~ q1 = p_d1,   and if p_d2(x1) < q1(x1)   x2 ~ q2 = norm((p_d2 - q1)+)
    x1 is accepted with probability min(1, p(x1) / q1(x1)), else rho = norm((p - q1)+);
    x2 is accepted with probability min(1, rho(x2) / q2(x2)), else the token is from
    norm((rho - q2)+), or from rho where there was no x2

which is recursive rejection over the draws x1 and x2, in this order, each with its own q.

**Why the gate does no harm.** x1 is a fresh sample of q1, and whether it is accepted depends on
x1, p and a die that nothing else sees. Given x1 and that it was rejected, the token has to be
from rho, and it is, whether x2 is offered (a fresh sample of q2, tested against rho) or not. So x2
may be offered by any rule that looks at x1, p_d1, p_d2 and whatever else was settled before x2
was drawn; what it may not look at is x2 itself, or the verifier's dice. This holds for rules that
test one draw after the other without counting them: a rule whose first test depends on how many
draws there are (`k-seq`) would be biased, since here their number depends on the first.

The gate is there because a token that became likelier since d1 is the one that p will accept:
where it is closed, x2 would be spent on a token that is hardly ever asked for. Where it is open
q2(x1) = 0, so the two always differ. Pr[both rejected] <= TV(p_d2, p) without the gate, and at
most twice that with it.

Below each of the two rows the same goes on. What is drawn depends on the request's seed, the
position and the depth alone: not on how many rows there is room for, so that neither do the
tokens that come out.

Greedy requests, and rules that do not compare probabilities: x1 is the target's choice if the row
ended after d1 loops, by the race of its position, and x2 that after d2 if it is another one.

Source: LoopSpec, arXiv:2609.17184. Its ancestor, with one guess and greedy, is SPEED (Hooper et
al. 2023, arXiv:2310.12072).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foretoken.core.checks import check_int
from foretoken.core.draft import SiblingDraw
from foretoken.core.drawing import draw_iid
from foretoken.core.residual import Probs, residual
from foretoken.drafters.base import DrafterHost, DrafterNeeds, Taxonomy
from foretoken.drafters.exits import Exits, GuessRecord, best_exits, typical_disagreement
from foretoken.drafters.in_flight import (
    Growth,
    Guess,
    InFlightDrafter,
    InFlightNode,
    early_choices,
)
from foretoken.errors import ConfigError, UnsupportedModelError

_SAMPLED = (SiblingDraw.IID, SiblingDraw.WITHOUT_REPLACEMENT)
_LEAST_SEEN = 16  # guesses per depth before the best exits are looked for
_PROBE_EVERY = 16  # ticks, after that: what is best changes with the text


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSpecOptions:
    """Options of `loopspec`.

    Args:
        first_exit: Loops after which a row is first asked for the next token, d1. None chooses:
            by what is typical, and for greedy and coupled requests by what is observed.
        second_exit: Loops after which it is asked again, d2; 0 is never, None chooses.
        max_in_flight: Most rows of one request in flight at once; None for twice what one
            guess per row could fill.
    """

    first_exit: int | None = None
    second_exit: int | None = None
    max_in_flight: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("first_exit", 1), ("second_exit", 0), ("max_in_flight", 1)):
            if (value := getattr(self, name)) is not None:
                check_int(f"loopspec:{name}", value, least)
        if self.first_exit and self.second_exit and self.second_exit <= self.first_exit:
            raise ConfigError(
                f"loopspec:second_exit is 0 or above first_exit={self.first_exit}; "
                f"got {self.second_exit}",
                hint="use 0 for one guess per row",
            )


class LoopSpecDrafter(InFlightDrafter):
    """Guesses after d1 loops, and once more after d2 where the row changed its mind.

    Args:
        options: Checked.
        loops: Of the target, G >= 2.

    Raises:
        ConfigError: An exit is not below G.
    """

    Options = LoopSpecOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="target itself (unfinished loops)",
        is_trained=False,
        termination="adaptive",
        structure="tree",
        reference="LoopSpec, arXiv:2609.17184",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(SiblingDraw)
    is_eager = False

    def __init__(self, options: LoopSpecOptions, loops: int) -> None:
        last = max(options.first_exit or 1, options.second_exit or 0)
        if last >= loops:
            raise ConfigError(
                f"loopspec asks rows after {last} loops; the target has {loops}",
                hint="use first_exit and second_exit below the number of loops",
            )
        self.needs = DrafterNeeds(in_flight=True)
        self._options = options
        self._loops = loops
        self._record = GuessRecord(loops)
        self._num_ticks = 0
        # Where samples decide what is said, exits must not follow what other requests do.
        self._fixed = self._exits = self._best(typical_disagreement)
        self._learns = None in (options.first_exit, options.second_exit)
        self.width = 1 if options.second_exit == 0 or loops == 2 else 2
        self.exit_loop = self._fixed.first
        self.max_in_flight = options.max_in_flight or 2 * -(-loops // self._fixed.first)

    @classmethod
    def create(cls, options: LoopSpecOptions, host: DrafterHost) -> LoopSpecDrafter:
        """Build for the target.

        Raises:
            UnsupportedModelError: The target does not run a group of layers several times.
            ConfigError: An exit is not below its loops.
        """
        shape = host.target.info.loops
        if shape is None or shape.loops < 2:
            raise UnsupportedModelError(
                f"loopspec needs a target that runs a group of layers several times; "
                f"{host.target.info.name!r} has other weights at each depth",
                hint="use early-exit, layer-skip, suffix, prompt-lookup or draft-model instead",
            )
        return cls(options, shape.loops)

    def stop(self, request_id: str) -> None:
        """Forget a request."""
        self._record.forget(request_id)

    def looks(self, exit_loop: int) -> frozenset[int]:  # the exits are its own
        """Return the exits; every depth now and then, to learn which exits are best."""
        self._num_ticks += 1
        is_new = self._record.num_seen < _LEAST_SEEN
        if self._learns and (is_new or self._num_ticks % _PROBE_EVERY == 0):
            return frozenset(range(1, self._loops))
        exits = (self._fixed, self._exits)
        return frozenset(depth for it in exits for depth in (it.first, it.second) if depth)

    def grow(
        self,
        nodes: Sequence[InFlightNode],
        logits: Tensor,  # [F, V]
        exit_loop: int,
    ) -> list[Growth]:
        """Return the guesses of rows that are at an exit."""
        chosen = [at for at, node in enumerate(nodes) if node.siblings not in _SAMPLED]
        best_ids = dict(
            zip(chosen, early_choices([nodes[at] for at in chosen], logits[chosen]), strict=True)
        )
        self._learn([(nodes[at], best_id) for at, best_id in best_ids.items()])
        return [
            _with_choice(node, best_ids[at], self._exits)
            if at in best_ids
            else _with_sample(node, logits[at], self._fixed)
            for at, node in enumerate(nodes)
        ]

    def _learn(self, guesses: Sequence[tuple[InFlightNode, int | None]]) -> None:
        """Hold earlier guesses against what was said since, and remember these."""
        if not self._learns:
            return
        for request_id, token_ids in {it.request_id: it.token_ids for it, _ in guesses}.items():
            self._record.settle(request_id, token_ids)
        for node, best_id in guesses:
            if best_id is not None:
                self._record.note(
                    node.request_id, len(node.token_ids), node.path, node.depth, best_id
                )
        if self._record.num_seen >= _LEAST_SEEN and self._num_ticks % _PROBE_EVERY == 0:
            self._exits = self._best(self._record.disagreement)

    def _best(self, disagreement: Callable[[int], float]) -> Exits:
        options = self._options
        return best_exits(disagreement, self._loops, options.first_exit, options.second_exit)


def second_probs(later: Probs, earlier: Probs, first_id: int) -> Probs | None:
    """Return what a second token is drawn from, q2 = norm((p_d2 - q1)+); None if none is to be.

    Args:
        later: p_d2, [V].
        earlier: q1, [V].
        first_id: x1, drawn from q1.
    """
    is_open = later[first_id] < earlier[first_id]
    return residual(later, earlier) if is_open else None


def _with_choice(node: InFlightNode, best_id: int | None, exits: Exits) -> Growth:
    """Return the likeliest token as the first guess, or beside it if it is another one now."""
    if best_id is None or node.depth not in (exits.first, exits.second):
        return Growth(None, best_id)
    said = node.guesses[:1] if node.depth == exits.second else ()
    if any(guess.token_id == best_id for guess in said):
        return Growth(None, best_id)
    return Growth((*said, Guess(best_id)), best_id)


def _with_sample(node: InFlightNode, row: Tensor, exits: Exits) -> Growth:
    """Return a first sample, or one of what has become likelier since, beside those that stand."""
    probs = _draw_from(node, row, exits)
    if probs is None:
        return Growth(None)
    [token_id] = draw_iid(probs, 1, node.generator())
    return Growth((*node.guesses, Guess(token_id, probs)))


def _draw_from(node: InFlightNode, row: Tensor, exits: Exits) -> Probs | None:
    """Return q1 at the first exit and q2 at the second; None if nothing is to be drawn."""
    if node.depth not in (exits.first, exits.second):
        return None
    probs: Probs = node.sampler.draft_distribution(row, node.token_ids, node.path)
    if not probs.any():
        return None
    if node.depth == exits.first:
        return probs
    first = node.guesses[-1] if node.guesses else None
    if first is None or first.probs is None:
        return None
    return second_probs(probs, first.probs, first.token_id)
