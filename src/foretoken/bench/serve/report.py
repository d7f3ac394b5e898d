"""A load bench's record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretoken.bench.report import MISSING, new_table
from foretoken.bench.serve.settings import DRAFTS, PLAIN
from foretoken.bench.serve.summary import goals

Entry: TypeAlias = Mapping[str, Any]


def print_report(record: Entry, console: Console) -> None:
    """Print what a person wants of a record.

    Args:
        record: As `run_serve` returns it.
        console: Where to.
    """
    settings, machine, lengths = record["settings"], record["environment"], record["lengths"]
    mode = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}"
    console.print(
        f"[bold]{settings['model']}[/], {mode}; {settings['trace']}: "
        f"{settings['trace_requests']} requests of {settings['trace_minutes']:g} minutes, on "
        f"average {lengths['mean_prompt_tokens']:.0f} + {lengths['mean_new_tokens']:.0f} tokens; "
        f"rounds: {settings['rounds']}, {settings['duration_s']:g} s each\n"
        f"{machine['processor']}, {machine['cores']} cores; threads: {machine['threads']}",
        highlight=False,
    )
    capacity = record["capacity"]
    shown = "; ".join(
        f"{name} {it['requests_per_s']:.3g} requests/s, {it['tokens_per_s']:.0f} tokens/s"
        for name, it in capacity.items()
    )
    console.print(f"with always more to do: {shown}", highlight=False)
    tables = {
        "Drafts over plain decoding": _ratios(record),
        "Latency, milliseconds": _times(record),
        "Work": _work(record),
    }
    for title, table in tables.items():
        console.print()
        console.print(Text(title, style="bold"))
        console.print(table)
    console.print()
    for goal in goals(record):
        mark = Text("yes  ", style="green") if goal.holds else Text("no   ", style="red")
        console.print(mark.append(f"{goal.title}: {goal.detail}", style="default"))


def _ratios(record: Entry) -> Table:
    table = new_table(
        "load", "requests/s", "mean latency \\[95 %]", "goodput \\[95 %]", "goodput, tokens/s"
    )
    for cell in record["cells"]:
        rate = cell["systems"][DRAFTS]["goodput_tokens_per_s"]["median"]
        table.add_row(
            f"{cell['load']:g}",
            f"{cell['requests_per_s']:.3g}",
            _ratio(cell["latency_ratio"], 2),
            _ratio(cell["goodput_ratio"], 3),
            f"{rate:.0f}",
        )
    return table


def _times(record: Entry) -> Table:
    columns: dict[str, Callable[[Entry], float | None]] = {
        "mean": lambda system: system["latency_ms"]["mean"],
        "median": lambda system: system["latency_ms"]["p50"],
        "95 %": lambda system: system["latency_ms"]["p95"],
        "first token": lambda system: system["first_token_ms"]["mean"],
        "its 95 %": lambda system: system["first_token_ms"]["p95"],
        "between tokens": lambda system: system["inter_token_ms"]["mean"],
        "sent late, 95 %": lambda system: system["late_ms"]["p95"],
    }
    return _by_system(record, {name: (_number, value) for name, value in columns.items()})


def _work(record: Entry) -> Table:
    columns: dict[str, tuple[Callable[[float | None], str], Callable[[Entry], float | None]]] = {
        "answered": (_count, lambda system: system["num_complete"]),
        "sent away": (_count, lambda system: system["num_rejected"]),
        "errors": (_count, lambda system: system["num_errors"]),
        "tok/step": (_fixed, lambda system: system["tokens_per_step"]),
        "accepted": (_percent, lambda system: system["acceptance_rate"]),
        "server, cores": (_fixed, lambda system: system["server_cores"]),
        "client, cores": (_fixed, lambda system: system["client_cores"]),
    }
    if "good_share" in record["cells"][0]["systems"][PLAIN]:
        columns["good"] = (_percent, lambda system: system["good_share"])
    return _by_system(record, columns)


def _by_system(
    record: Entry,
    columns: Mapping[str, tuple[Callable[[float | None], str], Callable[[Entry], float | None]]],
) -> Table:
    table = new_table("load", *columns)
    for cell in record["cells"]:
        for name, system in cell["systems"].items():
            shown = [show(value(system)) for show, value in columns.values()]
            table.add_row(f"{cell['load']:g} {name}", *shown)
    return table


def _ratio(entry: Entry, digits: int) -> str:
    low, high = entry["interval_95"]
    return f"{entry['median']:.{digits}f} \\[{low:.{digits}f}, {high:.{digits}f}]"


def _number(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def _fixed(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"


__all__ = ["print_report"]
