"""The largest entries of rows of scores: argmax, and the best few with their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foretoken.core.jit import jit

# Rows are read in runs of this many entries, by loops that compilers turn into vector code: they
# count or add lane by lane, where a maximum, an early exit or one running sum would be serial.
_RUN = 64
# exp(x) is computed as exp(x / 2**6) ** 2**6, for x above this; below, it counts as 0. The error
# is highest there, and less than a thousandth of a term that is 1e-7.
_NUM_SQUARINGS = 6
_LOWEST = -16.0 / 2**_NUM_SQUARINGS

_NO_NOISE = np.empty((0, 0))

TokenLists = list[list[int]]
LogprobLists = list[list[float]]


def argmax_ids(scores: Tensor) -> list[int]:
    """Return the index of the largest entry of each row of [R, V], ties to the lowest.

    On CPU by numpy, whose argmax is seven to twelve times as fast as torch's.
    """
    ids: list[int]
    if is_numpy(scores):
        ids = scores.numpy().argmax(axis=-1).tolist()
    else:
        ids = scores.argmax(dim=-1).tolist()
    return ids


def best_tokens(
    scores: Tensor, width: int, temperature: float = 1.0
) -> tuple[TokenLists, LogprobLists]:
    """Return the `width` largest entries of each row of [R, V], best first, ties to the lowest id.

    Beside each stands the log of its softmax at a temperature, an estimate: what is e**16 times
    less likely than the best is left out of the sum. Entries of minus infinity are not returned,
    so a list may be shorter.
    """
    if is_numpy(scores):
        return best_in_race(scores, width, RaceRows.without_noise(len(scores), temperature))
    width = min(width, scores.shape[-1])
    best = (scores.float() / temperature).log_softmax(dim=-1).topk(width, dim=-1)
    counts = (best.values > -math.inf).sum(dim=-1).tolist()
    return _cut(best.indices.tolist(), best.values.tolist(), counts)


@dataclass(frozen=True, slots=True)
class RaceRows:
    """What is added to rows of logits: row r becomes `logits[r] / temperatures[r] + noise`.

    Args:
        temperatures: Of the requests, [R].
        race_temperature: Of the softmax over the sums.
        noise_of: Index of each row's noise, [R]; -1 for none.
        noise: Rows of noise, each [V] float64.
    """

    temperatures: Sequence[float]
    race_temperature: float
    noise_of: Sequence[int]
    noise: Sequence[Tensor]

    @classmethod
    def without_noise(cls, num_rows: int, race_temperature: float = 1.0) -> RaceRows:
        """Return what leaves rows as they are."""
        return cls((1.0,) * num_rows, race_temperature, (-1,) * num_rows, ())


def best_in_race(logits: Tensor, width: int, race: RaceRows) -> tuple[TokenLists, LogprobLists]:
    """Return what `best_tokens` does, of the sums of logits and noise, in one sweep.

    Args:
        logits: Rows that numpy can read, [R, V].
        width: How many are wanted.
        race: What is added to them.
    """
    rows = np.ascontiguousarray(logits.numpy())
    noise = [row.numpy() for row in race.noise]
    found = _best_of_rows(
        rows,
        min(width, rows.shape[1]),
        np.array(race.temperatures, dtype=rows.dtype),
        float(race.race_temperature),
        np.array(race.noise_of),
        _stacked(noise),
    )
    ids, logprobs, counts = found
    return _cut(ids.tolist(), logprobs.tolist(), counts.tolist())


def _stacked(noise: Sequence[np.ndarray]) -> np.ndarray:
    """Return rows of noise as one array, [N, V]; one alone, the usual case, without a copy."""
    if len(noise) == 1:
        return noise[0].reshape(1, -1)
    return np.stack(noise) if noise else _NO_NOISE


def race_winner(logits: Tensor, noise: Tensor, temperature: float) -> int:
    """Return the largest entry of `logits / temperature + noise`, ties to the lowest id.

    Args:
        logits: A row that numpy can read, [V].
        noise: [V] float64.
        temperature: The request's.
    """
    row = logits.numpy()
    return _winner(row, noise.numpy(), row.dtype.type(temperature))


def is_numpy(scores: Tensor) -> bool:
    """Whether numpy can read the scores where they are; it knows no bfloat16."""
    return scores.dtype in (torch.float32, torch.float64) and scores.is_cpu


def _cut(
    ids: TokenLists, logprobs: LogprobLists, counts: list[int]
) -> tuple[TokenLists, LogprobLists]:
    for row, count in enumerate(counts):
        if count < len(ids[row]):
            del ids[row][count:], logprobs[row][count:]
    return ids, logprobs


@jit
def _winner(row: np.ndarray, noise: np.ndarray, temperature: float) -> int:
    best, winner = -np.inf, 0
    for start in range(0, len(row), _RUN):
        run, run_noise = row[start : start + _RUN], noise[start : start + _RUN]
        num_above = 0
        for lane in range(len(run)):
            num_above += run[lane] / temperature + run_noise[lane] > best
        if num_above:
            for lane in range(len(run)):
                score = run[lane] / temperature + run_noise[lane]
                if score > best:
                    best, winner = score, start + lane
    return winner


@jit
def _best_of_rows(
    rows: np.ndarray,
    width: int,
    temperatures: np.ndarray,
    race_temperature: float,
    noise_of: np.ndarray,
    noise: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_rows, vocab_size = rows.shape
    ids = np.zeros((num_rows, width), dtype=np.int64)
    best = np.empty((num_rows, width))
    counts = np.zeros(num_rows, dtype=np.int64)
    scores, no_noise = np.empty(vocab_size), np.empty(0)
    for index in range(num_rows):
        row_noise = no_noise
        if noise_of[index] >= 0:
            row_noise = noise[noise_of[index]]
        counts[index] = rank_row(
            rows[index],
            temperatures[index],
            race_temperature,
            row_noise,
            scores,
            best[index],
            ids[index],
        )
    return ids, best, counts


@jit
def rank_row(
    row: np.ndarray,
    temperature: float,
    race_temperature: float,
    noise: np.ndarray,
    scores: np.ndarray,
    best: np.ndarray,
    ids: np.ndarray,
) -> int:
    """Rank the entries of `row / temperature + noise`, for other compiled code.

    Args:
        row: Logits, [V].
        temperature: Of the request, in the logits' type.
        race_temperature: Of the softmax over the sums.
        noise: [V], or empty for none.
        scores: Room for the sums, [V].
        best: Written to: log-probabilities of the largest entries, descending, [width].
        ids: Written to: their token ids, [width].

    Returns:
        How many were found.
    """
    for token_id in range(len(row)):
        scores[token_id] = row[token_id] / temperature
    for token_id in range(len(noise)):
        scores[token_id] += noise[token_id]
    best[:] = -np.inf
    count = _select(scores, best, ids)
    top = best[0]
    log_total = _log_total(scores, top, race_temperature)
    for place in range(count):
        best[place] = (best[place] - top) / race_temperature - log_total
    return count


@jit
def _select(row: np.ndarray, best: np.ndarray, ids: np.ndarray) -> int:
    """Write the largest entries of a row, descending, and their indices; return how many."""
    count, last = 0, len(best) - 1
    for start in range(0, len(row), _RUN):
        run = row[start : start + _RUN]
        floor = best[last]  # minus infinity until all places are taken
        num_above = 0
        for lane in range(len(run)):
            num_above += run[lane] > floor
        if num_above == 0:
            continue
        for lane in range(len(run)):
            score = run[lane]
            if score > best[last]:
                place = last
                while place > 0 and best[place - 1] < score:
                    best[place], ids[place] = best[place - 1], ids[place - 1]
                    place -= 1
                best[place], ids[place] = score, start + lane
                count += 1
    return min(count, len(best))


@jit
def _log_total(row: np.ndarray, top: float, temperature: float) -> float:
    """Return the log of the sum of exp((score - top) / temperature)."""
    scale = 1 / (temperature * 2**_NUM_SQUARINGS)
    totals = np.zeros(_RUN)
    for start in range(0, len(row), _RUN):
        run = row[start : start + _RUN]
        for lane in range(len(run)):
            x = (run[lane] - top) * scale
            power = 1 + x * (1 + x * (1 / 2 + x * (1 / 6 + x / 24)))
            for _ in range(_NUM_SQUARINGS):
                power *= power
            totals[lane] += power if x > _LOWEST else 0.0
    return math.log(totals.sum())
