"""A sweep's record as a picture: a panel per text and temperature, a square per cell and method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foretoken.bench.plots import DPI, FAINT, INK
from foretoken.bench.sweep.settings import PLAIN
from foretoken.bench.sweep.summary import Entry, by_text, heading, resolution, speed_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMN_IN, ROW_IN, PANEL_IN, FRAME_IN, NAMES_IN, LEAST_IN = 0.62, 0.34, 0.6, 1.0, 1.6, 6.0
LETTERS_PER_IN = 15  # of the subtitle
MOST_TIMES = 4.0  # where the colours end, either way
COLOURS = "BrBG"  # brown is slower, white is even, green is faster; told apart by all eyes


def write_plots(record: Entry, folder: Path) -> list[Path]:
    """Draw the speed of every method in every cell; return the file.

    Args:
        record: As `run_sweep` returns it.
        folder: Exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = by_text(record)
    workloads = list(dict.fromkeys(workload for workload, _ in groups))
    temperatures = list(dict.fromkeys(temperature for _, temperature in groups))
    cells = next(iter(groups.values()))
    names = [name for name in cells[0]["systems"] if name != PLAIN]
    width = max(LEAST_IN, NAMES_IN + len(temperatures) * (len(cells) * COLUMN_IN + 0.4))
    height = FRAME_IN + len(workloads) * (len(names) * ROW_IN + PANEL_IN)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(workloads), len(temperatures), squeeze=False, sharey=True)
    for axis, key in zip(axes.flat, groups, strict=True):
        _draw(axis, groups[key], names)
        axis.set_title(heading(*key), loc="left", fontsize=9, color=INK)
    for axis in axes[-1]:
        axis.set_xlabel("prompts at once", fontsize=8, color=INK)
    figure.suptitle("Times plain decoding's speed", x=0.01, ha="left", fontsize=12, color=INK)
    subtitle = "\n".join(textwrap.wrap(_subtitle(record), round(width * LETTERS_PER_IN)))
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7.5, color=FAINT)
    path = folder / "sweep.png"
    figure.savefig(path, dpi=DPI)
    return [path]


def _draw(axis: Axes, cells: Sequence[Entry], names: Sequence[str]) -> None:
    ratios = np.array([[speed_up(cell, name) for cell in cells] for name in names])
    limit = np.log2(MOST_TIMES)
    axis.imshow(np.log2(ratios), cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), ratio in np.ndenumerate(ratios):
        is_best = cells[column]["best_fixed"] == names[row]
        style: dict[str, Any] = {"fontweight": "bold"} if is_best else {}
        is_dark = abs(np.log2(ratio)) > 0.7 * limit
        colour = "white" if is_dark else INK
        axis.text(
            column, row, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color=colour, **style
        )
    axis.set_xticks(range(len(cells)), [str(cell["batch_size"]) for cell in cells])
    axis.set_yticks(range(len(names)), list(names))
    axis.tick_params(labelsize=8, length=0, colors=INK)
    for side in axis.spines.values():
        side.set_visible(False)


def _subtitle(record: Entry) -> str:
    settings, machine = record["settings"], record["environment"]
    errors = resolution(record)
    again = f"Two plain engines differ by up to {100 * errors[0]:.1f} %. " if errors else ""
    return (
        f"Medians of paired slices; bold: the best fixed method, where it beats plain decoding. "
        f"{again}"
        f"{settings['model']}, {record['target']['dtype']}, {settings['max_new_tokens']} tokens "
        f"per prompt; {machine['processor']}, threads: {machine['threads']}; {record['at'][:10]}"
    )


__all__ = ["write_plots"]
