"""SuffixDecoding: copy what followed the last tokens, in this request and in past outputs."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.drafters.base import (
    DraftContext,
    Drafter,
    DrafterHost,
    DrafterNeeds,
    RequestView,
    Retracer,
    Taxonomy,
)
from foretoken.drafters.copying import NOTHING, CountedTree, Shape, counted_tree
from foretoken.drafters.suffix_index import MAX_CAPACITY, SuffixIndex
from foretoken.drafters.suffix_trees import better_tree, retrace_trees
from foretoken.drafters.token_files import (
    FileKind,
    check_token_ids,
    map_token_file,
    vocabulary_digest,
    write_token_file,
)
from foretoken.errors import ConfigError

FILE_KIND = FileKind(
    name="past outputs",
    num_arrays=1,
    owner="suffix:path",
    remedy="name the file that was written for this model, or a new one",
)
_LEAST_NEWS = 4096  # tokens; a file is not written for fewer before the end
_MOST_NEW = 4096  # tokens of outputs that wait until somebody looks for them


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixOptions:
    """Options of `suffix`.

    Args:
        max_tokens: Most tokens of past outputs that are kept; the oldest outputs go first.
            0 keeps none: drafts come from the request alone.
        path: File that the past outputs are read from and written to; None keeps them for this
            process.
        max_match: Most last tokens that count as one match.
        max_places: Earlier places that are looked at for each of three lengths of match.
        depth_per_match: Draft tokens on a path per token of match.
        depth_offset: Draft tokens on a path besides.
        min_prob: Least estimated probability that a node is reached.
    """

    max_tokens: int = 1_000_000
    path: str | None = None
    max_match: int = 64
    max_places: int = 64
    depth_per_match: float = 1.0
    depth_offset: int = 4
    min_prob: float = 0.1

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_tokens", 0, MAX_CAPACITY),
            ("max_match", 1, 4096),
            ("max_places", 1, 4096),
            ("depth_offset", 0, 4096),
            ("depth_per_match", 0, 4096),
            ("min_prob", 0, 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(
                    f"suffix:{name} is from {least} to {most}; got {value}", hint=f"change {name}"
                )
        if self.path is not None and self.max_tokens == 0:
            raise ConfigError(
                "suffix:path keeps past outputs, but max_tokens=0 keeps none",
                hint="leave out path or max_tokens",
            )


@dataclass(slots=True)
class _RequestText:
    """A request's tokens, as the engine shows them, and the index over them.

    There is none until the first draft: most requests of a planner that decodes plainly have none.
    """

    token_ids: Sequence[int]
    num_prompt_ids: int
    index: SuffixIndex | None = None

    def caught_up(self, token_ids: Sequence[int]) -> SuffixIndex:
        """Return the index with all tokens in it."""
        self.token_ids = token_ids
        if self.index is None:
            self.index = SuffixIndex(MAX_CAPACITY, self.num_prompt_ids + 64)
        self.index.extend(token_ids[self.index.num_tokens :])
        return self.index


class PastOutputs:
    """Outputs of finished requests, in an index and, if wanted, in a file.

    Args:
        options: How many tokens to keep, and the file.
        host: For the target's vocabulary.

    Raises:
        ConfigError: There is a file that is not one of these, or none can be written there.
    """

    def __init__(self, options: SuffixOptions, host: DrafterHost) -> None:
        self._path = Path(options.path).expanduser().absolute() if options.path else None
        self._vocab_size = host.target.info.vocab_size
        # Without a file nobody asks whose the tokens are.
        self._vocabulary = (
            vocabulary_digest(self._vocab_size, host.tokenizer) if self._path else b""
        )
        texts = self._read()
        num_held = min(len(texts), options.max_tokens)
        self._index = SuffixIndex(max(2, options.max_tokens), num_held)
        start = 0
        for end in np.flatnonzero(texts < 0).tolist():
            self._index.add_text(texts[start:end])
            start = end + 1
        self._new: list[Sequence[int]] = []  # outputs that are not in the index yet
        self._num_new = self._num_unsaved = 0

    @property
    def index(self) -> SuffixIndex:
        """All outputs.

        They come in when somebody looks: where nobody does for a while many come at once, and code
        and index are in the processor's caches after the first.
        """
        if self._new:
            self._take_in()
        return self._index

    def _take_in(self) -> None:
        for token_ids in self._new:
            self._index.add_text(np.array(token_ids, np.int32))
        self._new.clear()
        self._num_new = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """Add an output; it is saved once there is enough news, at the latest by `save`."""
        self._new.append(token_ids)
        self._num_new += len(token_ids) + 1
        self._num_unsaved += len(token_ids) + 1
        if self._num_new >= _MOST_NEW:
            self._take_in()
        # A share of the whole, so that writing costs a constant number of bytes per token.
        if self._num_unsaved >= max(_LEAST_NEWS, self._index.num_tokens // 4):
            self.save()

    def save(self) -> None:
        """Write the file if there is news; a failure is a warning, because requests go on."""
        if self._path is None or not self._num_unsaved:
            return
        self._num_unsaved = 0
        try:
            write_token_file(self._path, FILE_KIND, self._vocabulary, [self.index.texts()])
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(
                f"suffix: past outputs were not saved to {str(self._path)!r}: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _read(self) -> np.ndarray:
        nothing = np.empty(0, np.int32)
        if self._path is None:
            return nothing
        if self._path.exists():
            [texts] = map_token_file(self._path, FILE_KIND, self._vocabulary)
            check_token_ids(texts, self._vocab_size, FILE_KIND.owner)
            return texts
        if not os.access(self._path.parent, os.W_OK):
            raise ConfigError(
                f"suffix:path {str(self._path)!r} is in a folder that does not exist or cannot "
                f"be written to",
                hint="create the folder, or name a file elsewhere",
            )
        return nothing


class SuffixDrafter(Drafter, Retracer):
    """Copies what followed the last tokens most often, as a tree, the deeper the longer the match.

    Two indices are asked, one over the request's own prompt and output, one over the outputs of
    requests that finished; the draft that promises more tokens is taken. A request's drafts
    therefore depend on what finished before it; its tokens never do.

    Source: SuffixDecoding, arXiv:2411.04975. Hash chains of a compact index (as in deflate,
    RFC 1951, section 4) stand for its suffix trees: docs/decisions/0011.
    """

    Options: ClassVar[type[Any]] = SuffixOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="retrieval (request and past outputs)",
        is_trained=False,
        termination="adaptive",
        structure="tree",
        reference="SuffixDecoding, arXiv:2411.04975",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, options: SuffixOptions, past: PastOutputs | None = None) -> None:
        self.needs = DrafterNeeds()
        self._options = options
        self._past = past
        self._nothing = SuffixIndex(1)
        self._requests: dict[str, _RequestText] = {}
        if past is not None:  # the contract has no end; that of the process or of this object is
            weakref.finalize(self, past.save)

    @classmethod
    def create(cls, options: SuffixOptions, host: DrafterHost) -> SuffixDrafter:
        """Build it; past outputs are read if there is a file.

        Raises:
            ConfigError: The file is damaged, of another kind or for another vocabulary.
        """
        return cls(options, PastOutputs(options, host) if options.max_tokens else None)

    def start(self, request: RequestView) -> None:
        """Take note of a request; an index of its own begins with the first draft."""
        text = _RequestText(request.token_ids or request.prompt_ids, len(request.prompt_ids))
        self._requests[request.request_id] = text

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return for each context the better of two trees, its own text's and past outputs'."""
        return [self.follow(context, ()) for context in contexts]

    def follow(self, context: DraftContext, path: Sequence[int]) -> Draft:
        """Return the better of two trees below a path."""
        own = self._requests[context.request_id]
        index = own.caught_up(context.token_ids)
        root_id = path[-1] if path else context.token_ids[-1]
        if context.budget.is_empty:
            return Draft.empty(root_id)
        with index.extended(path):
            best = self._best_tree(index, context.budget)
        return Draft.empty(root_id) if best is NOTHING else best.as_draft(root_id, "suffix")

    def retrace(self, token_ids: Sequence[int], start: int, max_nodes: int) -> NDArray[np.int64]:
        """Return what came of the trees that would have been drafted along a text, [1 + N]."""
        options, text = self._options, np.array(token_ids, np.int32)
        own = SuffixIndex(MAX_CAPACITY, len(text))
        own.extend(token_ids[:start])
        shape = self._shape(DraftBudget(max_nodes=max_nodes, max_depth=max_nodes))
        bounds = options.max_match, options.max_places
        return retrace_trees(own.ring, self._past_index.ring, text, shape, bounds)

    @property
    def _past_index(self) -> SuffixIndex:
        return self._nothing if self._past is None else self._past.index

    def stop(self, request_id: str) -> None:
        """Drop the request's index; its output joins the past outputs."""
        request = self._requests.pop(request_id, None)
        if request is None or self._past is None:
            return
        if len(request.token_ids) > request.num_prompt_ids:
            # With the end of the prompt before it, so that its beginning can be found.
            first = max(0, request.num_prompt_ids - self._options.max_match)
            self._past.add(request.token_ids[first:])

    def close(self) -> None:
        """Save the past outputs, if they are kept in a file."""
        if self._past is not None:
            self._past.save()

    def _best_tree(self, own: SuffixIndex, budget: DraftBudget) -> CountedTree:
        """Return the better tree below the last token of the request's own index."""
        query, past = own.tail(self._options.max_match), self._past_index
        max_places, shape = self._options.max_places, self._shape(budget)
        return counted_tree(better_tree(own.ring, past.ring, query, shape, max_places))

    def _shape(self, budget: DraftBudget) -> Shape:
        options = self._options
        return Shape.within(
            budget,
            depth_per_match=options.depth_per_match,
            depth_offset=options.depth_offset,
            min_prob=options.min_prob,
        )
