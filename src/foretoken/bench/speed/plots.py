"""A record of `foretoken bench speed` as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from foretoken.bench.plots import DPI, FAINT, INK, OURS, PEER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry: TypeAlias = Mapping[str, Any]
WIDTH_IN, PANEL_IN = 7.0, 4.2
LETTERS_PER_IN = 15  # of a subtitle
COLOURS = {"shared": OURS, "shallow": PEER, "deep": "#7b4b94"}


def write_plots(record: Entry, folder: Path) -> list[Path]:
    """Draw quality against latency, and what was measured against the cost model.

    Args:
        record: As `run_speed` returns it.
        folder: Exists.

    Returns:
        The files; none of what was not measured.
    """
    paths = []
    if "picture" in record:
        paths.append(_saved(_quality(record), folder / "quality_latency.png"))
    if any(_modelled(cell) for cell in record["cells"]):
        paths.append(_saved(_model(record), folder / "cost_model.png"))
    return paths


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path


def _figure(num_panels: int, title: str, record: Entry) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, PANEL_IN), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    text = "\n".join(textwrap.wrap(_subtitle(record), round(WIDTH_IN * LETTERS_PER_IN)))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=FAINT)
    for axis in axes:
        axis.tick_params(labelsize=8, colors=INK)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def _subtitle(record: Entry) -> str:
    facts, machine = record["models"]["shared"], record["environment"]
    return (
        f"{facts['name']}, {facts['num_parameters'] / 1e6:.1f} million parameters, "
        f"{facts['loops']} loops, {facts['dtype']}; medians and ranges of "
        f"{record['settings']['rounds']} rounds; {machine['processor']}, threads: "
        f"{machine['threads']}; {record['at'][:10]}"
    )


def _quality(record: Entry) -> Figure:
    figure, [axis] = _figure(1, "Quality against latency", record)
    points = record["picture"]["points"]
    places = {point["name"]: _place(point) for point in points}
    for point in points:
        x, y = places[point["name"]]
        low, high = point["token_ms"]["min"], point["token_ms"]["max"]
        colour = COLOURS[point["model"]]
        axis.errorbar(x, y, xerr=[[x - low], [high - x]], fmt="o", color=colour, capsize=3)
        axis.annotate(
            point["name"], (x, y), xytext=(0, 8), textcoords="offset points", fontsize=8,
            color=colour, ha="center",
        )  # fmt: skip
    shared = [places[point["name"]] for point in points if point["model"] == "shared"]
    if len(shared) == 2:
        style = {"arrowstyle": "->", "color": OURS, "linestyle": "dashed"}
        axis.annotate("", xy=shared[1], xytext=shared[0], arrowprops=style)
    unshared = [places[point["name"]] for point in points if point["model"] != "shared"]
    if len(unshared) == 2:
        axis.plot(*zip(*unshared, strict=True), color=FAINT, linewidth=0.8, zorder=0)
    axis.set_xscale("log")
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        ticks("{x:g}")
    axis.tick_params(which="minor", labelsize=8)
    axis.margins(0.2)
    axis.set_xlabel("milliseconds per token (one request, greedy)", fontsize=8, color=INK)
    axis.set_ylabel("held-out bits per character (lower is better)", fontsize=8, color=INK)
    return figure


def _place(point: Entry) -> tuple[float, float]:
    return point["token_ms"]["median"], point["bits_per_character"]


def _modelled(cell: Entry) -> dict[str, Entry]:
    return {
        name: system
        for name, system in cell["systems"].items()
        if "ticks_per_token_of_the_model" in system
    }


def _model(record: Entry) -> Figure:
    figure, (ticks, speeds) = _figure(2, "Measured against the cost model", record)
    for cell in record["cells"]:
        systems = _modelled(cell)
        marker = "o" if cell["temperature"] == 0 else "s"
        mode = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
        label = f"{mode}, batch {cell['batch_size']}"
        _scatter(
            ticks,
            [it["ticks_per_token_of_the_model"] for it in systems.values()],
            [it["ticks_per_token"] for it in systems.values()],
            list(systems),
            marker,
            label,
        )
        _scatter(
            speeds,
            [it["predicted_speed_up"] for it in systems.values()],
            [it["speed_up"]["median"] for it in systems.values()],
            list(systems),
            marker,
            label,
        )
    for axis, what in ((ticks, "ticks per token"), (speeds, "speed-up over plain decoding")):
        low, high = axis.get_xlim()
        axis.axline((low, low), (high, high), color=FAINT, linewidth=0.8, zorder=0)
        axis.set_xlabel(f"{what}, by the model", fontsize=8, color=INK)
        axis.set_ylabel(f"{what}, measured", fontsize=8, color=INK)
    ticks.legend(fontsize=7, frameon=False)
    return figure


def _scatter(
    axis: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    names: Sequence[str],
    marker: str,
    label: str,
) -> None:
    axis.scatter(xs, ys, marker=marker, s=22, label=label, alpha=0.8)
    for name, x, y in zip(names, xs, ys, strict=True):
        axis.annotate(
            name, (x, y), xytext=(4, -8), textcoords="offset points", fontsize=6, color=FAINT
        )


__all__ = ["write_plots"]
