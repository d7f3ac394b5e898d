"""Recorded arrivals: when requests came and how long they were, cut and scaled to what is served.

The format is that of the Azure LLM inference traces (github.com/Azure/AzurePublicDataset): a CSV
file with the columns TIMESTAMP, ContextTokens and GeneratedTokens. Such a trace has lengths but no
texts, and does not say what prompts share.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from foretoken.errors import ConfigError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
Lengths: TypeAlias = NDArray[np.int64]  # [requests]

QUANTILE = 0.99  # the length that is scaled to the limit; what is longer is cut to it


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Args:
        at_s: When it comes, from the beginning.
        num_prompt_ids: Tokens of its prompt.
        num_new_tokens: Tokens of its output.
    """

    at_s: float
    num_prompt_ids: int
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals in the order of their time.

    Args:
        name: Of the file, without its folder.
        arrivals: At least one.
        length_s: Of the time that they are all of.
    """

    name: str
    arrivals: tuple[Arrival, ...]
    length_s: float

    def scaled(self, context_limit: int, max_prompt: int | None, max_new: int | None) -> Trace:
        """Return the trace with lengths that fit a model.

        Prompts and outputs are scaled by one ratio, by which 99 % of the requests fit the context,
        so that they stand to each other as in the trace. A bound that is given makes a ratio of
        its own, by which 99 % of its lengths are within it. What is still too long is cut.

        Args:
            context_limit: Most tokens of a prompt and its output together.
            max_prompt: Bound of prompts; None for none.
            max_new: Bound of outputs; None for none.
        """
        prompts = np.array([item.num_prompt_ids for item in self.arrivals])
        outputs = np.array([item.num_new_tokens for item in self.arrivals])
        both = context_limit / float(np.quantile(prompts + outputs, QUANTILE))
        most = context_limit - 1  # a prompt has at least one token
        outputs = _fitted(outputs, both if max_new is None else None, min(max_new or most, most))
        prompts = _fitted(prompts, both if max_prompt is None else None, max_prompt or most)
        prompts = np.minimum(prompts, context_limit - outputs)
        arrivals = tuple(
            replace(item, num_prompt_ids=num_prompt, num_new_tokens=num_new)
            for item, num_prompt, num_new in zip(
                self.arrivals, prompts.tolist(), outputs.tolist(), strict=True
            )
        )
        return replace(self, arrivals=arrivals)

    def part(self, first: int, requests_per_s: float, duration_s: float) -> list[Arrival]:
        """Return successive arrivals at another pace; after the last one comes the first one.

        Bursts and pauses stay, but times are scaled by one factor, by which the part's own rate is
        the one that is wanted. There is at least one arrival, and none comes twice.

        Args:
            first: Index of the first one.
            requests_per_s: The rate that is wanted.
            duration_s: Until the arrival that would be the next one.
        """
        num_all = len(self.arrivals)
        num_arrivals = min(num_all, max(1, round(requests_per_s * duration_s)))
        begin_s = self.arrivals[first].at_s
        length_s = self._time_s(first + num_arrivals) - begin_s
        scale = num_arrivals / requests_per_s / length_s if length_s else 0.0
        return [
            replace(self.arrivals[index % num_all], at_s=(self._time_s(index) - begin_s) * scale)
            for index in range(first, first + num_arrivals)
        ]

    def _time_s(self, index: int) -> float:
        """Return when an arrival comes if the trace is repeated for ever."""
        lap, place = divmod(index, len(self.arrivals))
        return lap * self.length_s + self.arrivals[place].at_s


def load_trace(path: Path, minutes: float) -> Trace:
    """Return the first minutes of a trace.

    Args:
        path: The CSV file.
        minutes: How many, above 0.

    Raises:
        ConfigError: The file cannot be read, or is not such a trace.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(lines)]
        times = [datetime.fromisoformat(time) for time, _, _ in rows]
        lengths = [(int(num_prompt), int(num_new)) for _, num_prompt, num_new in rows]
        seconds = [(time - times[0]).total_seconds() for time in times]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, repr(error)) from error
    arrivals = [
        Arrival(at_s, *both)
        for at_s, both in sorted(zip(seconds, lengths, strict=True))
        if at_s < 60 * minutes
    ]
    if not arrivals or min(min(item.num_prompt_ids, item.num_new_tokens) for item in arrivals) < 1:
        raise _unreadable(path, "a request without tokens, or no request at all")
    return Trace(path.name, tuple(arrivals), 60 * minutes)


def _unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path.name} is no trace of requests: {reason}",
        hint=f"give a CSV file with the columns {', '.join(COLUMNS)}, as Azure publishes them",
    )


def _fitted(lengths: Lengths, ratio: float | None, most: int) -> Lengths:
    """Return lengths scaled by a ratio, or by that which brings 99 % of them within the most."""
    if ratio is None:
        ratio = most / float(np.quantile(lengths, QUANTILE))
    fitted: Lengths = np.clip(np.rint(lengths * ratio).astype(np.int64), 1, most)
    return fitted


def mean_lengths(arrivals: Sequence[Arrival]) -> tuple[float, float]:
    """Return the mean tokens of prompts and of outputs."""
    return (
        float(np.mean([item.num_prompt_ids for item in arrivals])),
        float(np.mean([item.num_new_tokens for item in arrivals])),
    )


__all__ = ["Arrival", "Trace", "load_trace", "mean_lengths"]
