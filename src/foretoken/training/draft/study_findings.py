"""The findings of "Decoding Speculative Decoding", shown or refuted by a study's numbers.

Source: arXiv:2402.01528: a draft's latency decides its worth, depth decides its latency, and how
well it models language says little about what it gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from foretoken.training.draft.study_record import Candidate
from foretoken.training.draft.study_shapes import TOLERANCE


def findings(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return what the candidates' numbers say of the paper's findings, for JSON.

    Returns:
        `latency`: exponents of depth and of parameters in the draft's time, with the variance
            that they explain; None with fewer than four candidates or one depth.
        `equal_parameters`: for each family the slowdown of its deepest member over its shallowest.
        `better_but_slower`: of pairs of trained candidates, how many of those with the lower
            cross-entropy have the lower predicted speed-up, and the most telling pair.
    """
    whole = [it for it in candidates if it.vocab == max(other.vocab for other in candidates)]
    return {
        "latency": latency_exponents(whole),
        "equal_parameters": [_deep_and_shallow(it) for it in families(whole) if len(it) > 1],
        "better_but_slower": _better_but_slower([it for it in candidates if it.is_trained]),
    }


def families(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return groups of like numbers of parameters and different depths, shallowest first."""
    groups: list[list[Candidate]] = []
    for candidate in sorted(candidates, key=lambda it: it.num_parameters):
        first = groups[-1][0] if groups else None
        is_near = first and candidate.num_parameters <= (1 + 2 * TOLERANCE) * first.num_parameters
        if is_near and candidate.layers not in [it.layers for it in groups[-1]]:
            groups[-1].append(candidate)
        elif not is_near:
            groups.append([candidate])
    return [sorted(group, key=lambda it: it.layers) for group in groups]


def latency_exponents(candidates: Sequence[Candidate]) -> dict[str, float] | None:
    """Fit ln t = c + alpha ln L + beta ln P by least squares; None if there is too little to fit.

    Doubling the depth at equal parameters makes a draft 2^alpha times as slow; doubling the
    parameters at equal depth, 2^beta times.
    """
    sizes = np.log([[it.layers, it.num_parameters] for it in candidates]).reshape(-1, 2)
    terms = np.column_stack([np.ones(len(sizes)), sizes])
    if len(candidates) < 4 or np.linalg.matrix_rank(terms) < 3:
        return None
    times = np.log([it.draft_ms.median for it in candidates])
    solution = np.linalg.lstsq(terms, times, rcond=None)[0]
    missed = ((times - terms @ solution) ** 2).sum()
    total = ((times - times.mean()) ** 2).sum()
    return {
        "depth": float(solution[1]),
        "parameters": float(solution[2]),
        "explained": float(1 - missed / total) if total else 0.0,
    }


def _deep_and_shallow(family: Sequence[Candidate]) -> dict[str, Any]:
    shallow, deep = family[0], family[-1]
    return {
        "num_parameters": shallow.num_parameters,
        "shallow": shallow.shape,
        "deep": deep.shape,
        "times_the_depth": deep.layers / shallow.layers,
        "times_the_latency": deep.draft_ms.median / shallow.draft_ms.median,
        "shallow_speed_up": shallow.speed_up,
        "deep_speed_up": deep.speed_up,
    }


def _better_but_slower(trained: Sequence[Candidate]) -> dict[str, Any]:
    pairs = [
        sorted(pair, key=lambda it: it.cross_entropy or 0.0) for pair in combinations(trained, 2)
    ]
    slower = [pair for pair in pairs if pair[0].speed_up < pair[1].speed_up]
    result: dict[str, Any] = {"num_pairs": len(pairs), "num_slower": len(slower)}
    if slower:
        better, faster = max(slower, key=lambda pair: pair[1].speed_up / pair[0].speed_up)
        result |= {
            "better": better.shape,
            "better_cross_entropy": better.cross_entropy,
            "better_speed_up": better.speed_up,
            "faster": faster.shape,
            "faster_cross_entropy": faster.cross_entropy,
            "faster_speed_up": faster.speed_up,
        }
    return result


__all__ = ["families", "findings", "latency_exponents"]
