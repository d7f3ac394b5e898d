"""What rounds of one temperature and batch size say about every way to decode."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.bench.speed.lanes import Turn
from foretoken.bench.speed.settings import CHECKS, PLAIN, SHARED, Way
from foretoken.bench.statistics import ratio_interval, rounded, spread
from foretoken.planner.in_flight import TickReport
from foretoken.planner.pipeline_model import eager_ticks, full_flight, lazy_ticks

PREDICTION_BOUND = 0.10  # how far a measured speed-up may be from what its parts predict
EAGER_BOUND = 1.1  # what the eager check is wanted to gain over the lazy one
SPEED_UP_BOUND, AGREEMENT_BOUND = 2.0, 0.8  # speed-up wanted where first guesses agree so often
_BASE = Way(SHARED, PLAIN).name


@dataclass(slots=True)
class Rounds:
    """Turns of every way.

    Args:
        ways: In the order of reports.
        loops: Of the shared model.
        batch_size: Prompts at once.
        temperature: Of sampling.
        turns: For each round, the turn of each way by name.
    """

    ways: Sequence[Way]
    loops: int
    batch_size: int
    temperature: float
    turns: list[dict[str, Turn]] = field(default_factory=list)

    def seconds(self, name: str) -> NDArray[np.float64]:
        """Return decode seconds of a way, [rounds, batches of prompts]."""
        return np.array([turns[name].decode_s for turns in self.turns])

    def token_ms(self, name: str) -> list[float]:
        """Return milliseconds per token of each round, as one request sees it."""
        num_tokens = sum(
            max(map(len, ids)) - 1 for ids in self._batches(self.turns[0][name].output_ids)
        )
        return [1000.0 * float(row.sum()) / num_tokens for row in self.seconds(name)]

    def _batches(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        return [
            items[start : start + self.batch_size]
            for start in range(0, len(items), self.batch_size)
        ]

    def ratio(self, name: str, base: str) -> dict[str, Any]:
        """Return how many times as fast as another a way decodes: median of rounds, and all."""
        ours, theirs = self.seconds(name), self.seconds(base)
        ratios = (theirs.sum(axis=1) / ours.sum(axis=1)).tolist()
        return {
            **spread(ratios),
            "interval_95": list(ratio_interval(ours, theirs)),
            "against": base,
            "rounds": [rounded(value) for value in ratios],
        }


def as_entry(rounds: Rounds) -> dict[str, Any]:
    """Return a finished cell as a JSON object."""
    entry: dict[str, Any] = {
        "temperature": rounds.temperature,
        "batch_size": rounds.batch_size,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "num_rounds": len(rounds.turns),
        "systems": {way.name: _way(way, rounds) for way in rounds.ways},
    }
    entry["eager_over_lazy"] = {
        str(exit_loop): rounds.ratio(*(f"{check} e={exit_loop}" for check in CHECKS))
        for exit_loop in _exit_loops_of_both(rounds.ways)
    }
    return entry


def _exit_loops_of_both(ways: Sequence[Way]) -> list[int]:
    counts = Counter(way.exit_loop for way in ways if way.is_fixed)
    return [exit_loop for exit_loop, count in counts.items() if count == len(CHECKS)]


def _way(way: Way, rounds: Rounds) -> dict[str, Any]:
    token_ms = rounds.token_ms(way.name)
    entry: dict[str, Any] = {"model": way.model, "token_ms": spread(token_ms)}
    if way.name != _BASE:
        entry["speed_up"] = rounds.ratio(way.name, _BASE)
    if way.model == SHARED and way.kind != PLAIN:
        entry |= _flight(way, rounds)
        entry["differences"] = _differences(way.name, rounds)
    seconds = rounds.seconds(way.name)
    entry["unit_s"] = [[rounded(value) for value in row] for row in seconds.tolist()]
    return entry


def _flight(way: Way, rounds: Rounds) -> dict[str, Any]:
    """Return what came of rows in flight, beside what the model of the pipeline says."""
    turns = [turns[way.name] for turns in rounds.turns]
    reports = [report for turn in turns for report in turn.reports]
    ticks = [report for report in reports if not report.is_pass]
    entry: dict[str, Any] = {"num_passes": len(reports) - len(ticks)}
    num_ticks = [count for turn in turns for count in turn.num_ticks]
    if entry["num_passes"] == 0 and all(num_ticks):
        entry["ticks_per_token"] = rounded(_ticks_per_token(turns, rounds.loops))
    if ticks:
        entry["tick_ms"] = rounded(1000.0 * float(np.mean([it.tick_s for it in ticks])))
        rows = [report.num_rows / report.num_requests for report in ticks]
        entry["rows"] = {"mean": rounded(float(np.mean(rows))), "most": int(max(rows))}
    if way.is_fixed:
        entry |= _model(way, ticks, rounds, entry)
    return entry


def _ticks_per_token(turns: Sequence[Turn], loops: int) -> float:
    """Return ticks from one token's row to the next one's.

    The last row of each prompt goes all the way alone, `loops` ticks that no other follows.
    """
    num_ticks = sum(sum(turn.num_ticks) for turn in turns)
    num_rows = sum(len(ids) - 1 for turn in turns for ids in turn.output_ids)
    num_prompts = sum(len(turn.output_ids) for turn in turns)
    return (num_ticks - loops * num_prompts) / max(1, num_rows - num_prompts)


def _model(
    way: Way, ticks: Sequence[TickReport], rounds: Rounds, measured: Mapping[str, Any]
) -> dict[str, Any]:
    loops, settled = rounds.loops, [since for report in ticks for since in report.settled]
    if not settled or "ticks_per_token" not in measured:
        return {}
    agreement = sum(most <= way.exit_loop for _, most in settled) / len(settled)
    if way.kind == "lazy":
        entry: dict[str, Any] = {"agreement": rounded(agreement)}
        expected = lazy_ticks(agreement, loops, way.exit_loop)
    else:
        counts = Counter(most for _, most in settled)
        settle = [counts[depth] / len(settled) for depth in range(1, loops + 1)]
        entry = {"agreement": rounded(agreement), "settle": [rounded(share) for share in settle]}
        expected = eager_ticks(settle, way.exit_loop)
    num_tokens = len(rounds.turns[0][way.name].output_ids[0]) - 1
    ticks_of_prompt = expected * (num_tokens - 1) + loops
    pass_ms = float(np.median(rounds.token_ms(_BASE)))
    predicted = pass_ms * num_tokens / (ticks_of_prompt * measured["tick_ms"])
    ratio = rounds.ratio(way.name, _BASE)["median"] / predicted
    return {
        **entry,
        "exit_loop": way.exit_loop,
        "ticks_per_token_of_the_model": rounded(expected),
        "most_rows_allowed": full_flight(loops, way.exit_loop),
        "predicted_speed_up": rounded(predicted),
        "measured_over_predicted": rounded(ratio),
    }


def _differences(name: str, rounds: Rounds) -> list[dict[str, Any]]:
    """Return where a way's tokens are not those of plain decoding; there should be none."""
    differences = []
    for number, turns in enumerate(rounds.turns):
        pairs = zip(turns[name].output_ids, turns[_BASE].output_ids, strict=True)
        for prompt, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                places = zip(ours, theirs, strict=False)
                token = next((n for n, (one, two) in enumerate(places) if one != two), 0)
                differences.append(
                    {
                        "round": number,
                        "place": f"prompt {prompt}",
                        "text": list(theirs[: token + 1]),
                        "token": token,
                    }
                )
    return differences


__all__ = [
    "AGREEMENT_BOUND",
    "EAGER_BOUND",
    "PREDICTION_BOUND",
    "SPEED_UP_BOUND",
    "Rounds",
    "as_entry",
]
