"""Drafts between two vocabularies: by what tokens spell, or by the tokens that both have."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.tree import NO_PARENT, ROOT, TokenTree
from foretoken.drafters.base import DraftContext
from foretoken.drafters.levels import RACE_TEMPERATURE
from foretoken.drafters.retokenize import Vocabulary, continue_ids, text_behind

NAME = "universal"

# Added to both lengths before their ratio is taken: a few tokens say little about a text.
_SMOOTHING = 8
# When sampling, so many times the nodes are grown that the draft may have. They are grown without
# the noise of the race, which then picks among them. Measured on two pairs at temperature 1: 1.89
# and 2.25 tokens per step become 2.10 and 2.5.
_SURPLUS = 4
MAX_GROWN_NODES = 128
# What the race adds to the best of the tokens that were not drafted: the mean of its noise.
_MEAN_NOISE = 0.5772
_LEAST_REST = 1e-3  # probability that is left to them at least, because estimates are sure too soon


class Translation(Protocol):
    """Turns a request into one for the draft model, and the draft for it into the target's."""

    def own_context(self, context: DraftContext, own_ids: Sequence[int]) -> DraftContext:
        """Return the context as the draft model is to see it.

        Args:
            context: With a budget that is not empty.
            own_ids: Its text in the draft model's tokens.
        """
        ...

    def translate(self, draft: Draft, context: DraftContext) -> Draft:
        """Return the draft for `own_context` as one for `context`, within its budget."""
        ...


class TextTranslation:
    """Translates by text: what a path spells is encoded with the target's tokenizer.

    The draft model knows nothing of the target's tokens, so the race and the controls, which speak
    of these, have no say in what it drafts: it drafts what it finds likely. The race ranks what
    has come of it. Source: string-level exact match (SLEM), arXiv:2502.05202.

    Args:
        target: The target's vocabulary.
        draft: The draft model's.
        target_special: The target's ids of special tokens, by the draft's.
        max_ratio: Most tokens of the draft's for one of the target's that are planned with.
        min_gain: Expected tokens of the target's that a pass is to be worth.
    """

    def __init__(
        self,
        target: Vocabulary,
        draft: Vocabulary,
        target_special: Mapping[int, int],
        *,
        max_ratio: float,
        min_gain: float,
    ) -> None:
        self._target, self._draft = target, draft
        self._target_special = target_special
        self._max_ratio = max_ratio
        self._min_gain = min_gain

    def own_context(self, context: DraftContext, own_ids: Sequence[int]) -> DraftContext:
        """Return a plain request at the same temperature, with bounds in the draft's tokens."""
        ratio = (len(own_ids) + _SMOOTHING) / (len(context.token_ids) + _SMOOTHING)
        ratio = min(max(1.0, ratio), self._max_ratio)
        budget = context.budget
        num_nodes = math.ceil(budget.max_nodes * ratio)
        if _is_raced(context):
            num_nodes = max(num_nodes, min(num_nodes * _SURPLUS, MAX_GROWN_NODES))
        return replace(
            context,
            token_ids=own_ids,
            sampler=_plain_sampler(context.sampler.temperature),
            siblings=SiblingDraw.DETERMINISTIC,
            budget=replace(
                budget,
                max_nodes=num_nodes,
                max_depth=math.ceil(budget.max_depth * ratio),
                min_gain=max(budget.min_gain, self._min_gain) * ratio,
            ),
        )

    def translate(self, draft: Draft, context: DraftContext) -> Draft:
        """Return the tree of what the draft's paths spell."""
        tree = _EstimatedTree(context.token_ids[-1])
        totals = draft.path_logprobs()
        behind = text_behind(self._target, context.token_ids)
        for leaf, children in enumerate(draft.tree.children):
            if not children and leaf != ROOT:
                path = draft.tree.path(leaf)[1:]
                own_ids = [draft.tree.token_ids[node] for node in path]
                found = self._translate_path(own_ids, behind)[: context.budget.max_depth]
                tree.add([(token_id, path[at]) for token_id, at in found], totals)
        logprobs = tree.logprobs()
        if _is_raced(context):
            logprobs = tree.race(logprobs, context, len(self._target.spellings))
        return tree.finish(logprobs, context)

    def _translate_path(self, own_ids: Sequence[int], behind: bytes) -> list[tuple[int, int]]:
        """Return the target's tokens for a path, and which of its tokens completes each."""
        spelled = [self._draft.spelling(token_id) for token_id in own_ids]
        num_text = spelled.index(b"") if b"" in spelled else len(spelled)
        ends = list(accumulate(map(len, spelled[:num_text])))
        continued = continue_ids(self._target, behind, b"".join(spelled[:num_text]))
        found = [(token_id, bisect_left(ends, end)) for token_id, end in continued]
        is_whole = not ends or (bool(continued) and continued[-1][1] == ends[-1])
        if num_text < len(own_ids) and is_whole and own_ids[num_text] in self._target_special:
            found.append((self._target_special[own_ids[num_text]], num_text))
        return found


def _is_raced(context: DraftContext) -> bool:
    """Return whether the target will choose by a race whose noise is known."""
    return context.siblings is SiblingDraw.COUPLED and not context.sampler.is_greedy


class TokenTranslation:
    """Translates token by token: only what both vocabularies have is drafted.

    Tokens correspond one-to-one, so the draft model's logits are logits over the target's
    vocabulary, and its candidates are ranked with every control and by the race that the target
    will run. Source: token-level intersection (TLI), arXiv:2502.05202.

    Args:
        shared: The draft's ids of the shared tokens, by the target's; at least one.
        target_vocab_size: V of the target.
        draft_vocab_size: V of the draft model.
        device: Where its logits are.
    """

    def __init__(
        self,
        shared: Mapping[int, int],
        target_vocab_size: int,
        draft_vocab_size: int,
        device: torch.device,
    ) -> None:
        # The column of each token on the other side; the one after the last is minus infinity.
        draft_columns = torch.full((target_vocab_size,), draft_vocab_size, device=device)
        target_columns = torch.full((draft_vocab_size,), target_vocab_size, device=device)
        target_ids, draft_ids = (list(ids) for ids in (shared, shared.values()))
        draft_columns[target_ids] = torch.tensor(draft_ids, device=device)
        target_columns[draft_ids] = torch.tensor(target_ids, device=device)
        self._draft_columns, self._target_columns = draft_columns, target_columns
        self._target_of = [-1] * draft_vocab_size  # a list: no id that is not shared is looked up
        for target_id, draft_id in shared.items():
            self._target_of[draft_id] = target_id

    def own_context(self, context: DraftContext, own_ids: Sequence[int]) -> DraftContext:
        """Return the request with a sampler that judges the draft's tokens as the target's."""
        sampler = _SharedSampler(self, context.sampler, context.token_ids)
        return replace(context, token_ids=own_ids, sampler=sampler)

    def translate(self, draft: Draft, context: DraftContext) -> Draft:
        """Return the same tree of the target's tokens."""
        tree = draft.tree
        token_ids = (context.token_ids[-1], *self.path(tree.token_ids[1:]))
        return Draft.from_drafter(
            NAME,
            TokenTree(token_ids, tree.parents),
            siblings=draft.siblings,
            draft_logprobs=draft.draft_logprobs,
        )

    def path(self, own_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the target's tokens for shared ones of the draft's."""
        return tuple([self._target_of[token_id] for token_id in own_ids])

    def score(
        self,
        logits: Tensor,  # [F, draft V]
        score: Callable[[Tensor], Tensor],
    ) -> Tensor:  # [F, draft V]
        """Return scores of the draft's logits that are made in the target's vocabulary."""
        return _select(score(_select(logits, self._draft_columns)), self._target_columns)


def _select(rows: Tensor, columns: Tensor) -> Tensor:
    """Return some columns of rows; the one after the last is minus infinity."""
    return functional.pad(rows, (0, 1), value=-math.inf).index_select(1, columns)


class _SharedSampler(Sampler):
    """A request's sampler for rows and paths in a draft model's tokens.

    Args:
        translation: Between the two vocabularies.
        sampler: The request's own.
        token_ids: Its context in the target's tokens.
    """

    def __init__(
        self, translation: TokenTranslation, sampler: Sampler, token_ids: Sequence[int]
    ) -> None:
        # Not the base's own: everything is asked of the request's sampler.
        self._translation, self._sampler, self._token_ids = translation, sampler, token_ids
        self.is_greedy, self.temperature = sampler.is_greedy, sampler.temperature
        self.is_plain = self.is_argmax = False

    def race_scores(
        self, logits: Tensor, token_ids: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return scores under the race of the target's position."""
        own_paths = [self._translation.path(path) for path in paths]
        return self._translation.score(
            logits, lambda rows: self._sampler.race_scores(rows, self._token_ids, own_paths)
        )

    def scores(
        self, logits: Tensor, token_ids: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return logits with every control of the request applied."""
        own_paths = [self._translation.path(path) for path in paths]
        return self._translation.score(
            logits, lambda rows: self._sampler.scores(rows, self._token_ids, own_paths)
        )


@lru_cache(maxsize=64)
def _plain_sampler(temperature: float) -> Sampler:
    """Return a sampler without controls, which remembers nothing; its noise is never asked for."""
    return Sampler(SamplingParams(temperature=temperature), 0, 0)


class _EstimatedTree:
    """A tree of the target's tokens with the probabilities that a draft's paths give them.

    A token is as likely as all paths of the draft together that spell it: a path counts with the
    probability of its first node by which the token is complete. So a token that spans several
    of the draft's has their product, and of several tokens in one of the draft's, the first has
    its probability and the others follow from it. Too high for a token that begins a longer one
    which other paths spell.
    """

    def __init__(self, root_id: int) -> None:
        self._token_ids, self._parents, self._depths = [root_id], [NO_PARENT], [0]
        self._covers: list[dict[int, float]] = [{}]
        self._child_of: dict[tuple[int, int], int] = {}

    def add(self, path: Sequence[tuple[int, int]], totals: Sequence[float]) -> None:
        """Add a path of tokens, each with the node of the draft that completes it."""
        node = ROOT
        for token_id, cover in path:
            child = self._child_of.setdefault((node, token_id), len(self._token_ids))
            if child == len(self._token_ids):
                self._token_ids.append(token_id)
                self._parents.append(node)
                self._depths.append(self._depths[node] + 1)
                self._covers.append({})
            self._covers[child][cover] = totals[cover]
            node = child

    def logprobs(self) -> list[float]:
        """Return for each node the log of its probability once its parent is taken."""
        totals, logprobs = [0.0], [0.0]
        for parent, covers in zip(self._parents[1:], self._covers[1:], strict=True):
            total = min(totals[parent], _log_sum(covers.values()))
            totals.append(total)
            logprobs.append(total - totals[parent])
        return logprobs

    def race(
        self, logprobs: Sequence[float], context: DraftContext, vocab_size: int
    ) -> list[float]:
        """Return the probabilities that nodes have when the noise of the race is known."""
        raced = list(logprobs)
        width = torch.empty(vocab_size)
        for node, children in enumerate(self._children()):
            if not children:
                continue
            noise = context.sampler.noise(len(context.token_ids) + self._depths[node], width)
            rest = 1 - sum(math.exp(logprobs[child]) for child in children)
            scores = [logprobs[child] + float(noise[self._token_ids[child]]) for child in children]
            scores.append(math.log(max(rest, _LEAST_REST)) + _MEAN_NOISE)
            log_total = _log_sum(score / RACE_TEMPERATURE for score in scores)
            for child, score in zip(children, scores, strict=False):
                raced[child] = min(0.0, score / RACE_TEMPERATURE - log_total)
        return raced

    def finish(self, logprobs: Sequence[float], context: DraftContext) -> Draft:
        """Return the draft: the likeliest nodes that the budget has room for."""
        kept = self._within_width(logprobs, context.budget.max_width)
        new_index = {node: index for index, node in enumerate(kept)}
        tree = TokenTree(
            tuple([self._token_ids[node] for node in kept]),
            (NO_PARENT, *[new_index[self._parents[node]] for node in kept[1:]]),
        )
        draft = Draft.from_drafter(
            NAME,
            tree,
            siblings=context.siblings,
            draft_logprobs=tuple([logprobs[node] for node in kept]),
        )
        return draft.prune(context.budget.max_nodes)

    def _children(self) -> list[list[int]]:
        children: list[list[int]] = [[] for _ in self._token_ids]
        for node, parent in enumerate(self._parents[1:], start=1):
            children[parent].append(node)
        return children

    def _within_width(self, logprobs: Sequence[float], max_width: int | None) -> list[int]:
        """Return the nodes that are left with the best children of each, ascending."""
        best = {
            child
            for children in self._children()
            for child in sorted(children, key=lambda child: -logprobs[child])[:max_width]
        }
        kept = [ROOT]
        reached = {ROOT}
        for node in range(1, len(self._token_ids)):
            if node in best and self._parents[node] in reached:
                kept.append(node)
                reached.add(node)
        return kept


def _log_sum(logs: Iterable[float]) -> float:
    values = list(logs)
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))
