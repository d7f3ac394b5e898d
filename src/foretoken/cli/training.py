"""What the commands that train have in common: options, prompts, progress, provenance."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from foretoken.cli import options
from foretoken.cli.errors import at
from foretoken.cli.generate import EXIT_INTERRUPTED
from foretoken.cli.progress import progress_bar, resumed
from foretoken.cli.prompts import read_jobs
from foretoken.cli.terminal import note
from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress
from foretoken.errors import ConfigError

DATA_PANEL = "What the target says"
TRAINING_PANEL = "Training"
LINE_INTERVAL_S = 20.0  # between progress lines where there is no terminal


def data_option(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    """Return an option about what the target says; more arguments are typer's."""
    return options._option(name, metavar, help_text, DATA_PANEL, **more)


def training_option(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    """Return an option about how is trained; more arguments are typer's."""
    return options._option(name, metavar, help_text, TRAINING_PANEL, **more)


PromptsFile = Annotated[
    str | None,
    data_option(
        "--prompts",
        "FILE",
        ".txt, .jsonl or - for standard input (default: openings of stories, included).",
    ),
]
NumPrompts = Annotated[
    int,
    data_option(
        "--num-prompts",
        "N",
        "To train on; the target writes what the file lacks (default 2048).",
        parser=options._integer,
    ),
]
MaxNewTokens = Annotated[
    int,
    data_option(
        "--max-new-tokens",
        "N",
        "Most tokens of each output (default 128).",
        parser=options._integer,
    ),
]
Temperature = Annotated[
    float,
    data_option(
        "--temperature",
        "T",
        "Of the outputs; 0 (default): greedy.",
        parser=options._number,
    ),
]
BatchSize = Annotated[
    int,
    training_option("--batch-size", "N", "Texts per step (default 16).", parser=options._integer),
]
Seed = Annotated[
    int,
    training_option("--seed", "N", "Of everything random (default 0).", parser=options._integer),
]
OutputFolder = Annotated[
    Path, options._files("--output", "DIR", "New folder, or one of this command to be resumed.")
]


@contextmanager
def resumable(*, is_quiet: bool) -> Iterator[None]:
    """Let Ctrl-C end a run with a line that says what becomes of it.

    Args:
        is_quiet: Whether warnings of libraries are of no interest.
    """
    if is_quiet:
        warnings.simplefilter("ignore")
    try:
        yield
    except KeyboardInterrupt:
        note("interrupted: what is finished is kept; the same command goes on from there")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def training_progress() -> AbstractContextManager[OnProgress]:
    """Show how far a run is: a bar on a terminal, lines elsewhere."""
    return progress_bar(_Lines(), shows_remaining=True)


def read_prompts(file: str | None) -> list[str | list[int]]:
    """Return the prompts of a file, or the openings that come with the package.

    Args:
        file: As `--prompts` takes it; None for the openings.

    Raises:
        ConfigError: The file cannot be read, or a prompt has sampling parameters of its own.
    """
    if file is None:
        from foretoken.assets import EMBEDDED

        openings = EMBEDDED["stories"].target.parent / "openings.txt"
        return list(openings.read_text(encoding="utf-8").splitlines())
    jobs = read_jobs([], file, {})
    for job in jobs:
        if job.params != SamplingParams():
            error = ConfigError(
                "a prompt with sampling parameters of its own",
                hint="leave them out; --temperature and --max-new-tokens hold for all prompts",
            )
            raise at(job.place, error)
    return [job.prompt for job in jobs]


def prepare(device: str, threads: int | None, *, is_quiet: bool) -> dict[str, Any]:
    """Set this process up and return what the report says of it.

    Args:
        device: Where the models will run.
        threads: Of torch; None leaves them.
        is_quiet: Whether libraries are to say nothing.

    Raises:
        ConfigError: There is no such device, or the threads are no count.
    """
    import torch

    from foretoken.bench.machine import environment
    from foretoken.bench.record import portable_command
    from foretoken.cli.terminal import explain_compilation
    from foretoken.models.loading import resolve_device
    from foretoken.models.quiet import silence_libraries

    if threads is not None and threads < 1:
        raise ConfigError(f"threads is an integer >= 1; got {threads}", hint="change --threads")
    resolve_device(device)
    explain_compilation()
    if is_quiet:
        silence_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    return {
        "command": portable_command(sys.argv),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(torch.get_num_threads()),
    }


class _Lines:
    """Prints a line for what was found, for every finished stage, and now and then."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if progress.is_resumed:
            note(resumed(progress))
            return
        now_s = time.monotonic()
        is_due = now_s - self._last_s >= LINE_INTERVAL_S
        if progress.done and (progress.done == progress.total or is_due):
            self._last_s = now_s
            detail = f", {progress.detail}" if progress.detail else ""
            note(f"{progress.stage}: {progress.done} of {progress.total}{detail}")


__all__ = [
    "DATA_PANEL",
    "TRAINING_PANEL",
    "BatchSize",
    "MaxNewTokens",
    "NumPrompts",
    "OutputFolder",
    "PromptsFile",
    "Seed",
    "Temperature",
    "data_option",
    "prepare",
    "read_prompts",
    "resumable",
    "training_option",
    "training_progress",
]
