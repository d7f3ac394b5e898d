"""Lookahead decoding: n-grams from Jacobi iterations that run in the same pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.core.tree import NO_PARENT, ROOT, TokenTree
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Outcome,
    RequestView,
    Taxonomy,
)
from foretoken.errors import ConfigError

# How often a token right below the root, and a deeper one, is what the target says, as found with
# the included target: of an n-gram, and of the window.
_NGRAM_LOGPROBS = (math.log(0.2), math.log(0.4))
_GUESS_LOGPROBS = (math.log(0.03), math.log(0.1))
_MAX_KEYS = 4096  # first tokens that a pool knows n-grams of; the least recently used go
_HASH = 2654435761  # Knuth's multiplier: spreads places over a text

_ROOMY = 16  # draft tokens from which on trigrams give more tokens per step than bigrams

Column = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadOptions:
    """Options of `lookahead`.

    Args:
        window: Most columns, W: guesses that are refined side by side.
        ngram: Tokens of an n-gram, N; a column holds N - 1 guesses. None is 3, or 2 for requests
            whose first draft may have fewer than 16 tokens.
        candidates: Most n-grams that are kept of one first token, and drafted in one step, G.
    """

    window: int = 16
    ngram: int | None = None
    candidates: int = 8

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ngram", 2), ("candidates", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 64:
                raise ConfigError(
                    f"lookahead:{name} is from {least} to 64; got {value}", hint=f"change {name}"
                )


class NgramPool:
    """The latest n-grams of each first token; those least recently used go.

    Args:
        max_per_token: Most n-grams kept of one first token.
    """

    def __init__(self, max_per_token: int) -> None:
        self._max_per_token = max_per_token
        self._rests: dict[int, dict[tuple[int, ...], None]] = {}  # the newest come last

    def add(self, ngram: Sequence[int]) -> None:
        """Add an n-gram, or make it the newest one."""
        first, rest = ngram[0], tuple(ngram[1:])
        rests = self._rests.pop(first, {})
        rests.pop(rest, None)
        rests[rest] = None
        if len(rests) > self._max_per_token:
            del rests[next(iter(rests))]
        self._rests[first] = rests
        if len(self._rests) > _MAX_KEYS:
            del self._rests[next(iter(self._rests))]

    def after(self, first: int) -> list[tuple[int, ...]]:
        """Return what follows a token in its n-grams, the newest first."""
        return list(self._rests.get(first, ()))[::-1]


class _Branches:
    """The tree of a draft, which grows by whole paths as long as they fit the budget."""

    def __init__(self, root_id: int, budget: DraftBudget) -> None:
        self.token_ids, self.parents, self.logprobs = [root_id], [NO_PARENT], [0.0]
        self._budget = budget
        self._children: list[dict[int, int]] = [{}]

    def add(self, path: Sequence[int], logprobs: tuple[float, float]) -> int | None:
        """Return the last node of a path below the root; None if it does not fit.

        Args:
            path: Token ids.
            logprobs: Estimates of a node right below the root and of deeper ones. A node that
                several paths share keeps the first one's.
        """
        node, depth = ROOT, 0
        while depth < len(path) and path[depth] in self._children[node]:
            node = self._children[node][path[depth]]
            depth += 1
        budget, rest = self._budget, path[depth:]
        if rest and (
            len(path) > budget.max_depth
            or len(self.token_ids) - 1 + len(rest) > budget.max_nodes
            or len(self._children[node]) == budget.max_width
        ):
            return None
        for token_id in rest:
            self._children[node][token_id] = len(self.token_ids)
            self._children.append({})
            self.parents.append(node)
            node = len(self.token_ids)
            self.token_ids.append(token_id)
            self.logprobs.append(logprobs[self.parents[-1] != ROOT])
        return node


@dataclass(slots=True)
class _Search:
    """A request's Jacobi iteration.

    Args:
        pool: N-grams it has found.
        ngram: Tokens of each, N; 0 until the first draft.
        columns: Guesses, [W][levels]; level j of column i stands i + j places behind the root.
            The first column begins with the root.
        drafted: The columns as last drafted, in whole or up to one that had no room.
    """

    pool: NgramPool
    ngram: int
    columns: list[Column] = field(default_factory=list)
    drafted: list[Column] = field(default_factory=list)

    def window(self, token_ids: Sequence[int], num_columns: int) -> list[Column]:
        """Return the columns below the last token, those that are missing filled from the text."""
        num_levels = len(self.columns[0]) if self.columns else 1
        columns = list(self.columns)
        for index in range(len(columns), num_columns):
            places = (len(token_ids) + index * num_levels + level for level in range(num_levels))
            columns.append([token_ids[place * _HASH % len(token_ids)] for place in places])
        return [[token_ids[-1], *columns[0][1:]], *columns[1:]]

    def learn(self, outcome: Outcome) -> None:
        """Append what the target says after each column, and move on with the output."""
        num_tokens = len(outcome.verdict.token_ids)
        drafted, self.drafted = self.drafted, []
        next_ids = _next_ids(drafted, outcome)
        if next_ids:
            self.columns = [
                [*column, next_id] for column, next_id in zip(drafted, next_ids, strict=False)
            ]
            if len(self.columns[0]) == self.ngram:
                for column in self.columns:
                    self.pool.add(column)
                # Without its first level the window stands one place further on.
                self.columns = [column[1:] for column in self.columns]
                num_tokens -= 1
        self.columns = self.columns[num_tokens:]  # the output has passed those before


def _path(columns: Sequence[Column], index: int) -> list[int]:
    """Return the tokens from below the root to the last guess of a column."""
    return [column[0] for column in columns[1 : index + 1]] + columns[index][1:]


def _next_ids(columns: Sequence[Column], outcome: Outcome) -> list[int]:
    """Return the likeliest token after each column, up to the first that was not scored."""
    next_ids: list[int] = []
    for index in range(len(columns) if outcome.top_ids.size else 0):
        path = _path(columns, index)
        nodes = outcome.draft.tree.match(path)
        if len(nodes) < len(path):
            break
        next_ids.append(int(outcome.top_ids[nodes[-1] if nodes else ROOT, 0]))
    return next_ids


class LookaheadDrafter(Drafter):
    """Refines guesses of the next tokens and drafts the n-grams that were found on the way.

    The window is a part of the token tree. Its first guesses are a chain below the root, one per
    column, and the later guesses of a column hang below its first. So a guess attends to what
    stands, to the first guesses before it and to those of its own column, as in the paper. What
    the target would say after the last guess of a column is its next one; N of them are an
    n-gram. Those that begin with the pending token are drafted beside the window.

    Source: Lookahead decoding, arXiv:2402.02057.
    """

    Options: ClassVar[type[Any]] = LookaheadOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="target itself (Jacobi iterations)",
        is_trained=False,
        termination="static",
        structure="tree",
        reference="Lookahead decoding, arXiv:2402.02057",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, options: LookaheadOptions) -> None:
        self.needs = DrafterNeeds(top_logits=1)
        self._options = options
        self._searches: dict[str, _Search] = {}

    @classmethod
    def create(cls, options: LookaheadOptions, host: DrafterHost) -> LookaheadDrafter:
        """Build it; there is nothing to load."""
        return cls(options)

    def start(self, request: RequestView) -> None:
        """Begin without guesses; the first draft makes them up."""
        options = self._options
        self._searches[request.request_id] = _Search(
            NgramPool(options.candidates), options.ngram or 0
        )

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context the n-grams that fit and the window, as far as it fits."""
        return [self._propose_one(context) for context in contexts]

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Take the next guesses from the rows of the window."""
        for outcome in outcomes:
            search = self._searches.get(outcome.request_id)
            if search is not None:
                search.learn(outcome)

    def stop(self, request_id: str) -> None:
        """Forget the request's guesses and n-grams."""
        self._searches.pop(request_id, None)

    def _propose_one(self, context: DraftContext) -> Draft:
        search, token_ids = self._searches[context.request_id], context.token_ids
        search.ngram = search.ngram or (3 if context.budget.max_nodes >= _ROOMY else 2)
        branches = _Branches(token_ids[-1], context.budget)
        columns = search.window(token_ids, self._options.window)
        search.drafted, scouts = [], set()
        # N-grams and columns cost the same, so they take turns; either gets what the other leaves.
        for rest, index in zip_longest(search.pool.after(token_ids[-1]), range(len(columns))):
            if rest is not None:
                branches.add(rest[: context.budget.max_depth], _NGRAM_LOGPROBS)
            if index is not None and len(search.drafted) == index:
                node = branches.add(_path(columns, index), _GUESS_LOGPROBS)
                if node is not None:
                    search.drafted.append(columns[index])
                    scouts.add(node)
        return Draft.from_drafter(
            "lookahead",
            TokenTree(tuple(branches.token_ids), tuple(branches.parents)),
            draft_logprobs=tuple(branches.logprobs),
            scouts=frozenset(scouts - {ROOT}),
        )
