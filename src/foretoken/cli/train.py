"""`foretoken train`: draft models made for a target."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import options
from foretoken.cli.errors import at
from foretoken.cli.generate import EXIT_INTERRUPTED
from foretoken.cli.progress import progress_bar, resumed
from foretoken.cli.prompts import read_jobs
from foretoken.cli.terminal import loading, note
from foretoken.cli.train_report import show_report
from foretoken.core.params import SamplingParams
from foretoken.core.progress import Progress
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.training.boost_run import BoostSettings

DATA_PANEL = "What the target says"
TRAINING_PANEL = "Training"
LINE_INTERVAL_S = 20.0  # between progress lines where there is no terminal

EXAMPLES = """
[bold]Examples[/]

foretoken train boost --output pool

foretoken train boost --pool-size 2 --num-prompts 128 --steps 50 --output quick

foretoken train boost --model ./big --start ./small --prompts prompts.txt --output pool

foretoken generate --model ./big --drafter draft-model:path=pool/draft-1 --drafter
draft-model:path=pool/draft-2 "Hello"
"""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _train(context: typer.Context) -> None:
    """Train draft models for a target."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _data(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return options._option(name, metavar, help_text, DATA_PANEL, **more)


def _training(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return options._option(name, metavar, help_text, TRAINING_PANEL, **more)


Start = Annotated[
    Path | None,
    options._model(
        "--start", "DIR", "Small model that every draft model starts from (stories: its draft)."
    ),
]
PromptsFile = Annotated[
    str | None,
    _data(
        "--prompts",
        "FILE",
        ".txt, .jsonl or - for standard input (default: openings of stories, included).",
    ),
]
NumPrompts = Annotated[
    int,
    _data(
        "--num-prompts",
        "N",
        "To train on; the target writes what the file lacks (default 2048).",
        parser=options._integer,
    ),
]
MaxNewTokens = Annotated[
    int,
    _data(
        "--max-new-tokens",
        "N",
        "Most tokens of each output (default 128).",
        parser=options._integer,
    ),
]
Temperature = Annotated[
    float,
    _data(
        "--temperature",
        "T",
        "Of the outputs; 0 (default): greedy.",
        parser=options._number,
    ),
]
PoolSize = Annotated[
    int, _training("--pool-size", "N", "Draft models (default 3).", parser=options._integer)
]
Window = Annotated[
    int,
    _training(
        "--window",
        "N",
        "Tokens that a model must get right for them to be dropped (default 4).",
        parser=options._integer,
    ),
]
Epochs = Annotated[
    float,
    _training(
        "--epochs",
        "X",
        "Rounds of the first model over all texts; the others get as many steps (default 2).",
        parser=options._number,
    ),
]
Steps = Annotated[
    int | None,
    _training(
        "--steps", "N", "Steps of each model, in place of --epochs.", parser=options._integer
    ),
]
BatchSize = Annotated[
    int, _training("--batch-size", "N", "Texts per step (default 16).", parser=options._integer)
]
LearningRate = Annotated[
    float,
    _training("--learning-rate", "X", "The highest (default 0.0005).", parser=options._number),
]
NoControl = Annotated[
    bool, _training("--no-control", "", "Do not also train a pool without dropping.")
]
Seed = Annotated[
    int, _training("--seed", "N", "Of everything random (default 0).", parser=options._integer)
]
OutputFolder = Annotated[
    Path, options._files("--output", "DIR", "New folder, or one of this command to be resumed.")
]


@app.command(epilog=EXAMPLES, no_args_is_help=False)
def boost(
    output: OutputFolder,
    model: options.Model = "stories",
    start: Start = None,
    prompts: PromptsFile = None,
    num_prompts: NumPrompts = 2048,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    pool_size: PoolSize = 3,
    window: Window = 4,
    epochs: Epochs = 2.0,
    steps: Steps = None,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 5e-4,
    no_control: NoControl = False,
    seed: Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Train a pool of draft models, each on what those before it cannot say (boost-tuning).

    The folder gets draft-1, draft-2, ..., and report.json. Run the same command again to go on
    with what was interrupted.
    """
    if not debug:
        warnings.simplefilter("ignore")
    texts = _read_prompts(prompts)
    try:
        with loading(model):
            from foretoken.training.boost_run import BoostSettings

            settings = BoostSettings(
                model=model,
                start=str(start) if start is not None else None,
                pool_size=pool_size,
                num_prompts=num_prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                window=window,
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                has_control=not no_control,
                seed=seed,
            )
            provenance = _prepare(device, threads, is_quiet=not debug)
        report = _run(settings, texts, output, device, provenance)
    except KeyboardInterrupt:
        note("interrupted: what is finished is kept; the same command goes on from there")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show_report(report)
    note(f"written: {output / 'report.json'}")


def _read_prompts(file: str | None) -> list[str | list[int]]:
    """Return the prompts of a file, or the openings that come with the package."""
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


def _prepare(device: str, threads: int | None, *, is_quiet: bool) -> dict[str, Any]:
    """Set this process up and return what the report says of it."""
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


def _run(
    settings: BoostSettings,
    prompts: list[str | list[int]],
    output: Path,
    device: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    from foretoken.training.boost_run import run_boost

    with progress_bar(_Lines(), shows_remaining=True) as on_progress:
        return run_boost(
            settings,
            prompts,
            output,
            device=device,
            on_progress=on_progress,
            provenance=provenance,
        )


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


__all__ = ["app", "boost"]
