"""From logits to the target's choice: controls, then greedy or the keyed race."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.controls import build_controls, new_history
from foretoken.core.edits import Edits, edit
from foretoken.core.grammar import GrammarState
from foretoken.core.noise import NoiseBlocks, Stream, keyed_generator
from foretoken.core.params import SamplingParams
from foretoken.core.processors import run_processors
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
from foretoken.core.warpers import has_filters, warp, warp_tensor
from foretoken.errors import RequestError


class Sampler:
    """Makes one request's choices: a pure function of seed, history and logits.

    What it remembers of the history only saves work: a choice costs what the tokens since the
    last one cost, as long as the token ids of a request are one list that only grows.

    Args:
        params: The request's parameters.
        seed: Key of the noise; `params.seed` or a fresh one.
        num_prompt_ids: Length of the prompt; some controls count only what comes after.
        eos_ids: End-of-sequence tokens that end the request; none if it ignores them.
        grammar: What the output must follow, if anything.

    Attributes:
        grammar: As given.
        is_greedy: Whether the largest score wins, without noise.
        is_plain: Whether nothing but a temperature shapes the scores. What they are ranked by is
            then computed in one sweep, without tensors in between.
        is_argmax: Whether a choice is the argmax of the raw logits, whatever came before.
        temperature: 0 if greedy.
        failure: What went wrong in a control of the request's own, such as a user's processor,
            when the target was to choose. Choices made after it mean nothing; the engine ends
            the request, and no other. What goes wrong about a draft's rows only leaves less to
            draft: plain decoding would not have come there.
        failed_at: Position of the choice that failed; those before it stand.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        num_prompt_ids: int,
        *,
        eos_ids: frozenset[int] = frozenset(),
        grammar: GrammarState | None = None,
    ) -> None:
        self.grammar = grammar
        self.failure: RequestError | None = None
        self.failed_at: int | None = None
        self.is_greedy = params.is_greedy
        self.temperature = params.temperature
        self._params = params
        self._seed = seed
        self._noise = NoiseBlocks(seed)
        self._controls = build_controls(params, eos_ids, grammar)
        self._history = new_history(params, num_prompt_ids)
        self._has_controls = bool(self._controls or params.logits_processors)
        self.is_argmax = self.is_greedy and not self._has_controls
        is_shaped = not self.is_greedy and has_filters(params)
        self.is_plain = not (self._has_controls or is_shaped)

    def choose(
        self,
        logits: Tensor,  # [V]
        token_ids: Sequence[int],
        path: Sequence[int] = (),
    ) -> int:
        """Return the target's token after `token_ids` and `path`.

        Greedy takes the largest logit, ties to the lowest id; sampling takes the winner of the
        keyed race, an exact draw from the processed distribution. Where the controls leave no
        token or one of them fails, `failure` says why and the token means nothing.

        Args:
            logits: The target's row at that position.
            token_ids: Prompt and output so far.
            path: Draft tokens accepted since.
        """
        position = len(token_ids) + len(path)
        if self.is_plain and not self.is_greedy and is_numpy(logits):
            return race_winner(logits, self.noise(position, logits), self.temperature)
        row = self._target_row(logits, token_ids, path)
        if self.is_greedy:
            [chosen_id] = argmax_ids(row.unsqueeze(0))
        elif is_numpy(row):
            chosen_id = race_winner(row, self.noise(position, row), 1.0)
        else:
            [chosen_id] = argmax_ids((row + self.noise(position, row)).unsqueeze(0))
        if not self.is_plain and row[chosen_id] == -torch.inf:
            self._fail_for_want_of_tokens(position)
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
        A row is all minus infinity where no token is left.

        Args:
            logits: One row per path.
            token_ids: Prompt and output so far.
            paths: Draft tokens before each row; all of one length, so that all rows choose the
                token of one position.
        """
        scores = self.scores(logits, token_ids, paths)
        if self.is_greedy:
            return scores
        return scores + self.noise(len(token_ids) + len(paths[0]), scores)

    def scores(
        self,
        logits: Tensor,  # [F, V]
        token_ids: Sequence[int],
        paths: Sequence[Sequence[int]],
    ) -> Tensor:  # [F, V] float32 or float64
        """Return the logits with every control applied; arguments as for `race_scores`.

        For drafters too, whose rows never fail the request: what goes wrong leaves a row of minus
        infinity, and so nothing to draft.
        """
        rows = _as_real(logits)
        if self.is_plain or not (self._has_controls or is_numpy(rows)):
            return rows if self.is_greedy else warp_tensor(rows, self._params)
        controlled = []
        for row, path in zip(rows, paths, strict=True):
            try:
                controlled.append(self._controlled(row, token_ids, path))
            except RequestError:
                controlled.append(torch.full_like(row, -torch.inf))
        return torch.stack(controlled)

    def distribution(
        self,
        logits: Tensor,  # [V]
        token_ids: Sequence[int],
        path: Sequence[int] = (),
    ) -> NDArray[np.float64]:  # [V]
        """Return the distribution that `choose` draws from; all of it on one token if greedy.

        For the target's rows: where no token is left, `failure` is set, as by `choose`, and the
        distribution means nothing. Arguments as for `choose`.
        """
        probs = self._probabilities(self._target_row(logits, token_ids, path))
        if not probs.any():
            self._fail_for_want_of_tokens(len(token_ids) + len(path))
            probs[0] = 1.0
        return probs

    def draft_distribution(
        self,
        logits: Tensor,  # [V]
        token_ids: Sequence[int],
        path: Sequence[int] = (),
    ) -> NDArray[np.float64]:  # [V]
        """Return what `distribution` does, for a drafter's own row: all zeros if none is left.

        A drafter that sees zeros has nothing to draft there; the request goes on.
        """
        return self._probabilities(self.scores(logits.unsqueeze(0), token_ids, [path])[0])

    def fail(self, error: RequestError, position: int) -> None:
        """Note that the choice at a position went wrong; the first error stays."""
        if self.failure is None:
            self.failure, self.failed_at = error, position

    def generator(self, stream: Stream, *keys: int) -> np.random.Generator:
        """Return randomness of this request that depends on nothing but its keys."""
        return keyed_generator(self._seed, stream, *keys)

    def noise(self, position: int, scores: Tensor) -> Tensor:
        """Return the noise of the choice made at a position, [V] float64, to go with scores."""
        return self._noise.row(position, scores.shape[-1], scores.device)

    def noise_rows(self, position: int, vocab_size: int, num_wanted: int) -> tuple[Tensor, ...]:
        """Return the noise of the choices from a position on; as for `NoiseBlocks.rows`."""
        return self._noise.rows(position, vocab_size, num_wanted)

    def _target_row(self, logits: Tensor, token_ids: Sequence[int], path: Sequence[int]) -> Tensor:
        """Return the target's row with every control applied; note what goes wrong."""
        row = _as_real(logits)
        try:
            return self._controlled(row, token_ids, path)
        except RequestError as error:
            self.fail(error, len(token_ids) + len(path))
            return torch.zeros_like(row)

    def _controlled(self, row: Tensor, token_ids: Sequence[int], path: Sequence[int]) -> Tensor:
        """Return one row, [V], with every control applied.

        Raises:
            RequestError: A control of the request's own failed.
        """
        if self._has_controls:
            edits = Edits()
            self._history.move_to(token_ids, path)
            for control in self._controls.values():
                control(edits, self._history)
            row = edit(row, edits)
        if self._params.logits_processors:
            row = run_processors(self._params.logits_processors, row, self._history.array)
            if self.grammar is not None:  # it holds whatever they return
                row = edit(row, Edits(masks=[self.grammar.allowed(token_ids, path)]))
        return row if self.is_greedy else warp(row, self._params)

    def _probabilities(self, row: Tensor) -> NDArray[np.float64]:
        """Return what a row of scores stands for, [V]; all zeros if no token is left."""
        probs = np.zeros(len(row))
        [likeliest_id] = argmax_ids(row.unsqueeze(0))
        if row[likeliest_id] == -torch.inf:
            return probs
        if self.is_greedy:
            probs[likeliest_id] = 1.0
            return probs
        return row.double().softmax(dim=-1).cpu().numpy()

    def _fail_for_want_of_tokens(self, position: int) -> None:
        names = list(self._controls)
        if self._params.logits_processors:
            names.append("logits_processors")
        error = RequestError(
            f"no token is left to choose after {position} tokens of prompt and output; one is "
            f"needed, and in force are {', '.join(names) or 'no controls'}",
            hint="relax a control" if names else "check the model: its logits are minus infinity",
        )
        self.fail(error, position)


def _as_real(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


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
        race_temperature: How far drafter and target disagree.
    """
    if is_numpy(logits) and all(frontier.sampler.is_plain for frontier in frontiers):
        return best_in_race(logits, width, _race_rows(frontiers, logits, race_temperature))
    token_ids: TokenLists = []
    logprobs: LogprobLists = []
    start = 0
    for frontier in frontiers:
        stop, sampler = start + len(frontier.paths), frontier.sampler
        scores = sampler.race_scores(logits[start:stop], frontier.token_ids, frontier.paths)
        found = best_tokens(scores, width, race_temperature)
        token_ids += found[0]
        logprobs += found[1]
        start = stop
    return token_ids, logprobs


def _race_rows(frontiers: Sequence[Frontier], logits: Tensor, race_temperature: float) -> RaceRows:
    temperatures: list[float] = []
    noise_of: list[int] = []
    noise: list[Tensor] = []
    for frontier in frontiers:
        num_rows, sampler = len(frontier.paths), frontier.sampler
        noise_of += [-1 if sampler.is_greedy else len(noise)] * num_rows
        temperatures += [sampler.temperature or 1.0] * num_rows
        if not sampler.is_greedy:
            position = len(frontier.token_ids) + len(frontier.paths[0])
            noise.append(sampler.noise(position, logits))
    return RaceRows(temperatures, race_temperature, noise_of, noise)
