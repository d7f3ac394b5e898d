"""A load bench's record as pictures: latency against load, and goodput against load."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from foretoken.bench.plots import DPI, FAINT, INK
from foretoken.bench.serve.level import LATENCY_BOUND
from foretoken.bench.serve.settings import DRAFTS, PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry: TypeAlias = Mapping[str, Any]

COLOURS = {PLAIN: "#a9bcd6", DRAFTS: "#0b6e4f"}
NAMES = {PLAIN: "plain decoding", DRAFTS: "with drafts"}
PANEL_IN, HEIGHT_IN = 3.6, 3.8
LETTERS_PER_IN = 15  # of the subtitle


def write_plots(record: Entry, folder: Path) -> list[Path]:
    """Draw both pictures; return the files.

    Args:
        record: As `run_serve` returns it.
        folder: Exists.
    """
    return [_draw_latency(record, folder), _draw_goodput(record, folder)]


def _draw_latency(record: Entry, folder: Path) -> Path:
    figure, axes = _figure(3)
    panels = {
        "latency_ms": "Whole answer, ms",
        "first_token_ms": "First token, ms",
        "inter_token_ms": "Between tokens, ms",
    }
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name in (PLAIN, DRAFTS):
            for figure_of, style in (("mean", "-"), ("p95", ":")):
                values = [cell["systems"][name][key][figure_of] for cell in record["cells"]]
                label = f"{NAMES[name]}, {'mean' if figure_of == 'mean' else '95 %'}"
                _line(axis, record, values, name, style, label)
        _frame(axis, title)
        _set_log_scale(axis)
    axes[0].legend(fontsize=7.5, frameon=False)
    return _save(figure, record, folder / "latency.png", "Latency against load")


def _draw_goodput(record: Entry, folder: Path) -> Path:
    figure, axes = _figure(2)
    for name in (PLAIN, DRAFTS):
        rates = [
            cell["systems"][name]["goodput_tokens_per_s"]["median"] for cell in record["cells"]
        ]
        _line(axes[0], record, rates, name, "-", NAMES[name])
    wanted = [cell["wanted_tokens_per_s"] for cell in record["cells"]]
    axes[0].plot(_loads(record), wanted, color=INK, linewidth=0.8, linestyle=":", label="asked for")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=7.5, frameon=False)
    _frame(axes[0], "Goodput, output tokens per second")
    for key, colour, label in (
        ("latency_ratio", COLOURS[DRAFTS], "mean latency"),
        ("goodput_ratio", "#e0a458", "goodput"),
    ):
        entries = [cell[key] for cell in record["cells"]]
        _ratio_line(axes[1], record, entries, colour, label)
    axes[1].axhline(1, color=INK, linewidth=0.8)
    axes[1].axhline(LATENCY_BOUND, color=COLOURS[DRAFTS], linewidth=0.8, linestyle=":")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=7.5, frameon=False)
    _frame(axes[1], f"With drafts over plain decoding (dotted: {LATENCY_BOUND:g})")
    return _save(figure, record, folder / "goodput.png", "Goodput against load")


def _figure(num_panels: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(2, num_panels) * PANEL_IN, HEIGHT_IN), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, num_panels)


def _loads(record: Entry) -> list[float]:
    return [cell["load"] for cell in record["cells"]]


def _line(
    axis: Axes,
    record: Entry,
    values: Sequence[float | None],
    name: str,
    style: str,
    label: str,
) -> None:
    known = [float("nan") if value is None else value for value in values]
    axis.plot(
        _loads(record),
        known,
        color=COLOURS[name],
        linestyle=style,
        marker="o",
        markersize=3,
        label=label,
    )


def _ratio_line(
    axis: Axes, record: Entry, entries: Sequence[Entry], colour: str, label: str
) -> None:
    medians = [entry["median"] for entry in entries]
    lows = [max(0.0, entry["median"] - entry["interval_95"][0]) for entry in entries]
    highs = [max(0.0, entry["interval_95"][1] - entry["median"]) for entry in entries]
    axis.errorbar(
        _loads(record),
        medians,
        yerr=[lows, highs],
        color=colour,
        marker="o",
        markersize=3,
        capsize=2,
        label=label,
    )


def _frame(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=9, color=INK)
    axis.set_xlabel("load: part of what plain decoding can do", fontsize=8, color=INK)
    axis.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(axis="y", linewidth=0.5, color="#dddddd")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _set_log_scale(axis: Axes) -> None:
    """Let long waits beyond saturation not hide what is below."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, record: Entry, path: Path, title: str) -> Path:
    settings, machine, lengths = record["settings"], record["environment"], record["lengths"]
    subtitle = (
        f"{settings['model']}, {', '.join(settings['drafters'])}; {settings['trace']}, on average "
        f"{lengths['mean_prompt_tokens']:.0f} + {lengths['mean_new_tokens']:.0f} tokens, "
        f"rounds: {settings['rounds']}, {settings['duration_s']:g} s each; {machine['processor']}, "
        f"{machine['cores']} cores, threads: {machine['threads']}; {record['at'][:10]}"
    )
    width = round(float(figure.get_figwidth()) * LETTERS_PER_IN)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    wrapped = "\n".join(textwrap.wrap(subtitle, width, break_on_hyphens=False))
    figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=7.5, color=FAINT)
    figure.savefig(path, dpi=DPI)
    return path


__all__ = ["write_plots"]
