"""The reports of training runs as tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from foretoken.cli.terminal import is_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 120  # where no terminal has a width


def show_report(report: Mapping[str, Any]) -> None:
    """Print what a person wants of the report of a pool.

    Args:
        report: As `run_boost` returns it.
    """
    from rich.table import Table

    console = _console()
    corpus, settings, held_out = report["corpus"], report["settings"], report["held_out"]
    console.print(
        f"[bold]{settings['model']}[/], draft models from {settings['start']}; trained on "
        f"{corpus['num_texts']:,} outputs ({corpus['num_tokens']:,} tokens), {settings['steps']:,} "
        f"steps each\nmeasured on {corpus['num_held_out_texts']} other prompts "
        f"({corpus['num_held_out_tokens']:,} tokens, windows of {settings['window']})\n"
    )
    has_control = any("control" in pool for pool in held_out["pools"])
    columns = ["covered", "first choices", "tokens/step"]
    table = Table(box=None, pad_edge=False)
    table.add_column("pool", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
        if has_control:
            table.add_column("control", justify="right", style="dim")
    table.add_column("one model's best n", justify="right")
    table.add_column("one model's tree", justify="right")
    table.add_row("the start", *_cells(held_out["start"], None, has_control=has_control))
    for pool in held_out["pools"]:
        size = pool["size"]
        table.add_row(
            f"{size} model{'s' if size > 1 else ''}",
            *_cells(pool["boosted"], pool.get("control"), has_control=has_control),
            f"{pool['one_model']['best_choices']:.1%}",
            f"{pool['one_model']['tree_tokens_per_step']:.2f}",
        )
    console.print(table)
    num_models = len(report["members"])
    if num_models < settings["pool_size"]:
        console.print(
            f"\nthe pool ends with model {num_models}: no window is left to train another one on"
        )
    for other, differences in held_out["largest_pool_minus"].items():
        console.print(f"\nthe boosted pool's gain over {_named(other)} [95 %]:")
        for name, gain in differences.items():
            console.print(f"  {name.replace('_', ' ')} {_gain(name, gain)}", markup=False)


def show_draft_report(report: Mapping[str, Any]) -> None:
    """Print what a person wants of the report of a draft model.

    Args:
        report: As `run_draft` returns it.
    """
    console = _console()
    settings, collected, distilled = report["settings"], report["collect"], report["distil"]
    begun = "cut from the target" if settings["method"] == "prune" else "begun from scratch"
    before, after = distilled["held_out"]["before"], distilled["held_out"]["after"]
    console.print(
        f"[bold]{settings['model']}[/]: a draft model of "
        f"{report['initialise']['num_parameters']:,} parameters, {begun}\n"
        f"shape          {report['design']['shape']} [dim]({report['design']['chosen_by']})[/]\n"
        f"distilled on   {collected['num_texts']:,} outputs ({collected['num_tokens']:,} tokens), "
        f"{distilled['num_steps']:,} steps of {distilled['batch_size']}, {settings['loss']} "
        f"{distilled['first_loss']:.3f} → {distilled['last_loss']:.3f}\n"
        f"first choices  {before['agreement']:.1%} → {after['agreement']:.1%} are the target's\n"
        f"overlap        {before['overlap']:.1%} → {after['overlap']:.1%} of the target's "
        f"probability\n"
    )
    console.print(_served(report))
    console.print(_verdict(report))
    took = ", ".join(f"{name} {_duration(s)}" for name, s in report["seconds"].items() if s >= 1)
    console.print(f"[dim]{_duration(sum(report['seconds'].values()))} in all: {took}[/]")


def _served(report: Mapping[str, Any]) -> Table:
    from rich.table import Table

    collected = report["collect"]
    table = Table(
        box=None,
        pad_edge=False,
        title=f"served one at a time, {collected['num_held_out_texts']} other prompts "
        f"({collected['num_held_out_tokens']:,} tokens)",
        title_justify="left",
        title_style="",
    )
    table.add_column("drafter", no_wrap=True)
    for column in ("tokens/step", "tokens/s"):
        table.add_column("forecast", justify="right", style="dim")
        table.add_column(column, justify="right")
    table.add_column("times plain decoding \\[95 %]", justify="right")
    for name, served in report["verify"].items():
        forecast = report["forecast"][name]
        table.add_row(
            f"[bold]{name}[/]" if name == "draft" else name,
            f"{forecast['tokens_per_step']['value']:.2f}",
            f"{served['tokens_per_step']:.2f}",
            f"{forecast['tokens_per_s']['value']:,.0f}",
            f"{served['tokens_per_s']:,.0f}",
            _speedup(served.get("speedup")),
        )
    return table


def _verdict(report: Mapping[str, Any]) -> str:
    served = report["verify"]["draft"]
    same = (
        "[green]verified[/]: the same tokens as plain decoding"
        if not served["num_different"]
        else f"[yellow]{served['num_different']} outputs differ from plain decoding's[/], as "
        "arithmetic that depends on the batch may make them"
    )
    low, high = served["speedup"]["interval_95"]
    if high < 1:
        return f"\n{same}; [yellow]on this machine it is slower than no draft at all[/]"
    if low < 1:
        return f"\n{same}; [yellow]whether it is faster than no draft is not certain[/]"
    return f"\n{same}, {served['speedup']['value']:.2f} times as fast"


def _speedup(speedup: Mapping[str, Any] | None) -> str:
    if speedup is None:
        return ""
    low, high = speedup["interval_95"]
    return f"{speedup['value']:.2f} \\[{low:.2f}, {high:.2f}]"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if is_terminal(sys.stdout) else PIPE_WIDTH, highlight=False)


def _cells(
    ours: Mapping[str, float], control: Mapping[str, float] | None, *, has_control: bool
) -> list[str]:
    cells = []
    for name, value in ours.items():
        cells.append(_value(name, value))
        if has_control:
            cells.append(_value(name, control[name]) if control else "")
    return cells


def _value(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "tokens_per_step" else f"{value:.1%}"


def _gain(name: str, gain: Mapping[str, Any]) -> str:
    low, high = gain["interval_95"]
    if name == "tokens_per_step":
        return f"{gain['value']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"{100 * gain['value']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _named(other: str) -> str:
    return "a pool trained without dropping" if other == "control" else other


__all__ = ["show_draft_report", "show_report"]
