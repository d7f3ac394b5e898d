"""A bar on standard error for work that takes minutes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from foretoken.cli.terminal import is_terminal
from foretoken.core.progress import OnProgress, Progress, silent

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_bar(
    otherwise: OnProgress = silent, *, shows_remaining: bool = False
) -> Iterator[OnProgress]:
    """Show on a terminal how far the work is, stage by stage.

    Args:
        otherwise: Is told instead where standard error is no terminal.
        shows_remaining: Estimate the time that is left instead of telling the time gone by.
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
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, stage = bar.add_task("", total=None), ""

        def report(progress: Progress) -> None:
            nonlocal stage
            if progress.stage != stage:
                stage = progress.stage
                bar.reset(task, total=progress.total)
            if progress.is_resumed:
                _print_resumed(bar.console, progress)
            bar.update(
                task,
                completed=progress.done,
                total=progress.total or None,
                description="  ".join(filter(None, (progress.stage, progress.detail))),
            )

        yield report


def resumed(progress: Progress) -> str:
    """Return what to say of work that was found."""
    if progress.done == 0:
        return f"resuming: {progress.stage} goes on from its checkpoint"
    if progress.total == 1:
        return f"resuming: {progress.stage}, already done"
    return f"resuming: {progress.stage}, {progress.done} of {progress.total} are there"


def _print_resumed(console: Console, progress: Progress) -> None:
    console.print(resumed(progress), highlight=False, markup=False)


__all__ = ["progress_bar", "resumed"]
