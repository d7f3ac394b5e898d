"""The record as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretoken.bench.phases import PHASES
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = Mapping[str, Any]

OURS, OURS_PLAIN, PEER, PEER_PLAIN = "#0b6e4f", "#8fc1ae", "#3d5a80", "#a9bcd6"
PHASE_COLOURS = dict(
    zip(PHASES, ("#b8b8b8", "#e0a458", "#0b6e4f", "#7b4b94", "#d9534f"), strict=True)
)
INK, FAINT = "#222222", "#777777"
WIDTH_IN, BAR_IN, PANEL_IN, FRAME_IN = 8.0, 0.38, 0.45, 0.8
DPI = 150
SUBTITLE_COLUMNS = 125


def check_plots() -> None:
    """Check that pictures can be made, before anything is measured.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--output also draws, and matplotlib is not installed",
            hint="pip install 'foretoken[bench]'",
        ) from None


def write_plots(record: Entry, folder: Path) -> list[Path]:
    """Draw speed, time by phase and tokens per step, a panel per cell; return the files.

    Args:
        record: As `make_record` returns it.
        folder: Exists.
    """
    drawings: dict[str, tuple[str, str, Callable[[Axes, Entry], None]]] = {
        "tokens_per_s": ("Tokens per second, median and range of rounds", "rates", _draw_rates),
        "phases": ("Where the time goes, milliseconds per token", "phases", _draw_phases),
        "tokens_per_step": ("Tokens per pass of the target", "steps", _draw_steps),
    }
    paths = []
    for name, (title, kind, draw) in drawings.items():
        panels = [(cell, _chosen(cell, kind)) for cell in record["cells"]]
        panels = [(cell, systems) for cell, systems in panels if systems]
        if panels:
            paths.append(folder / f"{name}.png")
            _draw_figure(record, title, panels, draw, paths[-1])
    return paths


def _chosen(cell: Entry, kind: str) -> dict[str, Entry]:
    """Return the systems of a cell that have something to show, the first on top."""
    systems: dict[str, Entry] = dict(cell["systems"])
    if kind == "phases":
        return {name: it for name, it in systems.items() if "phases_ms_per_token" in it}
    if kind == "steps":
        return {name: it for name, it in systems.items() if it.get("tokens_per_step", 1) != 1}
    return systems


def _draw_figure(
    record: Entry,
    title: str,
    panels: Sequence[tuple[Entry, Mapping[str, Entry]]],
    draw: Callable[[Axes, Entry], None],
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [len(systems) for _, systems in panels]
    height = sum(counts) * BAR_IN + len(panels) * PANEL_IN + FRAME_IN
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
    FigureCanvasAgg(figure)
    # One scale and one thickness of bars, so that panels can be compared.
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=counts)[:, 0]
    for axis, (cell, systems) in zip(axes, panels, strict=True):
        draw(axis, systems)
        _frame(axis, systems, _heading(cell))
    if axes[0].get_legend_handles_labels()[0]:
        _add_legend(axes[0])
    settings, machine = record["settings"], record["environment"]
    subtitle = (
        f"{settings['model']}, {settings['dtype']}, {settings['num_prompts']} prompts of "
        f"{settings['workload']}, {settings['rounds']} rounds; {machine['processor']}, "
        f"threads: {machine['threads']}; {record['at'][:10]}"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    subtitle = "\n".join(textwrap.wrap(subtitle, SUBTITLE_COLUMNS, break_on_hyphens=False))
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7.5, color=FAINT)
    figure.savefig(path, dpi=DPI)


def _frame(axis: Axes, systems: Mapping[str, Entry], heading: str) -> None:
    axis.set_yticks(range(len(systems)), list(systems))
    axis.set_ylim(len(systems) - 0.5, -0.5)
    axis.set_title(heading, loc="left", fontsize=9, color=INK)
    axis.tick_params(labelsize=8, length=0, colors=INK)
    axis.grid(axis="x", linewidth=0.5, color="#dddddd")
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#bbbbbb")


def _heading(cell: Entry) -> str:
    mode = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
    return f"{mode}, {cell['batch_size']} at once" if cell["batch_size"] > 1 else mode


def _draw_rates(axis: Axes, systems: Mapping[str, Entry]) -> None:
    for place, (name, system) in enumerate(systems.items()):
        rate = system["tokens_per_s"]
        axis.barh(place, rate["median"], color=_colour(name), height=0.64)
        axis.hlines(place, rate["min"], rate["max"], color=INK, linewidth=1.2)
        text = f"{rate['median']:.0f}" if rate["median"] >= 100 else f"{rate['median']:.1f}"
        if "speed_up" in system:
            text += f"  ({system['speed_up']['median']:.2f}×)"
        _label(axis, rate["max"], place, text)
    _leave_room(axis, max(system["tokens_per_s"]["max"] for system in systems.values()))


def _draw_phases(axis: Axes, systems: Mapping[str, Entry]) -> None:
    sums = []
    for place, system in enumerate(systems.values()):
        left = 0.0
        for phase in PHASES:
            value = system["phases_ms_per_token"][phase]
            axis.barh(
                place,
                value,
                left=left,
                color=PHASE_COLOURS[phase],
                height=0.64,
                label=phase if place == 0 else None,
            )
            left += value
        sums.append(left)
        _label(axis, left, place, f"{left:.2f} ms")
    _leave_room(axis, max(sums))


def _add_legend(axis: Axes) -> None:
    axis.legend(
        ncols=len(PHASES), fontsize=7.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1)
    )


def _draw_steps(axis: Axes, systems: Mapping[str, Entry]) -> None:
    for place, (name, system) in enumerate(systems.items()):
        value = system["tokens_per_step"]
        axis.barh(place, value, color=_colour(name), height=0.64)
        text = f"{value:.2f}"
        if "acceptance_rate" in system:
            text += f"  ({100 * system['acceptance_rate']:.0f} % of drafts accepted)"
        _label(axis, value, place, text)
    _leave_room(axis, max(system["tokens_per_step"] for system in systems.values()), share=1.45)


def _label(axis: Axes, end: float, place: int, text: str) -> None:
    axis.annotate(
        text,
        (end, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
    )


def _leave_room(axis: Axes, largest: float, share: float = 1.25) -> None:
    axis.set_xlim(0, max(largest * share, axis.get_xlim()[1]))


def _colour(name: str) -> str:
    is_ours, is_plain = name.startswith("foretoken "), name.endswith(" plain")
    if is_ours:
        return OURS_PLAIN if is_plain else OURS
    return PEER_PLAIN if is_plain else PEER


__all__ = ["check_plots", "write_plots"]
