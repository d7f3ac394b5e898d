"""From logits to the target's choice: processors, then greedy or the keyed race."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foretoken.core.noise import NoiseBlocks
from foretoken.core.params import SamplingParams

Processor = Callable[[Tensor, Sequence[int], int], Tensor]
"""Maps (logits [V], token ids so far, length of the prompt) to new logits; never in place.

The token ids are prompt and output, exactly those that plain decoding would have before this
position.
"""

Warper = Callable[[Tensor], Tensor]
"""Maps logits [..., V] to new logits of the same shape, row by row, without any history."""


# -- processors: look at the history of one row ----------------------------------------------


def logit_bias(bias: dict[int, float]) -> Processor:
    """Add a constant to the logits of some tokens."""

    def process(logits: Tensor, token_ids: Sequence[int], num_prompt_ids: int) -> Tensor:
        ids = torch.tensor(list(bias), device=logits.device)
        values = torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(0, ids, values)

    return process


def repetition_penalty(penalty: float) -> Processor:
    """Make tokens of prompt and output less likely (> 1) or likelier (< 1).

    Source: Keskar et al. 2019, arXiv:1909.05858; transformers' RepetitionPenaltyLogitsProcessor.
    """

    def process(logits: Tensor, token_ids: Sequence[int], num_prompt_ids: int) -> Tensor:
        ids = torch.tensor(sorted(set(token_ids)), device=logits.device)
        seen = logits[ids]
        return logits.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    return process


def occurrence_penalties(frequency: float, presence: float) -> Processor:
    """Subtract OpenAI's frequency and presence penalties for tokens of the output."""

    def process(logits: Tensor, token_ids: Sequence[int], num_prompt_ids: int) -> Tensor:
        counts = Counter(token_ids[num_prompt_ids:])
        if not counts:
            return logits
        ids = torch.tensor(list(counts), device=logits.device)
        numbers = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(0, ids, -(numbers * frequency + presence))

    return process


# -- warpers: reshape the distribution -------------------------------------------------------


def temperature(value: float) -> Warper:
    """Divide logits by the temperature."""
    return lambda logits: logits / value


def top_k(count: int) -> Warper:
    """Keep the `count` largest logits; ties with the last one stay."""

    def warp(logits: Tensor) -> Tensor:
        kept = min(count, logits.shape[-1])
        threshold = logits.topk(kept, dim=-1).values[..., -1:]
        return logits.masked_fill(logits < threshold, -torch.inf)

    return warp


def top_p(mass: float) -> Warper:
    """Keep the fewest most likely tokens whose probabilities sum to at least `mass`."""

    def warp(logits: Tensor) -> Tensor:
        ascending, order = torch.sort(logits, dim=-1, stable=True)
        cumulative = ascending.softmax(dim=-1).cumsum(dim=-1)
        dropped = cumulative <= (1 - mass)
        dropped[..., -1] = False  # the likeliest always stays
        return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)

    return warp


def min_p(share: float) -> Warper:
    """Drop tokens less likely than `share` times the likeliest."""

    def warp(logits: Tensor) -> Tensor:
        probs = logits.softmax(dim=-1)
        floor = share * probs.amax(dim=-1, keepdim=True)
        return logits.masked_fill(probs < floor, -torch.inf)

    return warp


def build_processors(params: SamplingParams) -> list[Processor]:
    """Return the history-dependent controls that are on, in order."""
    processors: list[Processor] = []
    if params.logit_bias:
        processors.append(logit_bias(dict(params.logit_bias)))
    if params.repetition_penalty != 1:
        processors.append(repetition_penalty(params.repetition_penalty))
    if params.frequency_penalty or params.presence_penalty:
        processors.append(occurrence_penalties(params.frequency_penalty, params.presence_penalty))
    return processors


def build_warpers(params: SamplingParams) -> list[Warper]:
    """Return the distribution-shaping controls that are on, in transformers' order."""
    warpers: list[Warper] = []
    if params.is_greedy:
        return warpers
    if params.temperature != 1:
        warpers.append(temperature(params.temperature))
    if params.top_k:
        warpers.append(top_k(params.top_k))
    if params.top_p < 1:
        warpers.append(top_p(params.top_p))
    if params.min_p > 0:
        warpers.append(min_p(params.min_p))
    return warpers


class Sampler:
    """Makes one request's choices: a pure function of seed, history and logits.

    Args:
        params: The request's parameters.
        seed: Key of the noise; `params.seed` or a fresh one.
        num_prompt_ids: Length of the prompt; some penalties count only what comes after.
    """

    def __init__(self, params: SamplingParams, seed: int, num_prompt_ids: int) -> None:
        self._noise = NoiseBlocks(seed)
        self.is_greedy = params.is_greedy
        self._num_prompt_ids = num_prompt_ids
        self._processors = build_processors(params)
        self._warpers = build_warpers(params)

    @property
    def is_argmax(self) -> bool:
        """Whether a choice is the argmax of the raw logits, whatever came before."""
        return self.is_greedy and not self._processors

    def choose(
        self,
        logits: Tensor,  # [V]
        token_ids: Sequence[int],
        path: Sequence[int] = (),
    ) -> int:
        """Return the target's token after `token_ids` and `path`.

        Greedy takes the largest logit, ties to the lowest id; sampling takes the winner of the
        keyed race, an exact draw from the processed distribution.

        Args:
            logits: The target's row at that position.
            token_ids: Prompt and output so far.
            path: Draft tokens accepted since.
        """
        return int(self.race_scores(logits.unsqueeze(0), token_ids, [path])[0].argmax())

    def race_scores(
        self,
        logits: Tensor,  # [F, V]
        token_ids: Sequence[int],
        paths: Sequence[Sequence[int]],
    ) -> Tensor:  # [F, V] float32 or float64
        """Return scores whose largest entry per row is the choice for that row.

        Drafters rank their candidates by these, computed from their own logits: the noise is
        the same that the target will use, so their favourites are correlated with its choice.

        Args:
            logits: One row per path.
            token_ids: Prompt and output so far.
            paths: Draft tokens before each row; all of one length, so that all rows choose the
                token of one position.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self._processors:
            scores = torch.stack(
                [
                    self._process(row, [*token_ids, *path])
                    for row, path in zip(scores, paths, strict=True)
                ]
            )
        for warp in self._warpers:
            scores = warp(scores)
        if self.is_greedy:
            return scores
        position = len(token_ids) + len(paths[0])
        return scores + self._noise.row(position, scores.shape[-1], scores.device)

    def _process(self, logits: Tensor, token_ids: Sequence[int]) -> Tensor:
        for process in self._processors:
            logits = process(logits, token_ids, self._num_prompt_ids)
        return logits
