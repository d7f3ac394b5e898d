"""REST: retrieve what followed the last tokens in a datastore of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    Taxonomy,
)
from foretoken.drafters.copying import NOTHING, Occurrences, Shape, best_tree
from foretoken.drafters.datastore import Datastore
from foretoken.drafters.suffix_array import MAX_MATCH, longest_suffix
from foretoken.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RestOptions:
    """Options of `rest`.

    Args:
        path: A file that `foretoken datastore build` wrote for the target's vocabulary.
        max_match: Longest run of last tokens to look for; longer ones are tried first.
        min_match: Shortest run.
        max_places: Occurrences that are counted; of more, this many, evenly spread.
        max_depth: Most draft tokens on one path.
        min_prob: Least estimated probability that a node is reached.
    """

    path: str
    max_match: int = MAX_MATCH
    min_match: int = 2
    max_places: int = 512
    max_depth: int = 10
    min_prob: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.min_match <= self.max_match <= MAX_MATCH:
            raise ConfigError(
                f"rest needs 1 <= min_match <= max_match <= {MAX_MATCH}; "
                f"got {self.min_match} and {self.max_match}",
                hint="change min_match or max_match",
            )
        for name in ("max_places", "max_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"rest:{name} is at least 1; got {getattr(self, name)}", hint=f"change {name}"
                )
        if not 0 <= self.min_prob <= 1:
            raise ConfigError(
                f"rest:min_prob is from 0 to 1; got {self.min_prob}", hint="change min_prob"
            )


class RestDrafter(Drafter):
    """Finds the longest run of last tokens that the datastore has; its continuations make a tree.

    The most frequent continuations come first. The datastore stays on disk, mapped into memory.

    Args:
        options: How to look.
        datastore: Where.

    Source: REST, arXiv:2311.08252.
    """

    Options: ClassVar[type[Any]] = RestOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="retrieval (datastore)",
        is_trained=False,
        termination="static",
        structure="tree",
        reference="REST, arXiv:2311.08252",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, options: RestOptions, datastore: Datastore) -> None:
        self.needs = DrafterNeeds()
        self._options = options
        self._datastore = datastore

    @classmethod
    def create(cls, options: RestOptions, host: DrafterHost) -> RestDrafter:
        """Map the datastore.

        Raises:
            ConfigError: It cannot be read, is damaged, or for another vocabulary; or the target
                has no tokenizer to compare with.
        """
        if host.tokenizer is None:
            raise ConfigError(
                "rest needs the target's tokenizer, and the model has none",
                hint="add the tokenizer's files to the model directory",
            )
        path = Path(options.path).expanduser()
        return cls(options, Datastore.load(path, host.target.info.vocab_size, host.tokenizer))

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context one tree of what the datastore has after its last tokens."""
        return [self.follow(context, ()) for context in contexts]

    def follow(self, context: DraftContext, path: Sequence[int]) -> Draft:
        """Return the tree of what the datastore has after the last tokens and a path."""
        options = self._options
        tokens, array = self._datastore.tokens, self._datastore.array
        last_ids = [*context.token_ids[-options.max_match :], *path][-options.max_match :]
        root_id, query = last_ids[-1], np.array(last_ids, np.int32)
        length, low, high = longest_suffix(tokens, array, query)
        if length < options.min_match or context.budget.is_empty:
            return Draft.empty(root_id)
        # Neighbours in the array go on alike, so an even spread is a fair sample.
        count = min(high - low, options.max_places)
        chosen = low + np.arange(count) * (high - low) // count
        starts = array[chosen].astype(np.int64) + length
        shape = Shape.within(
            context.budget,
            depth_per_match=0,
            depth_offset=options.max_depth,
            min_prob=options.min_prob,
        )
        found = Occurrences(tokens, starts, np.full(count, length, np.int64), -1)
        best = best_tree(found, shape)
        return Draft.empty(root_id) if best is NOTHING else best.as_draft(root_id, "rest")
