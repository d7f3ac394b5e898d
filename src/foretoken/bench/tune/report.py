"""The record as a report: the same tables for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from foretoken.bench.report import MISSING, new_table
from foretoken.bench.tune.settings import PLAIN
from foretoken.planner.cost import CostCurve

Entry = Mapping[str, Any]
SHOWN_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
SHOWN_DEPTHS = 8


@dataclass(frozen=True, slots=True)
class Section:
    """A table of the report.

    Args:
        title: Above it.
        columns: Heads; names stand in the first column, numbers in the others.
        rows: As wide as the columns.
        note: Below it; empty for none.
        is_detail: Whether only the Markdown report has it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    is_detail: bool = False


def print_report(record: Entry, console: Console) -> None:
    """Print what a person wants of a record.

    Args:
        record: As `make_record` returns it.
        console: Where to.
    """
    for line in _heading(record):
        console.print(Text(line))
    for section in _sections(record):
        if section.is_detail:
            continue
        console.print()
        console.print(Text(section.title, style="bold"))
        table = new_table(*map(escape, section.columns))
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        if section.note:
            console.print(Text(section.note, style="dim"))
    console.print()
    console.print(Text(record["verdict"], style="bold"))


def markdown(record: Entry, pictures: Sequence[str] = ()) -> str:
    """Return the report as Markdown.

    Args:
        record: As `make_record` returns it.
        pictures: File names, in its folder, to show at the end.
    """
    parts = ["# foretoken tune", f"**{record['verdict']}**", "\n".join(_heading(record))]
    for section in _sections(record):
        bars = ["---", *("---:" for _ in section.columns[1:])]
        lines = [_line(section.columns), _line(bars), *map(_line, section.rows)]
        parts += [f"## {section.title}", "\n".join(lines)]
        parts += [section.note] if section.note else []
    parts += [f"![{name.rpartition('.')[0]}]({name})" for name in pictures]
    parts += ["## How", record["policy"], f"`{record['command']}`, {record['at']}"]
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _heading(record: Entry) -> Iterator[str]:
    settings, machine = record["settings"], record["environment"]
    temperatures = ", ".join(f"{value:g}" for value in settings["temperatures"])
    size = settings["num_parameters"]
    parameters = f" ({size / 1e6:,.2f}M parameters)" if size else ""
    yield (
        f"{settings['model']}{parameters}, {settings['dtype']}; {settings['num_prompts']} prompts "
        f"of {settings['source']}, temperature {temperatures}, at once: {settings['batch_size']}; "
        f"rounds: {settings['rounds_done']}"
    )
    yield f"{machine['processor']}, {machine['cores']} cores; threads: {machine['threads']}"
    if settings["num_skipped_prompts"]:
        yield f"{settings['num_skipped_prompts']} prompts were left out: they do not fit the model"
    changed = [it for it in record["measured"] if it["prompts_with_other_tokens_than_plain"]]
    for entry in changed:
        yield (
            f"{entry['name']} said other tokens than plain decoding for "
            f"{entry['prompts_with_other_tokens_than_plain']} prompts (exactness: "
            f"{settings['exactness']})"
        )


def _sections(record: Entry) -> Iterator[Section]:
    if "target" in record["cost_ms"]:
        yield _cost(record["cost_ms"])
    candidates = record["candidates"]
    if candidates:
        yield _sizes(candidates)
        yield _acceptance(candidates, "depth", first=1)
        yield _acceptance(candidates, "rank", first=0)
        yield _confidence(candidates)
        trees = [it for it in candidates if "best_static_tree" in it]
        if trees:
            yield _static_trees(trees)
    if record["measured"]:
        yield _measured(record["measured"])


def _cost(entries: Mapping[str, Entry]) -> Section:
    curves = {name: CostCurve.from_dict(entry) for name, entry in entries.items()}
    measured = curves["target"].rows
    shown = [count for count in SHOWN_ROWS if count in measured] or list(measured)
    rows = []
    for name, curve in curves.items():
        times = dict(zip(curve.rows, curve.base_ms, strict=True))
        cells = [f"{times[count]:.3g}" if count in times else MISSING for count in shown]
        rows.append([name if name == "target" else f"model of {name}", *cells])
    return Section("Milliseconds of a pass, by rows", ["rows", *map(str, shown)], rows)


def _sizes(candidates: Sequence[Entry]) -> Section:
    rows = []
    for candidate in candidates:
        for size in candidate["sizes"]:
            parts = size["ms_per_step"]
            rows.append(
                [
                    size["name"] + (" *" if size["name"] == candidate["best"] else ""),
                    f"{size['tokens_per_step']:.2f}",
                    f"{size['break_even_tokens_per_step']:.2f}",
                    f"{size['nodes_per_step']:.1f}",
                    f"{parts['target']:.3g} + {parts['draft']:.3g} + {parts['other']:.3g}",
                    f"{size['predicted_speed_up']:.2f}",
                    candidate["how"],
                ]
            )
    columns = [
        "predicted",
        "tokens/step",
        "needed",
        "nodes/step",
        "ms: target + draft + rest",
        "× plain",
        "from",
    ]
    note = "needed: tokens per step at which it breaks even; *: best size of its drafter"
    return Section(
        "What each drafter should make, at most so many draft tokens", columns, rows, note
    )


def _acceptance(candidates: Sequence[Entry], key: str, *, first: int) -> Section:
    tables = {it["name"]: it[f"acceptance_by_{key}"] for it in candidates}
    shown = [
        str(number)
        for number in range(first, first + SHOWN_DEPTHS)
        if any(str(number) in table for table in tables.values())
    ]
    rows = [
        [name, *(_rate(table.get(number)) for number in shown)] for name, table in tables.items()
    ]
    heads = [str(int(number) + 1 - first) for number in shown]
    what = "depth" if key == "depth" else "rank among siblings"
    note = "percent taken of those whose parent was taken, at the largest size (cases)"
    return Section(f"Acceptance by {what}", [what, *heads], rows, note, is_detail=key != "depth")


def _confidence(candidates: Sequence[Entry]) -> Section:
    bins = sorted({low for it in candidates for low in it["acceptance_by_confidence"]}, key=float)
    rows = [
        [it["name"], *(_rate(it["acceptance_by_confidence"].get(low)) for low in bins)]
        for it in candidates
    ]
    heads = [f"{float(low):.1f}–{float(low) + 0.1:.1f}" for low in bins]
    note = "percent taken by the drafter's own estimate; right estimates lie within their column"
    return Section(
        "Acceptance by confidence", ["the drafter's estimate", *heads], rows, note, is_detail=True
    )


def _static_trees(candidates: Sequence[Entry]) -> Section:
    rows = [
        [
            it["name"],
            str(len(it["best_static_tree"]["parents"]) - 1),
            str(it["best_static_tree"]["depth"]),
            f"{it['best_static_tree']['expected_tokens_per_step']:.2f}",
        ]
        for it in candidates
    ]
    note = "Sequoia's tree for the acceptance by rank and the costs of both models' passes"
    columns = ["drafter", "draft tokens", "depth", "tokens/step"]
    return Section("Best tree of one fixed shape", columns, rows, note, is_detail=True)


def _measured(entries: Sequence[Entry]) -> Section:
    rows = []
    for entry in entries:
        rate = entry["tokens_per_s"]
        is_plain = entry["name"] == PLAIN
        has_prediction = "predicted_speed_up" in entry and not is_plain
        rows.append(
            [
                entry["name"],
                f"{_short(rate['median'])} ({_short(rate['min'])}–{_short(rate['max'])})",
                MISSING if is_plain else _speed_up(entry["speed_up"]),
                f"{entry['tokens_per_step']:.2f}",
                f"{entry['predicted_speed_up']:.2f}" if has_prediction else MISSING,
                f"{100 * entry['error']:+.0f} %" if has_prediction else MISSING,
            ]
        )
    columns = [
        "measured, median (range)",
        "tokens/s",
        "× plain [95 %]",
        "tokens/step",
        "predicted",
        "error",
    ]
    return Section("What was measured", columns, rows)


def _rate(tally: Entry | None) -> str:
    return MISSING if tally is None else f"{100 * tally['rate']:.0f} ({tally['count']})"


def _speed_up(ratio: Entry) -> str:
    low, high = ratio["interval_95"]
    return f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


__all__ = ["Section", "markdown", "print_report"]
