"""The report of a training run as a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from foretoken.cli.terminal import is_terminal

PIPE_WIDTH = 120  # where no terminal has a width


def show_report(report: Mapping[str, Any]) -> None:
    """Print what a person wants of a report.

    Args:
        report: As `run_boost` returns it.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if is_terminal(sys.stdout) else PIPE_WIDTH, highlight=False)
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


__all__ = ["show_report"]
