"""The record as pictures: cost curves, acceptance by depth, predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretoken.bench.plots import DPI, FAINT, INK
from foretoken.bench.tune.settings import PLAIN
from foretoken.planner.cost import CostCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = Mapping[str, Any]

COLOURS = ("#0b6e4f", "#e0a458", "#3d5a80", "#d9534f", "#7b4b94", "#8c6d46", "#4f9da6")
SIZE_IN = (6.4, 4.2)
MIN_CASES = 5  # judged levels under which a rate is left out


def write_plots(record: Entry, folder: Path) -> list[Path]:
    """Draw what the record holds and return the files.

    Args:
        record: As `make_record` returns it.
        folder: Exists.
    """
    drawings: dict[str, tuple[str, bool, Callable[[Axes, Entry], None]]] = {
        "cost": ("Milliseconds of a pass by its rows", "target" in record["cost_ms"], _draw_cost),
        "acceptance": (
            "Share of levels that held the target's token, by depth",
            any(it["acceptance_by_depth"] for it in record["candidates"]),
            _draw_acceptance,
        ),
        "predicted": (
            "Speed-up over plain decoding: predicted and measured",
            len(record["measured"]) > 1,
            _draw_predicted,
        ),
    }
    paths = []
    for name, (title, has_data, draw) in drawings.items():
        if has_data:
            paths.append(folder / f"{name}.png")
            _draw_figure(record, title, draw, paths[-1])
    return paths


def _draw_figure(
    record: Entry, title: str, draw: Callable[[Axes, Entry], None], path: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_IN, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    draw(axis, record)
    axis.tick_params(labelsize=8, length=0, colors=INK)
    axis.grid(linewidth=0.5, color="#dddddd")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=7.5, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    settings, machine = record["settings"], record["environment"]
    subtitle = (
        f"{settings['model']}, {settings['dtype']}, {settings['num_prompts']} prompts of "
        f"{settings['source']}; {machine['processor']}; {record['at'][:10]}"
    )
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7, color=FAINT)
    figure.savefig(path, dpi=DPI)


def _draw_cost(axis: Axes, record: Entry) -> None:
    for colour, (name, entry) in zip(COLOURS, record["cost_ms"].items(), strict=False):
        curve = CostCurve.from_dict(entry)
        label = name if name == "target" else f"model of {name}"
        axis.plot(curve.rows, curve.base_ms, color=colour, marker="o", ms=3, label=label)
    axis.set_xlabel("rows", fontsize=8, color=INK)
    axis.set_ylim(bottom=0)


def _draw_acceptance(axis: Axes, record: Entry) -> None:
    from matplotlib.ticker import MaxNLocator

    for colour, candidate in zip(COLOURS, record["candidates"], strict=False):
        tallies = {
            int(depth): tally
            for depth, tally in candidate["acceptance_by_depth"].items()
            if tally["count"] >= MIN_CASES
        }
        rates = [tally["rate"] for tally in tallies.values()]
        label = candidate["name"]
        axis.plot(list(tallies), rates, color=colour, marker="o", ms=3, label=label)
    axis.set_xlabel("depth, given that the level above was taken", fontsize=8, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(0, 1)


def _draw_predicted(axis: Axes, record: Entry) -> None:
    entries = [entry for entry in record["measured"] if entry["name"] != PLAIN]
    for place, entry in enumerate(entries):
        ratio = entry["speed_up"]
        colour = COLOURS[place % len(COLOURS)]
        axis.barh(place, ratio["median"], color=colour, height=0.6)
        axis.hlines(place, *ratio["interval_95"], color=INK, linewidth=1.2)
        if "predicted_speed_up" in entry:
            label = None if axis.get_legend_handles_labels()[0] else "predicted"
            axis.plot(
                entry["predicted_speed_up"], place, marker="D", color=INK, ms=5, ls="", label=label
            )
    axis.axvline(1.0, color=FAINT, linewidth=1, linestyle="--", label="plain decoding")
    axis.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.set_xlim(left=0)


__all__ = ["write_plots"]
