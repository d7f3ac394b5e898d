"""The record as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foretoken.bench.specinfer.settings import COUPLED, GROWN, MSS, NAIVE, Tree

Entry = Mapping[str, Any]
MISSING = "–"
DRAWS = {
    "iid": "i.i.d. draws",
    "without_replacement": "draws without replacement",
    "deterministic": "likeliest tokens",
    "coupled": "the target's race",
}


def print_report(record: Entry, console: Console) -> None:
    """Print what a person wants of a record.

    Args:
        record: As `make_record` returns it.
        console: Where to.
    """
    settings = record["settings"]
    console.print(
        f"[bold]{settings['model']}[/] ({_millions(settings['num_parameters'])} parameters), "
        f"draft [bold]{settings['draft']}[/] ({_millions(settings['draft_num_parameters'])}), "
        f"{settings['dtype']}\n"
        f"{settings['num_prompts']} prompts of {settings['workload']}, "
        f"{settings['max_new_tokens']} tokens each; outputs per prompt at temperature 1: "
        f"{settings['num_seeds']}",
        highlight=False,
    )
    if settings["num_skipped_prompts"]:
        console.print(
            f"[yellow]{settings['num_skipped_prompts']} prompts were left out: they do not fit "
            "the models' context[/]",
            highlight=False,
        )
    for title, table in _tables(record):
        console.print()
        console.print(Text(title, style="bold"))
        console.print(table)
    console.print()
    console.print(Text("What was expected of tokens per step, and whether it shows", style="bold"))
    for entry in record["summary"]:
        mark = Text("yes  ", style="green") if entry["holds"] else Text("no   ", style="red")
        console.print(mark.append(entry["expected"], style="default"))
        console.print(Padding(Text(entry["shown"], style="dim"), (0, 0, 0, 5), expand=False))


def _tables(record: Entry) -> Iterator[tuple[str, Table]]:
    paper, cells = record["paper"], record["tokens_per_step"]
    for success in record["success_rate"]:
        mode = _mode(success["temperature"])
        yield f"Success rate, {mode} (% of positions; ± standard error)", _success(success, paper)
    for temperature in (0.0, 1.0):
        chosen = [cell for cell in cells if cell["temperature"] == temperature]
        title = f"Tokens per step, {_mode(temperature)} (± standard error)"
        yield title, _tokens(chosen, paper)
    yield "MSS and naive sampling, temperature 1", _mss(record)
    yield "Best-first trees beside static ones of as many nodes, coupled", _best_first(record)


def _success(success: Entry, paper: Entry) -> Table:
    is_greedy = success["temperature"] == 0
    rows = paper["greedy_success_rate" if is_greedy else "stochastic_success_rate"]
    table = _table("the target's token is", [f"k={count + 1}" for count in range(len(rows[0]))])
    for way, estimates in success["ways"].items():
        table.add_row(way, *(_share(estimate) for estimate in estimates))
    table.add_row("paper, five data sets", *_ranges(rows, 100, 0), style="dim")
    return table


def _tokens(cells: Sequence[Entry], paper: Entry) -> Table:
    sizes = dict(sorted((cell["width"], cell["max_nodes"]) for cell in cells))
    table = _table("tree, rule", [f"w={width} ({nodes})" for width, nodes in sizes.items()])
    lines: dict[str, dict[int, Entry]] = {}
    for cell in cells:
        lines.setdefault(_name(cell), {})[cell["width"]] = cell
    for name, by_width in lines.items():
        table.add_row(
            name,
            *(
                _rate(by_width[width]["tokens_per_step"]) if width in by_width else MISSING
                for width in sizes
            ),
        )
    is_greedy = cells[0]["temperature"] == 0
    rows = paper["greedy_tokens_per_step" if is_greedy else "mss_tokens_per_step"]
    places = [width - 1 for width in sizes]
    ranges = _ranges(rows, 1, 2)
    shown = [ranges[place] if place < len(ranges) else MISSING for place in places]
    label = "paper, static" if is_greedy else "paper, static, mss"
    table.add_row(f"{label}, five data sets", *shown, style="dim")
    return table


def _mss(record: Entry) -> Table:
    paper, settings = record["paper"], record["settings"]
    width = settings["max_width"]
    table = _table("pair or data set", ["width", "naive, i.i.d. draws", "mss", "mss / naive"])
    chosen = {
        cell["verifier"]: cell["tokens_per_step"]
        for cell in record["tokens_per_step"]
        if (cell["tree"], cell["width"], cell["temperature"]) == (Tree.STATIC, width, 1)
        and cell["siblings"] == "iid"
    }
    ratio = chosen[MSS]["value"] / chosen[NAIVE]["value"]
    table.add_row(
        f"{settings['model']}, {settings['draft']}",
        str(width),
        _rate(chosen[NAIVE]),
        _rate(chosen[MSS]),
        f"{ratio:.2f}",
    )
    rows = zip(
        paper["datasets"],
        paper["naive_tokens_per_step_at_width_5"],
        (rates[-1] for rates in paper["mss_tokens_per_step"]),
        strict=True,
    )
    for name, naive, mss in rows:
        table.add_row(
            f"paper, {name}", "5", f"{naive:.2f}", f"{mss:.2f}", f"{mss / naive:.2f}", style="dim"
        )
    return table


def _best_first(record: Entry) -> Table:
    cells = {
        (cell["temperature"], cell["tree"], cell["width"]): cell
        for cell in record["tokens_per_step"]
        if cell["verifier"] == COUPLED
    }
    widths = sorted({width for _, _, width in cells})
    table = _table("gain over static (nodes used)", [f"w={width}" for width in widths])
    for temperature in (0.0, 1.0):
        for tree in (Tree.STATIC, *GROWN):
            shown = []
            for width in widths:
                cell, static = cells[temperature, tree, width], cells[temperature, "static", width]
                nodes = f"({cell['nodes_per_step']:.1f})"
                gain = cell["tokens_per_step"]["value"] / static["tokens_per_step"]["value"] - 1
                shown.append(nodes if tree is Tree.STATIC else f"{100 * gain:+.0f} % {nodes}")
            table.add_row(f"{_mode(temperature)}, {tree}", *shown)
    return table


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _name(cell: Entry) -> str:
    if cell["temperature"] == 0:
        return str(cell["tree"])
    return f"{cell['tree']}; {cell['verifier']}, {DRAWS[cell['siblings']]}"


def _share(estimate: Entry) -> str:
    return f"{100 * estimate['value']:.1f} ±{100 * estimate['standard_error']:.1f}"


def _rate(estimate: Entry) -> str:
    return f"{estimate['value']:.2f} ±{estimate['standard_error']:.2f}"


def _ranges(rows: Sequence[Sequence[float]], scale: float, digits: int) -> list[str]:
    """Return smallest and largest of each column."""
    return [
        f"{scale * min(column):.{digits}f}–{scale * max(column):.{digits}f}"
        for column in zip(*rows, strict=True)
    ]


def _mode(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M"


__all__ = ["print_report"]
