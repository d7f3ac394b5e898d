"""What a sweep's record says, cells together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from foretoken.bench.sweep.settings import AUTO

Entry: TypeAlias = Mapping[str, Any]


def by_text(record: Entry) -> dict[tuple[str, float], list[Entry]]:
    """Return the cells by workload and temperature, batch sizes in the order measured."""
    groups: dict[tuple[str, float], list[Entry]] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["workload"], cell["temperature"]), []).append(cell)
    return groups


def heading(workload: str, temperature: float) -> str:
    """Return the name of a group of cells, for people."""
    return f"{workload}, {'greedy' if temperature == 0 else f'temperature {temperature:g}'}"


def wins(record: Entry) -> dict[str, int]:
    """Return in how many cells each fixed method is the best, the most frequent first."""
    return dict(Counter(cell["best_fixed"] for cell in record["cells"]).most_common())


def is_close(cell: Entry) -> bool:
    """Tell whether another fixed method's interval reaches the best one's median."""
    best = cell["best_fixed"]
    wanted = speed_up(cell, best)
    highs = [
        float(entry["speed_up"]["interval_95"][1]) if "speed_up" in entry else 1.0
        for name, entry in cell["systems"].items()
        if name not in (AUTO, best)
    ]
    return max(highs) >= wanted


def speed_up(cell: Entry, name: str) -> float:
    """Return the median ratio of a method to plain decoding, 1 for plain decoding itself."""
    entry = cell["systems"][name]
    return float(entry["speed_up"]["median"]) if "speed_up" in entry else 1.0


def resolution(record: Entry) -> tuple[float, float] | None:
    """Return by how much two engines that both decode plainly seem to differ, at worst.

    Returns:
        The largest distance from 1 of any cell's median, and that of any cell's interval; None
        if it was not measured.
    """
    ratios = [cell["plain_again"] for cell in record["cells"] if "plain_again" in cell]
    if not ratios:
        return None
    medians = [abs(ratio["median"] - 1) for ratio in ratios]
    ends = [abs(end - 1) for ratio in ratios for end in ratio["interval_95"]]
    return max(medians), max(ends)


def goals(record: Entry) -> list[tuple[str, Sequence[Entry]]]:
    """Return each goal of `auto` with its outcome in every cell; empty if none was measured."""
    cells = [cell["goals"] for cell in record["cells"] if "goals" in cell]
    if not cells:
        return []
    return [
        (
            f"auto is at least {goal['bound']:g} × {name.replace('_', ' ')}",
            [it[name] for it in cells],
        )
        for name, goal in cells[0].items()
    ]


__all__ = ["by_text", "goals", "heading", "is_close", "resolution", "speed_up", "wins"]
