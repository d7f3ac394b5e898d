"""From logits to the target's choice: processors, then greedy or the keyed race."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.core.noise import NoiseBlocks
from foretoken.core.params import SamplingParams
from foretoken.core.ranking import (
    LogprobLists,
    RaceRows,
    TokenLists,
    argmax_ids,
    best_in_race,
    best_tokens,
    is_numpy,
    race_winner,
)

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

    Attributes:
        is_greedy: Whether the largest score wins, without noise.
        is_plain: Whether nothing but a temperature shapes the scores. What they are ranked by is
            then computed in one sweep, without tensors in between.
        temperature: 0 if greedy.
    """

    def __init__(self, params: SamplingParams, seed: int, num_prompt_ids: int) -> None:
        self._noise = NoiseBlocks(seed)
        self.is_greedy = params.is_greedy
        self._num_prompt_ids = num_prompt_ids
        self._processors = build_processors(params)
        self._warpers = build_warpers(params)
        self.temperature = params.temperature
        has_other_warpers = len(self._warpers) > (params.temperature not in (0, 1))
        self.is_plain = not self._processors and not has_other_warpers

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
        if self.is_plain and not self.is_greedy and is_numpy(logits):
            noise = self.noise(len(token_ids) + len(path), logits)
            return race_winner(logits, noise, self.temperature)
        [chosen_id] = argmax_ids(self.race_scores(logits.unsqueeze(0), token_ids, [path]))
        return chosen_id

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
        return scores + self.noise(len(token_ids) + len(paths[0]), scores)

    def noise(self, position: int, scores: Tensor) -> Tensor:
        """Return the noise of the choice made at a position, [V] float64, to go with scores."""
        return self._noise.row(position, scores.shape[-1], scores.device)

    def _process(self, logits: Tensor, token_ids: Sequence[int]) -> Tensor:
        for process in self._processors:
            logits = process(logits, token_ids, self._num_prompt_ids)
        return logits


@dataclass(frozen=True, slots=True)
class Frontier:
    """The rows of one request for which a drafter wants to know the likeliest choices.

    Args:
        sampler: Makes the request's choices.
        token_ids: Prompt and output so far.
        paths: Draft tokens before each row, all of one length.
    """

    sampler: Sampler
    token_ids: Sequence[int]
    paths: Sequence[Sequence[int]]


def best_guesses(
    logits: Tensor,  # [F, V]
    frontiers: Sequence[Frontier],
    width: int,
    race_temperature: float,
) -> tuple[TokenLists, LogprobLists]:
    """Return for each row the tokens that are likeliest to be chosen, by a drafter's logits.

    They are ranked by the race that the target will run, and the log of each one's estimated
    probability stands beside it. Tokens that the controls rule out are left out.

    Args:
        logits: The rows of all frontiers, one after the other.
        frontiers: At least one.
        width: Most tokens per row.
        race_temperature: How far drafter and target disagree when sampling.
    """
    if is_numpy(logits) and all(frontier.sampler.is_plain for frontier in frontiers):
        return best_in_race(logits, width, _race_rows(frontiers, logits, race_temperature))
    token_ids: TokenLists = []
    logprobs: LogprobLists = []
    start = 0
    for frontier in frontiers:
        stop, sampler = start + len(frontier.paths), frontier.sampler
        scores = sampler.race_scores(logits[start:stop], frontier.token_ids, frontier.paths)
        found = best_tokens(scores, width, 1.0 if sampler.is_greedy else race_temperature)
        token_ids += found[0]
        logprobs += found[1]
        start = stop
    return token_ids, logprobs


def _race_rows(frontiers: Sequence[Frontier], logits: Tensor, race_temperature: float) -> RaceRows:
    temperatures: list[float] = []
    race_temperatures: list[float] = []
    noise_of: list[int] = []
    noise: list[Tensor] = []
    for frontier in frontiers:
        num_rows, sampler = len(frontier.paths), frontier.sampler
        noise_of += [-1 if sampler.is_greedy else len(noise)] * num_rows
        temperatures += [sampler.temperature or 1.0] * num_rows
        race_temperatures += [1.0 if sampler.is_greedy else race_temperature] * num_rows
        if not sampler.is_greedy:
            position = len(frontier.token_ids) + len(frontier.paths[0])
            noise.append(sampler.noise(position, logits))
    return RaceRows(temperatures, race_temperatures, noise_of, noise)
