"""A cell of a sweep: rounds until its ratios are known well enough."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def turns(self, name: str) -> list[Turn]:
        """Return what a system did in the slices in which it took part, one after the other."""
        return [part.turns[name] for part in self.slices if name in part.turns]

    def ratio(self, name: str, base: str) -> dict[str, Any]:
        """Return how many times as fast as another a method is: the median of slices, and all.

        Plain decoding takes what its engines take in the mean, if there are two: what happens in
        one turn says less than what happens in both, and everything is held against them.
        """
        return self._compare(_engines(name, self.names), _engines(base, self.names), base)

    def plain_again(self) -> dict[str, Any]:
        """Return how many times as fast as the first engine that decodes plainly the second is."""
        return self._compare([PLAIN_AGAIN], [PLAIN], PLAIN)

    def _compare(
        self, engines: Sequence[str], base_engines: Sequence[str], base: str
    ) -> dict[str, Any]:
        """Return the ratio of two methods' seconds in the slices in which both took part."""
        wanted = {*engines, *base_engines}
        slices = [part.turns for part in self.slices if wanted <= part.turns.keys()]
        pair = [[_wall_s(turns, own) for turns in slices] for own in (engines, base_engines)]
        found = {**_ratio(*pair), "against": base}
        if all(turns[name].cpu_s is not None for turns in slices for name in wanted):
            by_cpu = [[_cpu_s(turns, own) for turns in slices] for own in (engines, base_engines)]
            found["cpu"] = _ratio(*by_cpu)
        return found

    @property
    def fixed(self) -> list[str]:
        """The methods that stay what they are."""
        return [name for name in self.names if name not in (PLAIN, PLAIN_AGAIN, AUTO)]

    @property
    def best_fixed(self) -> str:
        """The method that does best for all rounds, of those that stay what they are."""
        return max((PLAIN, *self.fixed), key=self._median)

    def _median(self, name: str) -> float:
        return 1.0 if name == PLAIN else float(self.ratio(name, PLAIN)["median"])

    def behind(self) -> set[str]:
        """Return the fixed methods whose intervals end below where that of the best one begins."""
        ends = {name: self.ratio(name, PLAIN)["interval_95"] for name in self.fixed}
        least = max([1.0, *(low for low, _ in ends.values())])
        return {name for name, (_, high) in ends.items() if high < least}

    def comparisons(self) -> list[dict[str, Any]]:
        """Return the ratios that have to be known: of those in the race to plain decoding.

        And that of `auto` to the best fixed method.
        """
        racing = self.slices[-1].turns
        pairs = [(name, PLAIN) for name in racing if name not in (PLAIN, PLAIN_AGAIN)]
        if AUTO in self.names and self.best_fixed != PLAIN:
            pairs.append((AUTO, self.best_fixed))
        second = [self.plain_again()] if PLAIN_AGAIN in self.names else []
        return [*second, *(self.ratio(*pair) for pair in pairs)]

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
    drawn, racing = orders(systems, settings.seed), list(systems)

    def run(number: int, schedule: Schedule, where: str) -> list[Slice]:
        tasks = work.tasks(key, number, schedule.num_prompts)
        return _round(racing, drawn, tasks, schedule, partial(say, f"{key}, {where}"))

    # Rounds that do not count: caches fill, code is compiled, estimates settle. The first tells
    # how long the others have to be, which is the same for all systems and for the whole cell.
    least = Schedule.least(key.batch_size, settings.num_prompts)
    first = run(settings.max_rounds, least, "warm-up")
    schedule = least.fitted(_batch_s(first), settings.least_seconds, settings.max_new_tokens)
    if schedule.num_prompts > least.num_prompts:
        run(settings.max_rounds + 1, schedule, "warm-up")
    for number in range(settings.max_rounds):
        if number >= settings.rounds:
            if rounds.is_known(settings.width):
                break
            # What cannot be the best any more needs no more time, the others have more of it.
            behind = rounds.behind()
            racing = [system for system in racing if system.name not in behind]
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
    """Let every system do all tasks, those that are drawn besides left out."""
    slices = []
    for part in schedule.slices(tasks):
        turns: dict[str, list[Turn]] = {}
        for lap in schedule.laps(part):
            begun = {system.name: system.turns(lap, schedule) for system in systems}
            for _ in range(schedule.turns_per_lap):
                for system in (it for it in next(drawn) if it.name in begun):
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
        entry["plain_again"] = rounds.plain_again() | _seconds(rounds.turns(PLAIN_AGAIN))
    if AUTO in rounds.names:
        bias = abs(entry["plain_again"]["median"] - 1) if has_second else 0.0
        entry["goals"] = {
            "plain": _goal(rounds.ratio(AUTO, PLAIN), PLAIN_BOUND, bias),
            "best_fixed": _goal(rounds.ratio(AUTO, rounds.best_fixed), BEST_BOUND, bias),
        }
    return entry


def _system(name: str, rounds: Rounds) -> dict[str, Any]:
    turns = rounds.turns(name)
    rates = [_num_tokens(turn) / sum(turn.unit_s) for turn in turns]
    entry: dict[str, Any] = {"tokens_per_s": spread(rates)}
    if name != PLAIN:
        entry["speed_up"] = rounds.ratio(name, PLAIN)
        entry["differences"] = _differences(name, rounds)
    entry |= counts([output for turn in turns for output in turn.outputs])
    return entry | _seconds(turns)


def _seconds(turns: Sequence[Turn]) -> dict[str, list[float]]:
    """Return what an engine took for each slice, of the processor too if that was counted."""
    found = {"seconds": [rounded(sum(turn.unit_s)) for turn in turns]}
    cpu_seconds = [rounded(turn.cpu_s) for turn in turns if turn.cpu_s is not None]
    return {**found, "cpu_seconds": cpu_seconds} if cpu_seconds else found


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
        for part in (part for part in slices if name in part.turns):
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


def _engines(name: str, names: Sequence[str]) -> list[str]:
    """Return the systems that are a method."""
    return [name, PLAIN_AGAIN] if name == PLAIN and PLAIN_AGAIN in names else [name]


def _wall_s(turns: Mapping[str, Turn], engines: Sequence[str]) -> float:
    return statistics.fmean(sum(turns[name].unit_s) for name in engines)


def _cpu_s(turns: Mapping[str, Turn], engines: Sequence[str]) -> float:
    return statistics.fmean(turns[name].cpu_s or 0.0 for name in engines)


def _width(ratio: dict[str, Any]) -> float:
    low, high = ratio["interval_95"]
    return float((high - low) / ratio["median"])


__all__ = ["BEST_BOUND", "PLAIN_BOUND", "Rounds", "Slice", "as_entry", "measure"]
