"""A sweep's record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretoken.bench.report import new_table, shown_speed_up
from foretoken.bench.sweep.settings import PLAIN
from foretoken.bench.sweep.summary import (
    Entry,
    by_text,
    goals,
    heading,
    is_close,
    resolution,
    speed_up,
    wins,
)


def print_report(record: Entry, console: Console) -> None:
    """Print what a person wants of a record.

    Args:
        record: As `run_sweep` returns it.
        console: Where to.
    """
    settings, machine = record["settings"], record["environment"]
    rounds = [cell["num_rounds"] for cell in record["cells"]]
    console.print(
        f"[bold]{settings['model']}[/], {record['target']['dtype']}; "
        f"{settings['max_new_tokens']} tokens per prompt, {min(rounds)} to {max(rounds)} rounds\n"
        f"{machine['processor']}, {machine['cores']} cores; threads: {machine['threads']}",
        highlight=False,
    )
    for title, table in _tables(record):
        console.print()
        console.print(Text(title, style="bold"))
        console.print(table)
    console.print()
    for line in _conclusions(record):
        console.print(line)


def _tables(record: Entry) -> Iterator[tuple[str, Table]]:
    groups = by_text(record)
    for key, cells in groups.items():
        yield f"{heading(*key)}: speed of plain decoding [95 %]", _ratios(cells)
    yield "Which fixed method is best (~: another one may be)", _winners(groups)


def _ratios(cells: Sequence[Entry]) -> Table:
    table = new_table("prompts at once", *(str(cell["batch_size"]) for cell in cells))
    for name in cells[0]["systems"]:
        if name == PLAIN:
            rates = [cell["systems"][name]["tokens_per_s"]["median"] for cell in cells]
            table.add_row(f"{PLAIN}, tokens/s", *(f"{rate:.0f}" for rate in rates))
        else:
            ratios = [cell["systems"][name]["speed_up"] for cell in cells]
            table.add_row(name, *map(shown_speed_up, ratios))
    if "goals" in cells[0]:
        ratios = [cell["goals"]["best_fixed"] for cell in cells]
        table.add_row("auto / best fixed", *map(shown_speed_up, ratios), style="dim")
        if "cpu" in ratios[0]:
            by_cpu = [cell["goals"]["plain"]["cpu"] for cell in cells]
            table.add_row("auto, processor time", *map(shown_speed_up, by_cpu), style="dim")
    if "plain_again" in cells[0]:
        ratios = [cell["plain_again"] for cell in cells]
        table.add_row("plain, second engine", *map(shown_speed_up, ratios), style="dim")
    return table


def _winners(groups: dict[tuple[str, float], list[Entry]]) -> Table:
    sizes = dict.fromkeys(cell["batch_size"] for cells in groups.values() for cell in cells)
    table = new_table("prompts at once", *map(str, sizes))
    for key, cells in groups.items():
        names = [
            f"{'~' if is_close(cell) else ''}{cell['best_fixed']} "
            f"{speed_up(cell, cell['best_fixed']):.2f}"
            for cell in cells
        ]
        table.add_row(heading(*key), *names)
    return table


def _conclusions(record: Entry) -> Iterator[Text]:
    counts = wins(record)
    shares = ", ".join(f"{name} in {count}" for name, count in counts.items())
    everywhere = f" of {len(record['cells'])} cells" + ("" if len(counts) > 1 else ": everywhere")
    yield Text(f"best fixed method: {shares}{everywhere}")
    if errors := resolution(record):
        yield Text(
            f"two engines that both decode plainly differ by up to {100 * errors[0]:.1f} %, by up "
            f"to {100 * errors[1]:.1f} % within the intervals: less than that says nothing"
        )
    for goal, outcomes in goals(record):
        failed = [it for it in outcomes if not it["holds"]]
        mark = Text("no   ", style="red") if failed else Text("yes  ", style="green")
        unclear = sum(not it["is_clear"] for it in outcomes)
        least = min(it["median"] for it in outcomes)
        disputed = sum(it.get("holds_by_cpu", it["holds"]) != it["holds"] for it in outcomes)
        by_cpu = f"; processor time says otherwise in {disputed}" if disputed else ""
        yield mark.append(
            f"{goal}: {len(outcomes) - len(failed)} of {len(outcomes)} cells; {unclear} "
            f"within the noise; least {least:.3f}{by_cpu}",
            style="default",
        )


__all__ = ["print_report"]
