"""Token Recycling: draft from the tokens that the target thought likely, accepted or not."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.jit import jit
from foretoken.core.tree import NO_PARENT, ROOT, TokenTree
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Follower,
    Outcome,
    Taxonomy,
)
from foretoken.drafters.token_files import (
    FileKind,
    check_token_ids,
    map_token_file,
    vocabulary_digest,
    write_token_file,
)
from foretoken.errors import ConfigError

NUM_SUCCESSORS = 8  # of each token
FILE_KIND = FileKind(
    name="successors",
    num_arrays=NUM_SUCCESSORS,
    owner="token-recycling:path",
    remedy="name the file that was written for this model, or a new one",
)
_UNKNOWN = -1
_LEVEL_SIZES = (8, 21, 25, 15, 8, 3)  # nodes at each depth, 80 together, as in the paper
# Estimated probability that the target goes on with the successor of each rank, at any depth. With
# the included target, greedy, these came true: 0.4 to 0.5, 0.1, 0.06, 0.03, 0.03, 0.02 and less.
_RANK_PROBS = tuple(0.45 / (rank + 1) ** 1.7 for rank in range(NUM_SUCCESSORS))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecyclingOptions:
    """Options of `token-recycling`.

    Args:
        path: File that the successors are read from, if it exists, and written to at the end;
            None keeps them for this process.
    """

    path: str | None = None


class Template(NamedTuple):
    """A static tree, the likeliest nodes first: a prefix of it is the best tree of its size.

    Args:
        parents: Index of each node's parent in the template, -1 for the root of the draft, [N].
        ranks: Which successor of its parent each node is, [N].
        depths: Draft tokens from below the root to each node, [N].
    """

    parents: NDArray[np.int64]
    ranks: NDArray[np.int64]
    depths: NDArray[np.int64]


def make_template(level_sizes: Sequence[int], rank_probs: Sequence[float]) -> Template:
    """Return the tree whose levels hold the likeliest children of the levels above.

    Args:
        level_sizes: Nodes at each depth.
        rank_probs: Probability of each rank of child, whatever the parent; descending.
    """
    nodes: list[tuple[float, tuple[int, ...]]] = []  # minus the probability, ranks on the path
    level: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    for size in level_sizes:
        level = sorted(
            (prob * rank_probs[rank], (*path, rank))
            for prob, path in level
            for rank in range(len(rank_probs))
        )[:size]
        nodes += level
    paths = [path for _, path in sorted(nodes)]
    place = {path: index for index, path in enumerate(paths)}
    return Template(
        np.array([place.get(path[:-1], NO_PARENT) for path in paths], np.int64),
        np.array([path[-1] for path in paths], np.int64),
        np.array([len(path) for path in paths], np.int64),
    )


class Successors:
    """The latest likeliest successors of every token, in memory and, if wanted, in a file.

    Args:
        path: The file; None for none.
        host: For the target's vocabulary.

    Attributes:
        table: Successors of each token, best first, -1 where none is known, [V, 8] int32.

    Raises:
        ConfigError: There is a file that is not one of these, or none can be written there.
    """

    def __init__(self, path: str | None, host: DrafterHost) -> None:
        vocab_size = host.target.info.vocab_size
        self.table = np.full((vocab_size, NUM_SUCCESSORS), _UNKNOWN, np.int32)
        self._path = Path(path).expanduser().absolute() if path else None
        self._vocabulary = b""
        if self._path is None:
            return
        self._vocabulary = vocabulary_digest(vocab_size, host.tokenizer)
        if self._path.exists():
            columns = np.stack(map_token_file(self._path, FILE_KIND, self._vocabulary), axis=1)
            check_token_ids(columns, vocab_size, FILE_KIND.owner)
            self.table[: len(columns)] = columns[:vocab_size]
        elif not os.access(self._path.parent, os.W_OK):
            raise ConfigError(
                f"{FILE_KIND.owner} {str(self._path)!r} is in a folder that does not exist or "
                f"cannot be written to",
                hint="create the folder, or name a file elsewhere",
            )

    def learn(self, outcome: Outcome) -> None:
        """Take the successors of every scored token; where one occurs twice, the last one's.

        What was accepted comes last: its context is the one that stands.
        """
        if not outcome.top_ids.size:
            return
        accepted = (ROOT, *outcome.verdict.path)
        nodes = [*set(range(len(outcome.draft.tree))).difference(accepted), *accepted]
        token_ids = np.array(outcome.draft.tree.token_ids)[nodes]
        rows = outcome.top_ids[nodes, :NUM_SUCCESSORS]
        self.table[token_ids] = _UNKNOWN
        self.table[token_ids, : rows.shape[1]] = rows

    def save(self) -> None:
        """Write the file; a failure is a warning, because nothing else depends on it."""
        if self._path is None:
            return
        try:
            write_token_file(self._path, FILE_KIND, self._vocabulary, list(self.table.T))
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(
                f"token-recycling: successors were not saved to {str(self._path)!r}: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )


class TokenRecyclingDrafter(Drafter, Follower):
    """Fills a static tree with the successors that each token had when it was last scored.

    Every scored row, of accepted and of rejected tokens, leaves its eight likeliest tokens as the
    successors of its token. All requests share them, so a request's drafts depend on what was
    scored before; its tokens never do. Nothing is drafted after a token that was never scored.

    Source: Token Recycling, arXiv:2408.08696.
    """

    Options: ClassVar[type[Any]] = TokenRecyclingOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="target itself (its earlier logits)",
        is_trained=False,
        termination="static",
        structure="tree",
        reference="Token Recycling, arXiv:2408.08696",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, successors: Successors) -> None:
        self.needs = DrafterNeeds(top_logits=NUM_SUCCESSORS)
        self._successors = successors
        self._template = make_template(_LEVEL_SIZES, _RANK_PROBS)
        self._logprobs = [math.log(prob) for prob in _RANK_PROBS]

    @classmethod
    def create(cls, options: TokenRecyclingOptions, host: DrafterHost) -> TokenRecyclingDrafter:
        """Build it; successors are read if there is a file.

        Raises:
            ConfigError: The file is damaged, of another kind or for another vocabulary.
        """
        return cls(Successors(options.path, host))

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context the likeliest nodes of the template that have a token."""
        return [self.follow(context, ()) for context in contexts]

    def follow(self, context: DraftContext, path: Sequence[int]) -> Draft:
        """Return what would be drafted after a path: only its last token counts."""
        root_id, budget = path[-1] if path else context.token_ids[-1], context.budget
        width = NUM_SUCCESSORS if budget.max_width is None else budget.max_width
        bounds = (budget.max_nodes, budget.max_depth, width)
        token_ids, parents, ranks = _fill(self._template, self._successors.table, root_id, bounds)
        return Draft.from_drafter(
            "token-recycling",
            TokenTree((root_id, *token_ids.tolist()), (NO_PARENT, *parents.tolist())),
            draft_logprobs=(0.0, *[self._logprobs[rank] for rank in ranks.tolist()]),
        )

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Learn the successors of what was scored."""
        for outcome in outcomes:
            self._successors.learn(outcome)

    def close(self) -> None:
        """Save the successors, if they are kept in a file."""
        self._successors.save()


@jit
def _fill(
    template: Template, table: np.ndarray, root_id: int, bounds: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, parents and ranks of the draft's nodes, the likeliest that fit.

    Args:
        template: The static tree.
        table: Successors, [V, 8].
        root_id: The pending token.
        bounds: Most nodes, greatest depth, most children of a node.
    """
    max_nodes, max_depth, max_width = bounds
    size = len(template.ranks)
    node_of = np.zeros(size, np.int64)  # the draft's node at each place; 0 where there is none
    found = np.empty((3, size), np.int64)
    count = 0
    for place in range(size):
        above, rank = template.parents[place], template.ranks[place]
        parent = node_of[above] if above >= 0 else 0
        is_cut = above >= 0 and parent == 0
        if count == max_nodes:
            break
        if is_cut or rank >= max_width or template.depths[place] > max_depth:
            continue
        token_id = table[found[0, parent - 1] if parent > 0 else root_id, rank]
        if token_id >= 0:
            found[0, count], found[1, count], found[2, count] = token_id, parent, rank
            count += 1
            node_of[place] = count
    return found[0, :count], found[1, :count], found[2, :count]
