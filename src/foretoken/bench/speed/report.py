"""A record of `foretoken bench speed` as tables and sentences, for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.console import Console
from rich.text import Text

from foretoken.bench.report import new_table
from foretoken.bench.speed.cell import (
    AGREEMENT_BOUND,
    EAGER_BOUND,
    PREDICTION_BOUND,
    SPEED_UP_BOUND,
)

Entry: TypeAlias = Mapping[str, Any]
MISSING = "–"


@dataclass(frozen=True, slots=True)
class Part:
    """A heading with a table or sentences below it.

    Args:
        title: The heading.
        columns: Of the table; empty for sentences.
        rows: Of the table, or a sentence each.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def print_report(record: Entry, console: Console) -> None:
    """Print what a person wants of a record.

    Args:
        record: As `run_speed` returns it.
        console: Where to.
    """
    console.print(_heading(record), highlight=False)
    for part in parts(record):
        console.print()
        console.print(Text(part.title, style="bold"))
        if part.columns:
            table = new_table(*part.columns)
            for row in part.rows:
                table.add_row(*row)
            console.print(table)
        else:
            for row in part.rows:
                console.print(Text(row[0]))


def as_markdown(record: Entry) -> str:
    """Return the same as a Markdown text.

    Args:
        record: As `run_speed` returns it.
    """
    lines = [f"# {record['what']}", "", _heading(record), "", f"`{record['command']}`", ""]
    for part in parts(record):
        lines += [f"## {part.title}", ""]
        if part.columns:
            lines += [_line(part.columns), _line(["---"] + ["---:"] * (len(part.columns) - 1))]
            lines += [_line(row) for row in part.rows]
        else:
            lines += [f"- {row[0]}" for row in part.rows]
        lines.append("")
    return "\n".join([*lines, record["policy"], ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heading(record: Entry) -> str:
    settings, machine = record["settings"], record["environment"]
    facts = record["models"]["shared"]
    return (
        f"{facts['name']}: {facts['num_parameters'] / 1e6:.1f} million parameters, "
        f"{facts['num_layers']} layers in {facts['loops']} loops, {facts['dtype']}; "
        f"{settings['num_prompts']} prompts of {settings['workload']}, "
        f"{settings['max_new_tokens']} tokens each, {settings['rounds']} rounds. "
        f"{machine['processor']}, {machine['cores']} cores; threads: {machine['threads']}."
    )


def parts(record: Entry) -> Iterator[Part]:
    """Yield the parts of a report.

    Args:
        record: As `run_speed` returns it.
    """
    for cell in record["cells"]:
        where = _where(cell)
        yield _speeds(cell, where)
        if any("ticks_per_token_of_the_model" in it for it in cell["systems"].values()):
            yield _models(cell, where)
    if "picture" in record:
        yield _qualities(record)
    yield Part("Conclusions", (), [(line,) for line in conclusions(record)])


def _where(cell: Entry) -> str:
    mode = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
    return mode if cell["batch_size"] == 1 else f"{mode}, {cell['batch_size']} prompts at once"


def _speeds(cell: Entry, where: str) -> Part:
    columns = ("way", "ms per token", "speed-up [95 %]", "ticks per token", "ms per tick", "rows")
    rows = [
        (
            name,
            f"{system['token_ms']['median']:.3g}",
            _ratio(system.get("speed_up")),
            _number(system.get("ticks_per_token")),
            _number(system.get("tick_ms")),
            _number(system.get("rows", {}).get("mean")),
        )
        for name, system in cell["systems"].items()
    ]
    return Part(f"Speed, {where}", columns, rows)


def _models(cell: Entry, where: str) -> Part:
    columns = (
        "way",
        "agreement",
        "ticks per token",
        "of the model",
        "speed-up",
        "predicted",
        "measured / predicted",
    )
    rows = [
        (
            name,
            _number(system["agreement"]),
            _number(system["ticks_per_token"]),
            _number(system["ticks_per_token_of_the_model"]),
            _number(system["speed_up"]["median"]),
            _number(system["predicted_speed_up"]),
            _number(system["measured_over_predicted"]),
        )
        for name, system in cell["systems"].items()
        if "ticks_per_token_of_the_model" in system
    ]
    return Part(f"Measured against the cost model, {where}", columns, rows)


def _qualities(record: Entry) -> Part:
    columns = ("model", "parameters", "ms per token", "held-out bits per character")
    rows = [
        (
            point["name"],
            f"{record['models'][point['model']]['num_parameters'] / 1e6:.1f} million",
            f"{point['token_ms']['median']:.3g}",
            f"{point['bits_per_character']:.3f}",
        )
        for point in record["picture"]["points"]
    ]
    return Part("Quality against latency", columns, rows)


def conclusions(record: Entry) -> Iterator[str]:
    """Yield what was wanted and what came of it, whichever way it fell.

    Args:
        record: As `run_speed` returns it.
    """
    for cell in record["cells"]:
        where = _where(cell)
        for name, system in cell["systems"].items():
            if "measured_over_predicted" in system:
                yield from _about_way(f"{where}, {name}", system)
        for exit_loop, ratio in cell["eager_over_lazy"].items():
            is_met = ratio["median"] >= EAGER_BOUND
            yield (
                f"{where}: the eager check is {_ratio(ratio)} times as fast as the lazy one at "
                f"e={exit_loop}; wanted {EAGER_BOUND:g}: {_answer(is_met)}"
            )
        if "auto" in cell["systems"]:
            ratio = cell["systems"]["auto"]["speed_up"]
            yield f"{where}: the planner's choice is {_ratio(ratio)} times as fast as plain"
    if "verdict" in record.get("picture", {}):
        yield from _about_quality(record["picture"]["verdict"])


def _about_way(name: str, system: Entry) -> Iterator[str]:
    ratio, agreement = system["measured_over_predicted"], system["agreement"]
    is_near = abs(ratio - 1.0) <= PREDICTION_BOUND
    yield (
        f"{name}: measured speed-up {ratio:.3f} of the predicted one; wanted within "
        f"{PREDICTION_BOUND:.0%}: {_answer(is_near)}"
    )
    if agreement >= AGREEMENT_BOUND and system["exit_loop"] == 1:
        speed_up = system["speed_up"]["median"]
        yield (
            f"{name}: agreement {agreement:.2f}, speed-up {speed_up:.2f}; wanted "
            f"{SPEED_UP_BOUND:g} where it is at least {AGREEMENT_BOUND:g}: "
            f"{_answer(speed_up >= SPEED_UP_BOUND)}"
        )


def _about_quality(verdict: Entry) -> Iterator[str]:
    low, high = verdict["latency_over_shallow_interval_95"]
    yield (
        f"shared with SPEED ({verdict['way']}) takes {verdict['latency_over_shallow']:.2f} "
        f"[{low:.2f}, {high:.2f}] times the shallow model's time per token and "
        f"{_bits(verdict['bits_below_shallow'])} than it"
    )
    if "bits_of_unshared_at_this_latency" in verdict:
        yield (
            "an unshared model of that latency, between the shallow and the deep one, would have "
            f"{verdict['bits_of_unshared_at_this_latency']:.3f} bits per character"
        )
    answer = _answer(verdict["is_better_at_equal_latency"])
    yield f"at equal latency the shared model with SPEED is the better one: {answer}"


def _bits(difference: float) -> str:
    side = "fewer" if difference >= 0 else "more"
    return f"has {abs(difference):.3f} {side} bits per character"


def _answer(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _ratio(ratio: Entry | None) -> str:
    if ratio is None:
        return MISSING
    low, high = ratio["interval_95"]
    return f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


__all__ = ["Part", "as_markdown", "conclusions", "parts", "print_report"]
