"""The record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from foretoken.bench.phases import PHASES

Entry = Mapping[str, Any]
MISSING = "–"
MAX_PASS_SIZES = 6


def print_report(record: Entry, console: Console) -> None:
    """Print what a person wants of a record.

    Args:
        record: As `make_record` returns it.
        console: Where to.
    """
    settings, machine = record["settings"], record["environment"]
    console.print(
        f"[bold]{settings['model']}[/], {_millions(settings['num_parameters'])} parameters, "
        f"{settings['dtype']}; {settings['num_prompts']} prompts of {settings['workload']}, "
        f"up to {settings['max_new_tokens']} tokens each, {settings['rounds']} rounds\n"
        f"{machine['processor']}, {machine['cores']} cores; threads: {machine['threads']}",
        highlight=False,
    )
    if settings["num_skipped_prompts"]:
        console.print(
            f"[yellow]{settings['num_skipped_prompts']} prompts were left out: they do not fit "
            "the model's context[/]",
            highlight=False,
        )
    for cell in record["cells"]:
        console.print()
        console.print(_cell(cell))


def _cell(cell: Entry) -> RenderableType:
    mode = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
    batch = f", {cell['batch_size']} prompts at once" if cell["batch_size"] > 1 else ""
    parts: list[RenderableType] = [Text(f"{mode}{batch}", style="bold"), "", _speed_table(cell)]
    if any("phases_ms_per_token" in system for system in cell["systems"].values()):
        parts += ["", _phase_table(cell)]
    if any("categories" in system for system in cell["systems"].values()):
        parts += ["", _category_table(cell)]
    parts += ["", *(Text(line, style="dim") for line in _notes(cell))]
    return Group(*parts)


def new_table(first: str, *columns: str) -> Table:
    """Return a table without rows: names on the left, numbers on the right of each column."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _speed_table(cell: Entry) -> Table:
    systems = cell["systems"]
    columns: dict[str, Callable[[Entry], str]] = {
        "tokens/s": _rate,
        "speed-up \\[95 %]": lambda system: shown_speed_up(system.get("speed_up")),
        "own speed-up": lambda system: _times(system.get("speed_up_over_own_plain")),
        "tok/step": lambda system: _fixed(system.get("tokens_per_step")),
        "accepted": lambda system: _percent(system.get("acceptance_rate")),
        "memory": lambda system: _mebibytes(system["memory"].get("peak_resident_bytes")),
    }
    if not any("speed_up_over_own_plain" in system for system in systems.values()):
        del columns["own speed-up"]
    table = new_table("median (range)", *columns)
    for name, system in systems.items():
        table.add_row(name, *(show(system) for show in columns.values()))
    return table


def _phase_table(cell: Entry) -> Table:
    table = new_table("milliseconds per token", *PHASES, "sum")
    for name, system in cell["systems"].items():
        phases = system.get("phases_ms_per_token")
        if phases:
            values = [phases[phase] for phase in PHASES]
            table.add_row(name, *(f"{value:.2f}" for value in (*values, sum(values))))
    return table


def _category_table(cell: Entry) -> Table:
    systems = {name: it for name, it in cell["systems"].items() if "speed_up" in it}
    table = new_table("speed-up (tokens/step)", *systems)
    names = next(iter(cell["systems"].values()))["categories"]
    for category in names:
        cells = []
        for system in systems.values():
            entry = system["categories"][category]
            steps = entry["tokens_per_step"]
            cells.append(f"{entry['speed_up']['median']:.2f} ({_fixed(steps)})")
        table.add_row(category, *cells)
    return table


def _notes(cell: Entry) -> Iterator[str]:
    for name, system in cell["systems"].items():
        passes = system.get("target_pass_ms")
        if passes:
            # Sizes vary with the batch; those that matter are those that come often.
            often = sorted(passes, key=lambda rows: -passes[rows]["count"])[:MAX_PASS_SIZES]
            listed = ", ".join(
                f"{rows} {'row' if rows == '1' else 'rows'} {passes[rows]['median']:.1f}"
                for rows in sorted(often, key=int)
            )
            yield f"{name}: a pass of the target takes (ms) {listed}"
    bandwidth = cell.get("read_bandwidth_bytes_per_s")
    if bandwidth:
        low, middle, high = (bandwidth[key] / 1e9 for key in ("min", "median", "max"))
        shares = ", ".join(
            f"{name.removesuffix(' plain')} {100 * _best_share(system):.0f} %"
            for name, system in cell["systems"].items()
            if "bandwidth_share" in system
        )
        yield f"the machine reads {middle:.1f} GB/s ({low:.1f}–{high:.1f})" + (
            f"; plain decoding reaches of it: {shares}" if shares else ""
        )
    for name, system in cell["systems"].items():
        for other, count in system.get("prompts_with_other_tokens", {}).items():
            if count:
                yield f"{name}: other tokens {other.replace('_', ' ')} for {count} prompts"
    for name, reason in cell.get("left_out", {}).items():
        yield f"{name} was left out: {reason}"


def _best_share(system: Entry) -> float:
    shares = system["bandwidth_share"]
    return float(shares.get("of_passes", shares["of_tokens"])["median"])


def _rate(system: Entry) -> str:
    rate = system["tokens_per_s"]
    return f"{_short(rate['median'])} ({_short(rate['min'])}–{_short(rate['max'])})"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.0f} %"


def _mebibytes(num_bytes: int | None) -> str:
    return MISSING if num_bytes is None else f"{num_bytes / 2**20:,.0f} MiB"


def shown_speed_up(entry: Entry | None) -> str:
    """Return a ratio's median and interval as markup."""
    if entry is None:
        return MISSING
    low, high = entry["interval_95"]
    return f"{entry['median']:.2f} \\[{low:.2f}, {high:.2f}]"


def _times(entry: Entry | None) -> str:
    return MISSING if entry is None else f"{entry['median']:.2f}"


def _fixed(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _millions(count: int | None) -> str:
    return MISSING if count is None else f"{count / 1e6:,.2f}M"


__all__ = ["MISSING", "new_table", "print_report", "shown_speed_up"]
