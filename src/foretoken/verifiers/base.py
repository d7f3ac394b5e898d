"""The verifier contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import Exactness, Verdict
from foretoken.errors import ConfigError

_ALL = slice(0, None)


class TargetRows:
    """The target's logits at the nodes of one request's draft.

    Args:
        logits: Rows of the whole step, [R, V].
        argmax_ids: The largest entry of each, ties to the lowest id, [R]; computed for all at
            once, because most requests need nothing else. Empty if none needs it.
        span: Which of them are those of the draft, one per node in node order; N of them.
    """

    __slots__ = ("_all_logits", "_span", "argmax_ids")

    def __init__(self, logits: Tensor, argmax_ids: Sequence[int], span: slice = _ALL) -> None:
        self._all_logits = logits
        self._span = span
        self.argmax_ids = argmax_ids[span]  # [N]

    @property
    def logits(self) -> Tensor:
        """One row per node in node order, [N, V]."""
        return self._all_logits[self._span]

    def choose(
        self, node: int, sampler: Sampler, token_ids: Sequence[int], path: Sequence[int]
    ) -> int:
        """Return the target's own token after `node`, reached over `path`."""
        if sampler.is_argmax:
            return self.argmax_ids[node]
        return sampler.choose(self._all_logits[self._span.start + node], token_ids, path)


class Verifier(Protocol):
    """Walks a draft along the target's rows and says what stands.

    Attributes:
        exactness: How closely its output follows plain decoding, given equal logits.
        draws: Ways in which siblings may have been drawn, the preferred one first. A rule that
            compares probabilities is wrong about siblings that were drawn otherwise.
        max_width: Most children of a node; None for any number.
        max_drafters: Most drafters whose drafts may be merged for a sampled request; None for any
            number. Siblings that several sampled need a rule that can test one q after another.

    A class may also say, for `foretoken methods`, its acceptance `criterion` in a few words, and as
    `reference` the paper or work it follows.
    """

    exactness: ClassVar[Exactness]
    draws: ClassVar[tuple[SiblingDraw, ...]]
    max_width: ClassVar[int | None]
    max_drafters: ClassVar[int | None]

    def verify(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> Verdict:
        """Return the accepted path and the target's final token; at least one token in all.

        Args:
            draft: What was scored.
            rows: The target's logits at its nodes.
            sampler: Makes the request's choices.
            token_ids: Prompt and output so far; the last one is the draft's root.
        """
        ...


class NextToken(NamedTuple):
    """What a rule says after one node.

    Args:
        token_id: The target's next token.
        child: The child that carries it and stands; None if none does.
    """

    token_id: int
    child: int | None


@runtime_checkable
class NodeRule(Protocol):
    """A verifier that can settle one node by itself, before anything deeper is known.

    Where a node's final row is there long before those of its children, as in a pipeline of
    loops, there is no whole draft to verify. Rules that judge a path as a whole have no such
    entry. Settling one node after the other gives what `verify` gives in law, and for coupled
    rules in tokens.
    """

    def decide_next(
        self, draft: Draft, rows: TargetRows, sampler: Sampler, token_ids: Sequence[int]
    ) -> NextToken:
        """Return the target's next token, and the child that stands if one does.

        Args:
            draft: The root and its children, with the draws that made them in the order of
                drawing; nothing deeper.
            rows: The target's logits at the root: one row.
            sampler: Makes the request's choices.
            token_ids: Prompt and output so far; the last one is the root. A rule's dice depend on
                the request's seed and on how many these are, on nothing else.

        Raises:
            RequestError: The siblings were drawn in a way that the rule is not exact for.
        """
        ...


def as_node_rule(name: str, verifier: Verifier) -> NodeRule:
    """Return a verifier as one that settles single nodes.

    Args:
        name: As registered, for the message.
        verifier: Any.

    Raises:
        ConfigError: It judges whole drafts only.
    """
    if not isinstance(verifier, NodeRule):
        raise ConfigError(
            f"verifier {name!r} judges whole paths; drafters that draft inside the target's pass "
            f"need a rule that settles one token after the other",
            hint="use the verifier coupled, or mss for samples, or another drafter",
        )
    return verifier
