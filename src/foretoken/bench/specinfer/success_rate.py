"""How often a draft's k guesses for one position hold the target's token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.noise import Stream, gumbel_noise, keyed_generator
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import Segment
from foretoken.models.cache import KVCache

MAX_GUESSES = 5
ROWS_AT_ONCE = 64  # of a vocabulary's width in float64, several times over

Array = NDArray[np.float64]

# Ways to guess, as reports call them.
TOP_K = "the draft's k likeliest"
MSS_RULE = "accepted by MSS, k i.i.d. samples"
IID = "among k i.i.d. samples"
DISTINCT = "among k samples without replacement"
RACE = "among the first k of the race"
GREEDY_WAYS = (TOP_K,)
STOCHASTIC_WAYS = (TOP_K, IID, MSS_RULE, DISTINCT, RACE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What the target itself said after a prompt.

    Args:
        prompt_ids: The prompt's token ids.
        output_ids: What followed.
        temperature: 0, or 1.
        seed: Of its noise.
    """

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    temperature: float
    seed: int


class Replay:
    """Scores continuations with both models, every position given the target's own past.

    Args:
        target: Whose output it is.
        draft: Whose guesses are counted; shares the target's tokens.
        max_tokens: Longest prompt and output together.
    """

    def __init__(self, target: LanguageModel, draft: LanguageModel, max_tokens: int) -> None:
        self._target, self._draft = target, draft
        self._target_cache = target.new_cache(max_tokens)
        self._draft_cache = draft.new_cache(max_tokens)
        self._vocab_size = min(target.info.vocab_size, draft.info.vocab_size)

    def success(self, continuation: Continuation) -> dict[str, Array]:
        """Return for each way to guess the sum over positions of its success, [K].

        Greedily a position counts 1 if the target's token is among the first k guesses. When
        sampling it counts the probability of that under the target's distribution, given the
        past; for the race, which shares the target's noise, 1 if its choice is among them.
        """
        prompt_ids, output_ids = continuation.prompt_ids, continuation.output_ids
        fed = [*prompt_ids, *output_ids[:-1]]
        first = len(prompt_ids) - 1
        theirs = _logits(self._target, self._target_cache, fed, first)
        ours = _logits(self._draft, self._draft_cache, fed, first)
        is_greedy = continuation.temperature == 0
        generator = keyed_generator(continuation.seed, Stream.DRAFT)
        ways = GREEDY_WAYS if is_greedy else STOCHASTIC_WAYS
        totals = {way: np.zeros(MAX_GUESSES) for way in ways}
        for start in range(0, len(output_ids), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            chosen = np.asarray(output_ids[rows])
            ours_here = self._rows(ours, rows)
            if is_greedy:
                counts = {TOP_K: _ranked(ours_here, chosen)}
            else:
                positions = range(first + 1 + start, first + 1 + start + len(chosen))
                noise = gumbel_noise(
                    continuation.seed, positions, self._vocab_size, torch.device("cpu")
                ).numpy()
                counts = sampled_success(
                    _softmax(self._rows(theirs, rows)),
                    _softmax(ours_here),
                    race=_ranked(_log_softmax(ours_here) + noise, chosen),
                    generator=generator,
                )
            for way in ways:
                totals[way] += counts[way].sum(axis=0)
        return totals

    def _rows(self, logits: Tensor, rows: slice) -> Array:
        # Models of one family may pad their logits to different widths; the rest is never said.
        array: Array = logits[rows, : self._vocab_size].double().cpu().numpy()
        return array


def sampled_success(
    target_probs: Array,  # [N, V]
    draft_probs: Array,  # [N, V]
    *,
    race: Array,  # [N, K]
    generator: np.random.Generator,
) -> dict[str, Array]:
    """Return the success of each way to guess at each position when sampling, [N, K] each.

    Args:
        target_probs: The target's distributions. Rows sum to 1.
        draft_probs: The draft's. Rows sum to 1.
        race: Of the race, found already.
        generator: Draws the samples without replacement.
    """
    return {
        TOP_K: _mass(target_probs, draft_probs),
        IID: iid_success(target_probs, draft_probs),
        MSS_RULE: mss_success(target_probs, draft_probs),
        DISTINCT: _mass(target_probs, _gumbel_scores(draft_probs, generator)),
        RACE: race,
    }


def iid_success(target_probs: Array, draft_probs: Array) -> Array:
    """Return the probability that k i.i.d. samples hold the target's token, [N, K].

    `sum over x of p(x) (1 - (1 - q(x))^k)`: what naive sampling accepts at one level.
    """
    missed = np.ones_like(draft_probs)
    columns = []
    for _ in range(MAX_GUESSES):
        missed *= 1 - draft_probs
        columns.append((target_probs * (1 - missed)).sum(axis=1))
    return np.stack(columns, axis=1)


def mss_success(target_probs: Array, draft_probs: Array) -> Array:
    """Return the probability that multi-step speculative sampling accepts one of k, [N, K].

    The candidates are i.i.d. samples of q. Each is accepted with probability
    `sum over x of min(p(x), q(x))`; a rejection turns p into the normalized positive part of
    p - q, whichever token was rejected.

    Source: SpecInfer, arXiv:2305.09781, VerifyStochastic.
    """
    rest = target_probs
    missed = np.ones(len(target_probs))
    columns = []
    for _ in range(MAX_GUESSES):
        accepted = np.minimum(rest, draft_probs).sum(axis=1).clip(max=1)
        missed = missed * (1 - accepted)
        columns.append(1 - missed)
        rest = np.maximum(rest - draft_probs, 0)
        total = rest.sum(axis=1, keepdims=True)
        # Nothing is left where p = q: then the candidate was accepted, and no other is tried.
        rest = np.divide(rest, total, out=rest, where=total > 0)
    return np.stack(columns, axis=1)


def _gumbel_scores(draft_probs: Array, generator: np.random.Generator) -> Array:
    """Return scores whose largest k are k samples without replacement (Gumbel top-k), [N, V]."""
    with np.errstate(divide="ignore"):
        scores: Array = np.log(draft_probs) + generator.gumbel(size=draft_probs.shape)
    return scores


def _best(scores: Array) -> NDArray[np.int64]:
    """Return the ids of the largest scores of each row, best first, ties to the lowest, [N, K]."""
    order: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")
    return order[:, :MAX_GUESSES]


def _mass(target_probs: Array, scores: Array) -> Array:
    """Return the target's probability of the k best-scored tokens, [N, K]."""
    mass: Array = np.take_along_axis(target_probs, _best(scores), axis=1).cumsum(axis=1)
    return mass


def _ranked(scores: Array, chosen: NDArray[np.int64]) -> Array:
    """Return whether the chosen tokens are among the k best-scored ones, [N, K]."""
    hits: Array = (_best(scores) == chosen[:, None]).astype(float)
    return hits.cumsum(axis=1)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _softmax(logits: Array) -> Array:
    return np.exp(_log_softmax(logits))


def _logits(
    model: LanguageModel, cache: KVCache, token_ids: Sequence[int], first: int
) -> Tensor:  # [N, V]
    """Return the logits of the positions from `first` on; nothing stays in the cache."""
    sequence = cache.open()
    try:
        with cache.speculate([sequence]):
            last = len(token_ids) - 1
            vocab_size = model.info.vocab_size
            fed = [min(token_id, vocab_size - 1) for token_id in token_ids]
            segment = Segment(sequence, fed, range(-1, last))
            return model.forward(model.batch(cache, [segment]), range(first, last + 1)).logits
    finally:
        cache.close(sequence)


__all__ = [
    "GREEDY_WAYS",
    "MAX_GUESSES",
    "STOCHASTIC_WAYS",
    "Continuation",
    "Replay",
    "iid_success",
    "mss_success",
    "sampled_success",
]
