"""A cell of a sweep: rounds until its ratios are known well enough."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from foretoken.bench.record import counts
from foretoken.bench.statistics import ratio_interval, rounded, spread
from foretoken.bench.sweep.schedule import PausingSystem, Schedule, orders
from foretoken.bench.sweep.settings import AUTO, PLAIN, PLAIN_AGAIN, CellKey, SweepSettings
from foretoken.bench.sweep.work import SweepWork
from foretoken.bench.systems import Task, Turn, joined

PLAIN_BOUND = 0.98  # what `auto` has to reach of plain decoding's speed
BEST_BOUND = 0.95  # and of the best fixed method's


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a round.

    Args:
        tasks: What every system did.
        turns: How it did, by the system's name; all its turns of the slice as one.
    """

    tasks: Sequence[Task]
    turns: dict[str, Turn]


@dataclass(slots=True)
class Rounds:
    """What a cell gave so far.

    Args:
        names: Of the systems.
        rounds: Each is some slices.
    """

    names: Sequence[str]
    rounds: list[list[Slice]] = field(default_factory=list)

    @property
    def slices(self) -> list[Slice]:
        """Those of all rounds."""
        return [part for parts in self.rounds for part in parts]

    def seconds(self, name: str) -> list[float]:
        """Return how long a system took for each slice."""
        return [sum(part.turns[name].unit_s) for part in self.slices]

    def cpu_seconds(self, name: str) -> list[float]:
        """Return what a system took of the processor for each slice; empty if nobody counted."""
        counted = [part.turns[name].cpu_s for part in self.slices]
        return [seconds for seconds in counted if seconds is not None]

    def ratio(self, name: str, base: str) -> dict[str, Any]:
        """Return how many times as fast as another a system is: the median of slices, and all."""
        ratio = _ratio(self.seconds(name), self.seconds(base))
        cpu_seconds = self.cpu_seconds(name)
        by_cpu = {"cpu": _ratio(cpu_seconds, self.cpu_seconds(base))} if cpu_seconds else {}
        return {**ratio, "against": base, **by_cpu}

    @property
    def fixed(self) -> list[str]:
        """The methods that stay what they are."""
        return [name for name in self.names if name not in (PLAIN, PLAIN_AGAIN, AUTO)]

    @property
    def best_fixed(self) -> str:
        """The method that does best for all rounds, of those that stay what they are."""
        return max((PLAIN, *self.fixed), key=self.median_speed_up)

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
    key: CellKey,
    systems: Sequence[PausingSystem],
    work: SweepWork,
    settings: SweepSettings,
    say: Say,
) -> Rounds:
    """Return a cell's rounds: as many as settings ask for, and more while intervals are wide.

    Args:
        key: The cell.
        systems: All of them, plain decoding among them.
        work: Makes the tasks.
        settings: Of the sweep.
        say: Is told what comes now: where in the sweep, and whose turn it is.
    """
    rounds = Rounds([system.name for system in systems])
    drawn = orders(systems, settings.seed)

    def run(number: int, schedule: Schedule, where: str) -> list[Slice]:
        tasks = work.tasks(key, number, schedule.num_prompts)
        return _round(systems, drawn, tasks, schedule, partial(say, f"{key}, {where}"))

    # Rounds that do not count: caches fill, code is compiled, estimates settle. The first tells
    # how long the others have to be, which is the same for all systems and for the whole cell.
    least = Schedule.least(key.batch_size, settings.num_prompts)
    first = run(settings.max_rounds, least, "warm-up")
    schedule = least.fitted(_batch_s(first), settings.least_seconds, settings.max_new_tokens)
    if schedule.num_prompts > least.num_prompts:
        run(settings.max_rounds + 1, schedule, "warm-up")
    for number in range(settings.max_rounds):
        if number >= settings.rounds and rounds.is_known(settings.width):
            break
        where = f"round {number + 1} of {settings.rounds} to {settings.max_rounds}"
        rounds.rounds.append(run(number, schedule, where))
    return rounds


def _round(
    systems: Sequence[PausingSystem],
    drawn: Iterator[Sequence[PausingSystem]],
    tasks: Sequence[Task],
    schedule: Schedule,
    say: Callable[[str], None],
) -> list[Slice]:
    """Let every system do all tasks."""
    slices = []
    for part in schedule.slices(tasks):
        turns: dict[str, list[Turn]] = {}
        for lap in schedule.laps(part):
            begun = {system.name: system.turns(lap, schedule) for system in systems}
            for _ in range(schedule.turns_per_lap):
                for system in next(drawn):
                    say(system.name)
                    turns.setdefault(system.name, []).append(next(begun[system.name]))
        slices.append(Slice(part, {name: joined(own) for name, own in turns.items()}))
    return slices


def _batch_s(slices: Sequence[Slice]) -> float:
    """Return how long plain decoding takes for a batch, as a rule and not at the very first."""
    return statistics.median_low(
        seconds
        for part in slices
        for name in (PLAIN, PLAIN_AGAIN)
        if name in part.turns
        for seconds in part.turns[name].unit_s
    )


def as_entry(key: CellKey, rounds: Rounds) -> dict[str, Any]:
    """Return a finished cell as a JSON object."""
    entry: dict[str, Any] = {
        "workload": str(key.workload),
        "temperature": key.temperature,
        "batch_size": key.batch_size,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "num_rounds": len(rounds.rounds),
        "num_slices": len(rounds.slices),
        "num_prompts_per_round": sum(len(part.tasks) for part in rounds.rounds[0]),
        "num_tokens_per_round": sum(_num_tokens(it.turns[PLAIN]) for it in rounds.rounds[0]),
        "best_fixed": rounds.best_fixed,
        "systems": {name: _system(name, rounds) for name in rounds.names if name != PLAIN_AGAIN},
    }
    has_second = PLAIN_AGAIN in rounds.names
    if has_second:
        entry["plain_again"] = rounds.ratio(PLAIN_AGAIN, PLAIN)
    if AUTO in rounds.names:
        bias = abs(entry["plain_again"]["median"] - 1) if has_second else 0.0
        entry["goals"] = {
            "plain": _goal(rounds.ratio(AUTO, PLAIN), PLAIN_BOUND, bias),
            "best_fixed": _goal(rounds.ratio(AUTO, rounds.best_fixed), BEST_BOUND, bias),
        }
    return entry


def _system(name: str, rounds: Rounds) -> dict[str, Any]:
    turns = [part.turns[name] for part in rounds.slices]
    seconds = rounds.seconds(name)
    rates = [_num_tokens(turn) / time_s for turn, time_s in zip(turns, seconds, strict=True)]
    entry: dict[str, Any] = {"tokens_per_s": spread(rates)}
    if name != PLAIN:
        entry["speed_up"] = rounds.ratio(name, PLAIN)
        entry["differences"] = _differences(name, rounds)
    entry |= counts([output for turn in turns for output in turn.outputs])
    entry["seconds"] = [rounded(value) for value in seconds]
    if cpu_seconds := rounds.cpu_seconds(name):
        entry["cpu_seconds"] = [rounded(value) for value in cpu_seconds]
    return entry


def _goal(ratio: dict[str, Any], bound: float, bias: float) -> dict[str, Any]:
    """Return what became of a goal.

    Args:
        ratio: That is to reach the bound.
        bound: Of the goal.
        bias: By how much two systems differ that do the same.
    """
    low, high = ratio["interval_95"]
    goal = {
        **ratio,
        "bound": bound,
        "holds": ratio["median"] >= bound,
        "is_clear": not low * (1 - bias) < bound <= high * (1 + bias),
    }
    return {**goal, "holds_by_cpu": ratio["cpu"]["median"] >= bound} if "cpu" in ratio else goal


def _differences(name: str, rounds: Rounds) -> list[dict[str, Any]]:
    """Return where a method's tokens are not those of plain decoding; there should be none."""
    differences = []
    for number, slices in enumerate(rounds.rounds):
        for part in slices:
            ours, theirs = part.turns[name].outputs, part.turns[PLAIN].outputs
            for task, one, other in zip(part.tasks, ours, theirs, strict=True):
                token = _first_difference(one.token_ids, other.token_ids)
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


def _first_difference(token_ids: Sequence[int], others: Sequence[int]) -> int | None:
    pairs = enumerate(zip(token_ids, others, strict=True))
    return next((place for place, (one, other) in pairs if one != other), None)


def _num_tokens(turn: Turn) -> int:
    return sum(len(output.token_ids) for output in turn.outputs)


def _ratio(seconds: Sequence[float], base_seconds: Sequence[float]) -> dict[str, Any]:
    """Return how many times as fast as a base something is, slices of both paired."""
    ours, theirs = np.array(seconds), np.array(base_seconds)
    # A slice has prompts of its own, so it is slices that are drawn, not prompts in them.
    interval = ratio_interval(ours[:, None], theirs[:, None])
    return {**spread((theirs / ours).tolist()), "interval_95": list(interval)}


def _width(ratio: dict[str, Any]) -> float:
    low, high = ratio["interval_95"]
    return float((high - low) / ratio["median"])


__all__ = ["BEST_BOUND", "PLAIN_BOUND", "Rounds", "Slice", "as_entry", "measure"]
