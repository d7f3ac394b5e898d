"""A shape study as a file, a table and pictures."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from foretoken.planner.analysis import expected_tokens, speed_up, step_ms
from foretoken.training.draft.study_findings import families
from foretoken.training.draft.study_record import Candidate, StudyReport
from foretoken.training.folder import write_json
from foretoken.training.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_FILE, TABLE_FILE = "study.json", "study.md"
COLOURS = ("#0b6e4f", "#e0a458", "#3d5a80", "#d9534f", "#7b4b94", "#8c6d46", "#4f9da6")
INK, FAINT, GRID = "#222222", "#777777", "#dddddd"
WIDTH_IN, HEIGHT_IN, DPI = 8.0, 4.4, 150
MILLION = 1e6


def write_report(report: StudyReport, folder: Path) -> list[Path]:
    """Write a study as JSON, as a table, and as pictures where matplotlib is installed.

    Args:
        report: The study.
        folder: Exists.

    Returns:
        The files.
    """
    write_json(folder / REPORT_FILE, report.as_dict())
    text = table(report)
    write_atomically(folder / TABLE_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    files = [folder / REPORT_FILE, folder / TABLE_FILE]
    return files + (write_plots(report, folder) if importlib.util.find_spec("matplotlib") else [])


def table(report: StudyReport) -> str:
    """Return the candidates, best first, and the findings, as Markdown."""
    best_first = sorted(report.candidates, key=lambda it: -it.speed_up)
    lines = [
        f"# Shapes of a draft model for {report.target}",
        "",
        f"Plain decoding takes {report.plain_ms:.3g} ms per token. Acceptance in brackets is "
        "interpolated from shapes that were trained.",
        "",
        "| layers × width | tokens | parameters | ms per draft token (rounds) | acceptance "
        "| best lookahead | tokens per step | predicted speed-up (rounds) |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(report, it) for it in best_first),
        "",
        "Findings:",
        "",
        *(f"- {text}" for text in told_findings(report)),
    ]
    return "\n".join(lines) + "\n"


def _row(report: StudyReport, it: Candidate) -> str:
    first = f"{it.acceptances[0]:.2f}"
    low, middle, high = (
        f"{value / report.lookahead:.3g}"
        for value in (it.draft_ms.low, it.draft_ms.median, it.draft_ms.high)
    )
    cells = [
        f"{it.layers} × {it.hidden}" + (" ←" if it is report.best else ""),
        str(it.vocab),
        f"{it.num_parameters / MILLION:.3g} M",
        f"{middle} ({low} to {high})",
        first if it.is_trained else f"[{first}]",
        str(it.num_draft_tokens),
        f"{it.tokens_per_step:.2f}",
        f"{it.speed_up:.2f} ({it.slowest:.2f} to {it.fastest:.2f})",
    ]
    return "| " + " | ".join(cells) + " |"


def told_findings(report: StudyReport) -> list[str]:
    """Return the findings in sentences."""
    found, told = report.findings, []
    if exponents := found["latency"]:
        told.append(
            f"Twice the depth at equal parameters takes {2 ** exponents['depth']:.2f} times as "
            f"long; twice the parameters at equal depth, {2 ** exponents['parameters']:.2f} times "
            f"({100 * exponents['explained']:.0f} % of the variance explained)."
        )
    for it in found["equal_parameters"]:
        told.append(
            f"At {it['num_parameters'] / MILLION:.3g} M parameters, {it['times_the_depth']:.0f} "
            f"times the depth takes {it['times_the_latency']:.2f} times as long; predicted "
            f"speed-ups {it['shallow_speed_up']:.2f} (shallow), {it['deep_speed_up']:.2f} (deep)."
        )
    pairs = found["better_but_slower"]
    if pairs["num_pairs"]:
        told.append(
            f"Of {pairs['num_pairs']} pairs of trained shapes, the one with the better perplexity "
            f"is the slower one in {pairs['num_slower']}."
        )
    if pairs["num_slower"]:
        told.append(
            f"The most telling pair: perplexity {math.exp(pairs['better_cross_entropy']):.2f} and "
            f"speed-up {pairs['better_speed_up']:.2f} ({pairs['better']}), against "
            f"{math.exp(pairs['faster_cross_entropy']):.2f} and {pairs['faster_speed_up']:.2f} "
            f"({pairs['faster']})."
        )
    return told


def write_plots(report: StudyReport, folder: Path) -> list[Path]:
    """Draw latency, throughput against TAR, and break-even; return the files.

    Args:
        report: The study.
        folder: Exists.
    """
    drawings: dict[str, tuple[str, Sequence[Callable[[Axes, StudyReport], None]]]] = {
        "latency": (
            "Milliseconds per draft token, at equal parameters along each line",
            (_draw_depth, _draw_width),
        ),
        "throughput": (
            "Predicted throughput against tokens per step, each at its best lookahead",
            (_draw_throughput,),
        ),
        "break_even": (
            "Tokens per step that a draft gives, and those at which it would break even",
            tuple(partial(_draw_break_even, it=it) for it in _compared(report)),
        ),
    }
    paths = []
    for name, (title, draws) in drawings.items():
        paths.append(folder / f"{name}.png")
        _draw_figure(report, title, draws, paths[-1])
    return paths


def _draw_figure(
    report: StudyReport,
    title: str,
    draws: Sequence[Callable[[Axes, StudyReport], None]],
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(draws), squeeze=False, sharey=True)[0]
    for axis, draw in zip(axes, draws, strict=True):
        draw(axis, report)
        axis.tick_params(labelsize=8, length=0, colors=INK)
        axis.grid(linewidth=0.5, color=GRID)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    subtitle = (
        f"target {report.target}, {report.target_parameters / MILLION:.3g} M parameters; "
        f"plain decoding {report.plain_ms:.3g} ms per token; longest lookahead {report.lookahead}"
    )
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7.5, color=FAINT)
    figure.savefig(path, dpi=DPI)


def _draw_depth(axis: Axes, report: StudyReport) -> None:
    _draw_latency(axis, report, lambda it: it.layers)
    depths = sorted({it.layers for it in report.candidates})
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.minorticks_off()
    axis.set_xlabel("layers", fontsize=9, color=INK)
    axis.set_ylabel("ms per draft token", fontsize=9, color=INK)
    axis.legend(
        fontsize=7.5, frameon=False, title="parameters", title_fontsize=7.5, loc="lower right"
    )


def _draw_width(axis: Axes, report: StudyReport) -> None:
    _draw_latency(axis, report, lambda it: it.hidden)
    axis.set_xlabel("width", fontsize=9, color=INK)


def _draw_latency(axis: Axes, report: StudyReport, size_of: Callable[[Candidate], int]) -> None:
    groups = families(_with_all_tokens(report))
    lines = [group for group in groups if len(group) > 1] or groups
    for colour, family in zip(_cycle(COLOURS), lines, strict=False):
        sizes = [size_of(it) for it in family]
        times = [it.draft_ms.median / report.lookahead for it in family]
        lows = [(it.draft_ms.median - it.draft_ms.low) / report.lookahead for it in family]
        highs = [(it.draft_ms.high - it.draft_ms.median) / report.lookahead for it in family]
        axis.errorbar(
            sizes,
            times,
            yerr=[lows, highs],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.4,
            elinewidth=0.8,
            label=f"{family[0].num_parameters / MILLION:.3g} M",
        )
    axis.set_ylim(bottom=0)


def _draw_throughput(axis: Axes, report: StudyReport) -> None:
    depths = sorted({it.layers for it in report.candidates})
    rate = 1000 / report.plain_ms
    for colour, depth in zip(_cycle(COLOURS), depths, strict=False):
        for it in report.candidates:
            if it.layers == depth:
                axis.errorbar(
                    it.tokens_per_step,
                    rate * it.speed_up,
                    yerr=[[rate * (it.speed_up - it.slowest)], [rate * (it.fastest - it.speed_up)]],
                    color=colour,
                    marker="o" if it.is_trained else "s",
                    markerfacecolor=colour if it.is_trained else "white",
                    markersize=5,
                    elinewidth=0.8,
                )
        axis.plot([], [], "o", color=colour, markersize=5, label=_layers(depth))
    axis.plot([], [], "s", color=FAINT, markerfacecolor="white", label="acceptance interpolated")
    axis.axhline(rate, color=FAINT, linewidth=0.8, linestyle="--", label="plain decoding")
    best = report.best
    axis.annotate(
        f"chosen: {best.layers} × {best.hidden}",
        (best.tokens_per_step, rate * best.speed_up),
        xytext=(8, 8),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )
    axis.set_xlabel("tokens per step (TAR)", fontsize=9, color=INK)
    axis.set_ylabel("tokens per second, predicted", fontsize=9, color=INK)
    axis.legend(fontsize=7.5, frameon=False)


def _draw_break_even(axis: Axes, report: StudyReport, it: Candidate) -> None:
    lengths = range(report.lookahead + 1)
    given = [expected_tokens(it.acceptances[:length]) for length in lengths]
    needed = [_step_ms(report, it, length) / report.plain_ms for length in lengths]
    axis.plot(lengths, given, color=COLOURS[0], marker="o", markersize=3, label="given")
    axis.plot(lengths, needed, color=COLOURS[3], marker="o", markersize=3, label="needed")
    axis.fill_between(
        lengths,
        given,
        needed,
        where=[gives > needs for gives, needs in zip(given, needed, strict=True)],
        color=COLOURS[0],
        alpha=0.12,
        interpolate=True,
    )
    if it is _compared(report)[0]:
        axis.set_ylabel("tokens per step", fontsize=9, color=INK)
    best = it.num_draft_tokens
    if best:
        gain = speed_up(given[best], step_ms=_step_ms(report, it, best), target_ms=report.plain_ms)
        axis.axvline(best, color=FAINT, linewidth=0.8, linestyle="--")
        axis.annotate(
            f"best: {best},\n{gain:.2f}×",
            (best, 1),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=7.5,
            color=INK,
        )
    axis.set_title(
        f"{_layers(it.layers)} × {it.hidden}, {it.num_parameters / MILLION:.3g} M",
        fontsize=9,
        color=INK,
        loc="left",
    )
    axis.set_xlabel("lookahead", fontsize=9, color=INK)
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")


def _step_ms(report: StudyReport, it: Candidate, length: int) -> float:
    """Return the time of a step; without a draft there is nothing more than plain decoding."""
    return step_ms(
        length,
        draft_ms=it.draft_ms.median / report.lookahead,
        verify_ms=report.verify_ms[length],
        overhead_ms=it.overhead_ms if length else 0.0,
    )


def _compared(report: StudyReport) -> list[Candidate]:
    """Return the chosen shape, the deepest of its family, and the one of most parameters."""
    best = report.best
    groups = families(_with_all_tokens(report))
    [near] = [min(groups, key=lambda it: abs(it[0].num_parameters - best.num_parameters))]
    largest = max(report.candidates, key=lambda it: it.num_parameters)
    return list({it.shape: it for it in (best, near[-1], largest)}.values())


def _with_all_tokens(report: StudyReport) -> list[Candidate]:
    most = max(it.vocab for it in report.candidates)
    return [it for it in report.candidates if it.vocab == most]


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _cycle(colours: Sequence[str]) -> list[str]:
    return list(colours) * 8


__all__ = ["REPORT_FILE", "TABLE_FILE", "table", "told_findings", "write_plots", "write_report"]
