"""A bar on standard error for work that takes minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from foretoken.cli.terminal import is_terminal
from foretoken.core.progress import OnProgress, Progress, silent

if TYPE_CHECKING:
    from rich.console import Console

REDRAW_S = 0.5


@contextmanager
def progress_bar(
    otherwise: OnProgress = silent, *, shows_remaining: bool = False, is_still: bool = False
) -> Iterator[OnProgress]:
    """Show on a terminal how far the work is, stage by stage.

    Args:
        otherwise: Is told instead where standard error is no terminal.
        shows_remaining: Estimate the time that is left instead of telling the time gone by.
        is_still: Draw only when there is a report, now and then: what goes on in between is
            measured in this process, and a thread that draws would be measured with it.
    """
    if not is_terminal(sys.stderr):
        yield otherwise
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn() if shows_remaining else bars.TimeElapsedColumn(),
        bars.TextColumn("{task.description}", markup=False),
    )
    with bars.Progress(
        *columns, console=Console(stderr=True), transient=True, auto_refresh=not is_still
    ) as bar:
        task, stage, drawn_s = bar.add_task("", total=None), "", 0.0

        def report(progress: Progress) -> None:
            nonlocal stage, drawn_s
            if progress.stage != stage:
                stage = progress.stage
                bar.reset(task, total=progress.total)
            if progress.is_resumed:
                _print_resumed(bar.console, progress)
            bar.update(
                task,
                completed=progress.done,
                total=progress.total or None,
                description="  ".join(
                    filter(None, (progress.stage, progress.detail, time_left(progress)))
                ),
            )
            if is_still and time.monotonic() - drawn_s > REDRAW_S:
                drawn_s = time.monotonic()
                bar.refresh()

        yield report


def time_left(progress: Progress) -> str:
    """Return what to say of the time that is left; nothing if it is not known."""
    if progress.left_s is None or progress.done == progress.total:
        return ""
    minutes = round(progress.left_s / 60)
    return f"about {minutes} min left" if minutes else "less than a minute left"


def resumed(progress: Progress) -> str:
    """Return what to say of work that was found."""
    if progress.done == 0:
        return f"resuming: {progress.stage} goes on from its checkpoint"
    if progress.total == 1:
        return f"resuming: {progress.stage}, already done"
    return f"resuming: {progress.stage}, {progress.done} of {progress.total} are there"


def _print_resumed(console: Console, progress: Progress) -> None:
    console.print(resumed(progress), highlight=False, markup=False)


__all__ = ["progress_bar", "resumed", "time_left"]
