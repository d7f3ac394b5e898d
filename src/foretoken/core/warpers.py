"""Warpers: what reshapes the distribution of one row when sampling, without any history.

Each means what transformers' warper of the same name means, in its order: temperature, top-h,
top-k, top-p, min-p, typical-p, epsilon cutoff, eta cutoff; the next one sees what the last one
left. Probabilities are computed in float64 whatever the logits are in.

There are two forms. `warp_array` takes one row that numpy can read, and looks only at the tokens
that are left: after top-k these are few. `warp_tensor` takes rows on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.jit import jit
from foretoken.core.params import SamplingParams
from foretoken.core.ranking import is_numpy

Logits = NDArray[np.floating]  # [C] of the tokens that are left, in the order of their ids
Kept = NDArray[np.bool_]  # [C]
Filter = Callable[[Logits, float], Kept]

_TOP_H_TOKENS = 100  # as many as transformers' TopHLogitsWarper looks at
_LOWEST = -1e300
_NUM_NEAREST = 1024  # tokens that typical sampling tries before it sorts all


def has_filters(params: SamplingParams) -> bool:
    """Whether anything but a temperature shapes the distribution when sampling."""
    return bool(_filters(params))


def warp(row: Tensor, params: SamplingParams) -> Tensor:
    """Return a row of logits, [V] float32 or float64, reshaped."""
    if not is_numpy(row):
        return warp_tensor(row, params)
    array = row.numpy().copy()
    warp_array(array, params)
    return torch.from_numpy(array)


def warp_array(row: Logits, params: SamplingParams) -> None:
    """Reshape one row, [V], in place: logits of dropped tokens become minus infinity."""
    if params.temperature != 1:
        row /= row.dtype.type(params.temperature)
    if not has_filters(params):
        return
    is_top_k_first = params.top_k and params.top_h is None
    threshold = _kth_largest(row, params.top_k) if is_top_k_first else -np.inf
    ids, logits = _at_least(row, threshold)
    for keep, bound in _filters(params):
        if keep is _keep_top_k and is_top_k_first:
            continue
        if len(ids):
            ids, logits = _compress(ids, logits, keep(logits, bound))
    row.fill(-np.inf)
    row[ids] = logits


def _filters(params: SamplingParams) -> list[tuple[Filter, float]]:
    """Return the filters that are on, in order, each with its parameter."""
    filters: list[tuple[Filter, float]] = []
    if params.top_h is not None:
        filters.append((_keep_top_h, params.top_h))
    if params.top_k:
        filters.append((_keep_top_k, params.top_k))
    if params.top_p < 1:
        filters.append((_keep_top_p, params.top_p))
    if params.min_p > 0:
        filters.append((_keep_min_p, params.min_p))
    if params.typical_p < 1:
        filters.append((_keep_typical, params.typical_p))
    if params.epsilon_cutoff > 0:
        filters.append((_keep_epsilon, params.epsilon_cutoff))
    if params.eta_cutoff > 0:
        filters.append((_keep_eta, params.eta_cutoff))
    return filters


# -- one row, by numpy ---------------------------------------------------------------------------


def _keep_top_h(logits: Logits, share: float) -> Kept:
    best = np.flatnonzero(logits >= _kth_largest(logits, _TOP_H_TOKENS))
    best = best[np.argsort(-logits[best], kind="stable")][:_TOP_H_TOKENS]
    log_probs, probs = _log_probs(logits[best])
    surprise = -probs * log_probs
    kept = np.zeros(len(logits), dtype=np.bool_)
    kept[best[np.cumsum(surprise) <= surprise.sum() * share]] = True
    kept[best[0]] = True
    return kept


def _keep_top_k(logits: Logits, count: float) -> Kept:
    kept: Kept = logits >= _kth_largest(logits, int(count))  # ties with the last one stay
    return kept


def _keep_top_p(logits: Logits, mass: float) -> Kept:
    ascending = np.sort(logits)
    num_dropped = _num_within(_probs(ascending), 1 - mass)
    lowest = ascending[num_dropped]
    # Of equals, the first go, as where they are sorted stably.
    num_equal = num_dropped - int(np.searchsorted(ascending, lowest))
    return _keep_above(logits, lowest, num_equal)


def _keep_min_p(logits: Logits, share: float) -> Kept:
    probs = _probs(logits)
    kept: Kept = probs >= share * probs.max()
    return kept


def _keep_typical(logits: Logits, mass: float) -> Kept:
    log_probs, probs = _log_probs(logits)
    distances = np.abs(-log_probs + (log_probs * probs).sum())
    bound = _typical_bound(distances, probs, mass)
    kept: Kept = distances <= bound
    return kept


def _typical_bound(distances: Logits, probs: Logits, mass: float) -> float:
    """Return the largest distance that is needed to reach a mass; of all if none does."""
    if len(distances) > _NUM_NEAREST:  # the nearest few are enough, unless the mass is large
        near = distances <= np.partition(distances, _NUM_NEAREST)[_NUM_NEAREST]
        nearest, near_probs = distances[near], probs[near]
        order = np.argsort(nearest)
        place = _num_below(near_probs[order], mass)
        if place < len(order):
            return float(nearest[order[place]])
    order = np.argsort(distances)
    place = min(_num_below(probs[order], mass), len(order) - 1)
    return float(distances[order[place]])


def _keep_epsilon(logits: Logits, floor: float) -> Kept:
    kept: Kept = (_probs(logits) >= floor) | (logits == logits.max())
    return kept


def _keep_eta(logits: Logits, epsilon: float) -> Kept:
    log_probs, probs = _log_probs(logits)
    floor = min(epsilon, math.sqrt(epsilon) * math.exp((log_probs * probs).sum()))
    kept: Kept = (probs >= floor) | (logits == logits.max())
    return kept


def _probs(logits: Logits) -> NDArray[np.float64]:
    weights, total, _ = _weights(logits)
    return weights / total


def _log_probs(logits: Logits) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the logarithms of the probabilities, and these."""
    weights, total, shifted = _weights(logits)
    # A probability of zero has no logarithm, and no part in any entropy.
    return np.maximum(shifted - math.log(total), _LOWEST), weights / total


def _weights(logits: Logits) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    shifted = logits.astype(np.float64)
    top = shifted.max()
    if top == np.inf:  # half-precision logits that overflowed: these share all probability
        shifted = np.where(shifted == np.inf, 0.0, -np.inf)
    else:
        shifted -= top
    weights = np.exp(shifted)
    return weights, float(weights.sum()), shifted


def _kth_largest(logits: Logits, count: int) -> float:
    """Return the `count`-th largest entry, minus infinity if there are not as many."""
    if count >= len(logits):
        return -math.inf
    place = len(logits) - count
    return float(np.partition(logits, place)[place])


@jit
def _at_least(row: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and values of entries that are finite and not below a threshold."""
    count = 0
    for token_id in range(len(row)):
        count += (row[token_id] >= threshold) & (row[token_id] > -np.inf)
    ids, values = np.empty(count, dtype=np.int64), np.empty(count, dtype=row.dtype)
    place = 0
    for token_id in range(len(row)):
        if place < count and row[token_id] >= threshold and row[token_id] > -np.inf:
            ids[place], values[place] = token_id, row[token_id]
            place += 1
    return ids, values


@jit
def _compress(
    ids: np.ndarray, logits: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    count = 0
    for place in range(len(kept)):
        count += kept[place]
    left_ids, left = np.empty(count, dtype=ids.dtype), np.empty(count, dtype=logits.dtype)
    count = 0
    for place in range(len(kept)):
        if kept[place]:
            left_ids[count], left[count] = ids[place], logits[place]
            count += 1
    return left_ids, left


@jit
def _num_within(ascending_probs: np.ndarray, bound: float) -> int:
    """Return how many entries have a running sum of at most a bound; never all."""
    total = 0.0
    for place in range(len(ascending_probs) - 1):
        total += ascending_probs[place]
        if total > bound:
            return place
    return len(ascending_probs) - 1


@jit
def _num_below(probs: np.ndarray, mass: float) -> int:
    """Return how many entries have a running sum below a mass."""
    total = 0.0
    for place in range(len(probs)):
        total += probs[place]
        if total >= mass:
            return place
    return len(probs)


@jit
def _keep_above(logits: np.ndarray, lowest: float, num_equal: int) -> np.ndarray:
    """Return which entries are above a value, or equal to it after the first `num_equal`."""
    kept = np.empty(len(logits), dtype=np.bool_)
    for place in range(len(logits)):
        kept[place] = logits[place] > lowest
        if logits[place] == lowest:
            kept[place] = num_equal <= 0
            num_equal -= 1
    return kept


# -- rows on any device, by torch ----------------------------------------------------------------


def warp_tensor(rows: Tensor, params: SamplingParams) -> Tensor:
    """Return rows, [..., V], reshaped; each row gives what `warp_array` makes of it."""
    if params.temperature != 1:
        rows = rows / params.temperature
    for keep, bound in _filters(params):
        dropped = _DROPPED_BY[keep](rows, bound)
        rows = rows.masked_fill(dropped, -torch.inf)
    return rows


def _dropped_by_top_h(rows: Tensor, share: float) -> Tensor:
    count = min(_TOP_H_TOKENS, rows.shape[-1])
    # A stable sort, because topk leaves open which of equals comes first.
    ordered, order = rows.sort(dim=-1, descending=True, stable=True)
    best, order = ordered[..., :count], order[..., :count]
    log_probs = best.double().log_softmax(dim=-1)
    surprise = -(log_probs.exp() * log_probs).nan_to_num(0.0)
    kept = surprise.cumsum(dim=-1) <= surprise.sum(dim=-1, keepdim=True) * share
    kept[..., 0] = True
    return torch.ones_like(rows, dtype=torch.bool).scatter(-1, order, ~kept)


def _dropped_by_top_k(rows: Tensor, count: float) -> Tensor:
    kept = min(int(count), rows.shape[-1])
    return rows < rows.topk(kept, dim=-1).values[..., -1:]


def _dropped_by_top_p(rows: Tensor, mass: float) -> Tensor:
    ascending, order = rows.sort(dim=-1, stable=True)
    dropped = ascending.double().softmax(dim=-1).cumsum(dim=-1) <= 1 - mass
    dropped[..., -1] = False  # the likeliest always stays
    return dropped.scatter(-1, order, dropped)


def _dropped_by_min_p(rows: Tensor, share: float) -> Tensor:
    probs = rows.double().softmax(dim=-1)
    return probs < share * probs.amax(dim=-1, keepdim=True)


def _dropped_by_typical(rows: Tensor, mass: float) -> Tensor:
    log_probs = rows.double().log_softmax(dim=-1)
    probs = rows.double().softmax(dim=-1)
    distances = (-log_probs + _negative_entropy(log_probs)).abs()
    ascending, order = distances.sort(dim=-1, stable=True)
    last = (probs.gather(-1, order).cumsum(dim=-1) < mass).sum(dim=-1, keepdim=True)
    return distances > ascending.gather(-1, last.clamp(max=rows.shape[-1] - 1))


def _dropped_by_epsilon(rows: Tensor, floor: float) -> Tensor:
    probs = rows.double().softmax(dim=-1)
    return (probs < floor) & (rows < rows.amax(dim=-1, keepdim=True))


def _dropped_by_eta(rows: Tensor, epsilon: float) -> Tensor:
    log_probs = rows.double().log_softmax(dim=-1)
    floor = (math.sqrt(epsilon) * _negative_entropy(log_probs).exp()).clamp(max=epsilon)
    return (log_probs.exp() < floor) & (rows < rows.amax(dim=-1, keepdim=True))


def _negative_entropy(log_probs: Tensor) -> Tensor:
    return (log_probs * log_probs.exp()).nansum(dim=-1, keepdim=True)


_DROPPED_BY: dict[Filter, Callable[[Tensor, float], Tensor]] = {
    _keep_top_h: _dropped_by_top_h,
    _keep_top_k: _dropped_by_top_k,
    _keep_top_p: _dropped_by_top_p,
    _keep_min_p: _dropped_by_min_p,
    _keep_typical: _dropped_by_typical,
    _keep_epsilon: _dropped_by_epsilon,
    _keep_eta: _dropped_by_eta,
}
