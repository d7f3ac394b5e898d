"""A cell of a sweep: rounds until its ratios are known well enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from foretoken.bench.record import counts
from foretoken.bench.runner import System, rotated
from foretoken.bench.statistics import ratio_interval, rounded, spread
from foretoken.bench.sweep.settings import AUTO, PLAIN, CellKey, SweepSettings
from foretoken.bench.sweep.work import SweepWork
from foretoken.bench.systems import Task, Turn

PLAIN_BOUND = 0.98  # what `auto` has to reach of plain decoding's speed
BEST_BOUND = 0.95  # and of the best fixed method's


@dataclass(slots=True)
class Rounds:
    """What a cell gave so far.

    Args:
        names: Of the systems.
        tasks: Those of each round.
        turns: For each round, the turn of each system by name.
    """

    names: Sequence[str]
    tasks: list[list[Task]] = field(default_factory=list)
    turns: list[dict[str, Turn]] = field(default_factory=list)

    def seconds(self, name: str) -> list[float]:
        """Return how long a system took for each round."""
        return [sum(turns[name].unit_s) for turns in self.turns]

    def ratio(self, name: str, base: str) -> dict[str, Any]:
        """Return how many times as fast as another a system is: the median of rounds, and all."""
        ours, theirs = np.array(self.seconds(name)), np.array(self.seconds(base))
        # A round has prompts of its own, so it is rounds that are drawn, not prompts in them.
        interval = ratio_interval(ours[:, None], theirs[:, None])
        ratios = (theirs / ours).tolist()
        return {
            **spread(ratios),
            "interval_95": list(interval),
            "against": base,
            "rounds": [rounded(value) for value in ratios],
        }

    @property
    def best_fixed(self) -> str:
        """The method that does best for all rounds, of those that stay what they are."""
        fixed = [name for name in self.names if name not in (AUTO, PLAIN)]
        return max((PLAIN, *fixed), key=self.median_speed_up)

    def median_speed_up(self, name: str) -> float:
        """Return the median ratio to plain decoding."""
        ratios = np.array(self.seconds(PLAIN)) / np.array(self.seconds(name))
        return float(np.median(ratios))

    def comparisons(self) -> list[dict[str, Any]]:
        """Return the ratios that have to be known: all to plain, and that of `auto` to the best."""
        pairs = [(name, PLAIN) for name in self.names if name != PLAIN]
        if AUTO in self.names and self.best_fixed != PLAIN:
            pairs.append((AUTO, self.best_fixed))
        return [self.ratio(*pair) for pair in pairs]

    def is_known(self, width: float) -> bool:
        """Tell whether no interval is wider than so large a part of its median."""
        return all(_width(ratio) <= width for ratio in self.comparisons())


Say = Callable[[str, str], None]


def measure(
    key: CellKey, systems: Sequence[System], work: SweepWork, settings: SweepSettings, say: Say
) -> Rounds:
    """Return a cell's rounds: as many as settings ask for, and more while intervals are wide.

    Args:
        key: The cell.
        systems: All of them, plain decoding first.
        work: Makes the tasks.
        settings: Of the sweep.
        say: Is told what comes now: where in the sweep, and whose turn it is.
    """
    rounds = Rounds([system.name for system in systems])
    # A whole round that does not count: caches fill, code is compiled, estimates settle.
    _turns(systems, work.tasks(key, settings.max_rounds), key, partial(say, f"{key}, warm-up"))
    while len(rounds.turns) < settings.max_rounds:
        number = len(rounds.turns)
        if number >= settings.rounds and rounds.is_known(settings.width):
            break
        where = f"{key}, round {number + 1} of {settings.rounds} to {settings.max_rounds}"
        tasks = work.tasks(key, number)
        rounds.turns.append(_turns(rotated(systems, number), tasks, key, partial(say, where)))
        rounds.tasks.append(tasks)
    return rounds


def _turns(
    order: Sequence[System], tasks: Sequence[Task], key: CellKey, say: Callable[[str], None]
) -> dict[str, Turn]:
    turns = {}
    for system in order:
        say(system.name)
        turns[system.name] = system.host.run(
            tasks, batch_size=key.batch_size, speculative=system.speculative
        )
    return turns


def as_entry(key: CellKey, rounds: Rounds) -> dict[str, Any]:
    """Return a finished cell as a JSON object."""
    entry: dict[str, Any] = {
        "workload": str(key.workload),
        "temperature": key.temperature,
        "batch_size": key.batch_size,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "num_rounds": len(rounds.turns),
        "num_tokens_per_round": _num_tokens(rounds.turns[0][PLAIN]),
        "best_fixed": rounds.best_fixed,
        "systems": {name: _system(name, rounds) for name in rounds.names},
    }
    if AUTO in rounds.names:
        entry["goals"] = {
            "plain": _goal(rounds.ratio(AUTO, PLAIN), PLAIN_BOUND),
            "best_fixed": _goal(rounds.ratio(AUTO, rounds.best_fixed), BEST_BOUND),
        }
    return entry


def _system(name: str, rounds: Rounds) -> dict[str, Any]:
    turns = [by_name[name] for by_name in rounds.turns]
    seconds = rounds.seconds(name)
    rates = [_num_tokens(turn) / time_s for turn, time_s in zip(turns, seconds, strict=True)]
    entry: dict[str, Any] = {"tokens_per_s": spread(rates)}
    if name != PLAIN:
        entry["speed_up"] = rounds.ratio(name, PLAIN)
        entry["differences"] = _differences(name, rounds)
    entry |= counts([output for turn in turns for output in turn.outputs])
    entry["seconds"] = [rounded(value) for value in seconds]
    return entry


def _goal(ratio: dict[str, Any], bound: float) -> dict[str, Any]:
    low, high = ratio["interval_95"]
    return {
        **ratio,
        "bound": bound,
        "holds": ratio["median"] >= bound,
        "is_clear": not low < bound <= high,
    }


def _differences(name: str, rounds: Rounds) -> list[dict[str, Any]]:
    """Return where a method's tokens are not those of plain decoding; there should be none."""
    differences = []
    for number, (tasks, turns) in enumerate(zip(rounds.tasks, rounds.turns, strict=True)):
        for task, ours, theirs in zip(
            tasks, turns[name].outputs, turns[PLAIN].outputs, strict=True
        ):
            pairs = zip(ours.token_ids, theirs.token_ids, strict=True)
            token = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
            if token is not None:
                differences.append(
                    {
                        "round": number,
                        "place": f"the prompt of seed {task.seed}",
                        "text": list(task.prompt_ids),
                        "token": token,
                    }
                )
    return differences


def _num_tokens(turn: Turn) -> int:
    return sum(len(output.token_ids) for output in turn.outputs)


def _width(ratio: dict[str, Any]) -> float:
    low, high = ratio["interval_95"]
    return float((high - low) / ratio["median"])


__all__ = ["BEST_BOUND", "PLAIN_BOUND", "Rounds", "as_entry", "measure"]
