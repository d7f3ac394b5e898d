"""The record as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretoken.bench.specinfer.settings import COUPLED, MSS, NAIVE, Tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = Mapping[str, Any]

INK, FAINT = "#222222", "#777777"
COLOURS = {COUPLED: "#0b6e4f", MSS: "#e0a458", NAIVE: "#d9534f"}
OTHER_COLOURS = ("#7b4b94", "#3d5a80", "#8c6d46", "#4f9da6", "#b8b8b8")
STYLES = {Tree.STATIC: "-", Tree.FULL: "-.", Tree.BEST_FIRST: "--", Tree.BEST_FIRST_DEEP: ":"}
DPI = 150


def write_plots(record: Entry, folder: Path) -> list[Path]:
    """Draw tokens per step by size of the tree, a panel per temperature; return the file.

    Args:
        record: As `make_record` returns it.
        folder: Exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axis, temperature in zip(panels, (0.0, 1.0), strict=True):
        cells = [it for it in record["tokens_per_step"] if it["temperature"] == temperature]
        _draw(axis, cells)
        title = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        axis.set_title(title, loc="left", fontsize=9, color=INK)
    panels[0].set_ylabel("tokens per step", fontsize=8, color=INK)
    highest = max(it["tokens_per_step"]["interval_95"][1] for it in record["tokens_per_step"])
    panels[0].set_ylim(1, 1.3 * highest)  # room for the legends
    settings = record["settings"]
    figure.suptitle(
        "Tokens per pass of the target by nodes of the tree, 95 % intervals",
        x=0.01,
        ha="left",
        fontsize=12,
        color=INK,
    )
    subtitle = (
        f"{settings['model']} with draft {settings['draft']}, {settings['dtype']}, "
        f"{settings['num_prompts']} prompts of {settings['workload']}; {record['at'][:10]}"
    )
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7.5, color=FAINT)
    path = folder / "tokens_per_step.png"
    figure.savefig(path, dpi=DPI)
    return [path]


def _draw(axis: Axes, cells: Sequence[Entry]) -> None:
    lines: dict[tuple[str, str, str], list[Entry]] = {}
    for cell in cells:
        lines.setdefault((cell["tree"], cell["verifier"], cell["siblings"]), []).append(cell)
    spare = iter(OTHER_COLOURS)
    colours = dict(COLOURS)
    for (tree, verifier, siblings), points in lines.items():
        is_second = verifier == NAIVE and siblings != "iid"
        name = f"{verifier}, likeliest tokens" if is_second else verifier
        if name not in colours:
            colours[name] = next(spare, FAINT)
        nodes = [point["max_nodes"] for point in points]
        rates = [point["tokens_per_step"] for point in points]
        axis.errorbar(
            nodes,
            [rate["value"] for rate in rates],
            yerr=[
                [rate["value"] - rate["interval_95"][0] for rate in rates],
                [rate["interval_95"][1] - rate["value"] for rate in rates],
            ],
            label=f"{tree}, {name}" if cells[0]["temperature"] else tree,
            color=colours[name],
            linestyle=STYLES[Tree(tree)],
            marker="o",
            markersize=3,
            linewidth=1.3,
            elinewidth=0.8,
        )
    axis.set_xticks(sorted({cell["max_nodes"] for cell in cells}))
    axis.tick_params(labelsize=8, length=0, colors=INK)
    axis.grid(linewidth=0.5, color="#dddddd")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=6.5, frameon=False, loc="upper left", ncols=2)


__all__ = ["write_plots"]
