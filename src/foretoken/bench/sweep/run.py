"""The sweep: all methods share one loaded target, and every cell is written when it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foretoken.bench.foretoken_host import ForetokenHost, ForetokenSpec
from foretoken.bench.resume import begun_record, new_record, save_record
from foretoken.bench.runner import foretoken_specs
from foretoken.bench.sweep.cell import as_entry, measure
from foretoken.bench.sweep.schedule import PausingSystem
from foretoken.bench.sweep.settings import AUTO, PLAIN, PLAIN_AGAIN, SweepSettings
from foretoken.bench.sweep.work import PROMPT_TOKENS, SweepWork
from foretoken.bench.systems import HostInfo
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.plan import ADAPTIVE_MAX_NODES

WHAT = "foretoken bench sweep"
FORMAT = 4
POLICY = (
    "All methods run in one process and share one loaded target; each has an engine of its own, "
    "plain decoding one without drafters. They take short turns: in a lap every method continues "
    "the same prompts by the same number of tokens, in an order that is drawn, and the next order"
    " is its reverse. A batch that takes long is divided: all methods make one part of its "
    "tokens, then all the next. A slice is some laps; ratios are formed within a slice, and "
    "medians over all slices of all rounds are what counts. No prompt comes twice. A cell begins "
    "with rounds that do not count, the same ones for all methods: one of the least number of "
    "prompts, whose time says how many prompts a round needs to take plain decoding the least "
    "seconds, and if they are more, one of as many. A cell has more rounds while an interval is "
    "wider than asked for; in them a fixed method has no turns any more whose interval ends below "
    "where that of the best one begins, and its ratios are of the slices that it had. Intervals: "
    "bootstrap of the median over slices, 95 %, percentile method. Two engines decode plainly, and "
    "what plain decoding takes for a slice is the mean of both. plain_again is the second against "
    "the first: what they differ by, the method cannot resolve, and an outcome is clear only if "
    "the interval, widened by that, does not hold the bound. Seconds are those of the wall; cpu "
    "gives the same ratios by the processor's time of all threads of the process. story: the "
    "target continues beginnings of stories as it likes. edit: the prompt is a story, and the "
    "target is made to say it again with a word in twelve exchanged. random: prompt and output are "
    "made of random tokens. Making the target say something raises one logit after a real pass, in "
    "time that is not counted. The best fixed method of a cell is the one that turned out best, so "
    "`auto` is held against the luckiest, too."
)


def run_sweep(
    settings: SweepSettings,
    command: Sequence[str],
    folder: Path | None = None,
    report: OnProgress = silent,
    *,
    begins_anew: bool = False,
) -> dict[str, Any]:
    """Measure all cells that are not in the folder's record, and return the whole record.

    Args:
        settings: What to measure.
        command: The command line's words.
        folder: Where the record is, or will be after the first cell; it exists. None keeps
            nothing until the end.
        report: Is told how far it is.
        begins_anew: Whether a record that is there counts for nothing.

    Raises:
        ConfigError: The record there is of other settings, or a setting is not allowed.
        ModelError: A model cannot be loaded.
        ForetokenError: A method failed.
    """
    found = begun_record(WHAT, settings.as_json(), None if begins_anew else folder, number=FORMAT)
    record = found or new_record(
        WHAT,
        number=FORMAT,
        policy=POLICY,
        settings=settings.as_json(),
        threads=settings.threads,
        command=command,
    )
    cells, keys = record["cells"], settings.cells
    if cells:
        report(Progress(done=len(cells), total=len(keys), stage="cells", is_resumed=True))
    torch.set_num_threads(settings.threads)
    left = _TimeLeft(num_found=len(cells), num_all=len(keys))
    with ExitStack() as stack:
        if len(cells) < len(keys):
            systems = _load(stack, settings, report)
            record["target"] = _facts(systems[0].host.info)
            work = SweepWork(settings, Tokenizer.load(settings.model), systems[0].host.info)
            left.start()
        for key in keys[len(cells) :]:
            say = partial(_say, report, len(cells), len(keys), left.after(len(cells)))
            cells.append(as_entry(key, measure(key, systems, work, settings, say)))
            if folder is not None:
                save_record(record, folder)
    _say(report, len(cells), len(keys), None, "done")
    return record


class _TimeLeft:
    """Guesses by what cells have taken how long the others will."""

    def __init__(self, *, num_found: int, num_all: int) -> None:
        self._num_found = num_found
        self._num_all = num_all
        self._start_s = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._start_s = time.monotonic()

    def after(self, num_done: int) -> float | None:
        """Return the seconds that are left after so many cells; None if none was measured yet."""
        num_measured = num_done - self._num_found
        if not num_measured:
            return None
        per_cell_s = (time.monotonic() - self._start_s) / num_measured
        return per_cell_s * (self._num_all - num_done)


def _say(report: OnProgress, done: int, total: int, left_s: float | None, *doing: str) -> None:
    detail = ": ".join(doing)
    report(Progress(done=done, total=total, stage="cells", detail=detail, left_s=left_s))


def _facts(info: HostInfo) -> dict[str, Any]:
    return {
        "num_parameters": info.num_parameters,
        "dtype": info.dtype,
        "exactness": info.exactness,
    }


def _load(stack: ExitStack, settings: SweepSettings, report: OnProgress) -> list[PausingSystem]:
    """Return plain decoding twice, each drafter alone, and the engine's own choice among all."""
    report(Progress(done=0, total=1, detail="loading the target"))
    target = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    systems = []
    for name, spec in _specs(settings):
        report(Progress(done=0, total=1, detail=f"loading {name}"))
        host = ForetokenHost(spec, target)
        stack.callback(host.close)
        plain = name if spec.drafters == ("none",) else PLAIN
        systems.append(PausingSystem(name, plain, host, is_peer=False))
    return systems


def _specs(settings: SweepSettings) -> list[tuple[str, ForetokenSpec]]:
    """Return names and settings in the order of the first lap, the two plain ones apart."""
    longest = settings.max_new_tokens + max(PROMPT_TOKENS, settings.max_new_tokens)
    fixed = [
        # Timers around the parts would take more of a step the more parts it has.
        (name, replace(spec, times_phases=False))
        for name, spec in foretoken_specs(settings, longest)
    ]
    first = fixed[0][1]
    plain = replace(first, drafters=("none",))
    auto = replace(
        first,
        drafters=settings.drafters,
        max_nodes=max(ADAPTIVE_MAX_NODES, *settings.max_nodes),  # it has the choice
        adaptive=True,
    )
    middle = (len(fixed) + 1) // 2
    return [
        *((PLAIN, plain), *fixed[:middle], (PLAIN_AGAIN, plain)),
        *(*fixed[middle:], (AUTO, auto)),
    ]


__all__ = ["FORMAT", "POLICY", "WHAT", "run_sweep"]
