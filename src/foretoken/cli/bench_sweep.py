"""`foretoken bench sweep`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import bench, bench_specinfer, options
from foretoken.cli.bench_output import written
from foretoken.cli.progress import progress_bar, resumed, time_left
from foretoken.cli.terminal import is_terminal, loading, note
from foretoken.core.progress import Progress
from foretoken.errors import UnknownNameError

if TYPE_CHECKING:
    from foretoken.bench.sweep.settings import Kind, SweepSettings

BATCH_SIZES = (1, 2, 4, 8, 16)
TEMPERATURES = (0.0, 1.0)
TRAINING_FREE = ("prompt-lookup", "suffix")  # beside what auto means for the model

EXAMPLES = """
[bold]Examples[/]

foretoken bench sweep --output results

foretoken bench sweep --batch-size 1 --temperature 0 --workload edit

foretoken bench sweep --model ./big --drafter draft-model:path=./small --drafter suffix
"""

Drafters = Annotated[
    list[str] | None,
    options._model(
        "--drafter",
        "SPEC",
        "Repeatable (default: what auto means for the model, prompt-lookup, suffix).",
    ),
]
Workloads = Annotated[
    list[str] | None,
    options._option(
        "--workload", "KIND", "story, edit, random; repeatable (default all).", bench.WORK_PANEL
    ),
]
NumPrompts = Annotated[
    int, bench._work("--num-prompts", "N", "Least prompts per round (default 4).")
]
LeastSeconds = Annotated[
    float,
    options._option(
        "--least-seconds",
        "S",
        "More prompts per round, until plain decoding takes about so long (default 0.7).",
        bench.WORK_PANEL,
        parser=options._number,
    ),
]
MaxNewTokens = Annotated[
    int, bench._work("--max-new-tokens", "N", "New tokens per prompt, always all (default 64).")
]
BatchSizes = Annotated[
    list[int] | None,
    bench._work("--batch-size", "N", "Prompts at once; repeatable (default 1, 2, 4, 8, 16)."),
]
Temperatures = Annotated[
    list[float] | None,
    options._option(
        "--temperature",
        "T",
        "Repeatable (default 0 and 1).",
        bench.WORK_PANEL,
        parser=options._number,
    ),
]
Rounds = Annotated[int, bench._work("--rounds", "N", "Least rounds of a cell (default 5).")]
MaxRounds = Annotated[
    int, bench._work("--max-rounds", "N", "Most rounds, if intervals stay wide (default 10).")
]
Width = Annotated[
    float,
    options._option(
        "--width",
        "X",
        "Intervals wider than this part of a ratio ask for more rounds (default 0.1).",
        bench.WORK_PANEL,
        parser=options._number,
    ),
]
OutputFolder = Annotated[
    Path | None,
    options._files(
        "--output", "DIR", "Write record.json, cell by cell, and a picture; go on with it."
    ),
]
Force = Annotated[bool, options._files("--force", "", "Begin anew over the record in --output.")]


@bench.app.command(epilog=EXAMPLES, no_args_is_help=False)
def sweep(
    model: options.Model = "stories",
    drafter: Drafters = None,
    max_nodes: bench.MaxNodes = None,
    workload: Workloads = None,
    num_prompts: NumPrompts = 4,
    least_seconds: LeastSeconds = 0.7,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperatures = None,
    batch_size: BatchSizes = None,
    rounds: Rounds = 5,
    max_rounds: MaxRounds = 10,
    width: Width = 0.1,
    seed: bench.Seed = 0,
    output: OutputFolder = None,
    force: Force = False,
    format_name: bench.Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Measure every method and the automatic choice over batch sizes, texts and temperatures."""
    if not debug:
        warnings.simplefilter("ignore")
    counts = {
        "num_prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "max_rounds": max_rounds,
    }
    for name, values in {**counts, "batch_size": batch_size, "threads": threads}.items():
        bench.check_counts(name, values)
    with written(output, _draw, force=True) as write:  # a record that is there is gone on with
        with loading(model):
            settings = _settings(
                model,
                drafter,
                threads,
                max_nodes=bench._each(max_nodes, 8),
                workload=workload,
                temperatures=tuple(dict.fromkeys(temperature or TEMPERATURES)),
                batch_sizes=tuple(dict.fromkeys(batch_size or BATCH_SIZES)),
                least_seconds=least_seconds,
                width=width,
                seed=seed,
                dtype=dtype,
                device=device,
                **counts,
            )
        record = _measure(settings, output, force=force)
        _show(record, format_name)
        write(record)
    bench._check_same_tokens(record)


def _settings(
    model: str,
    drafters: list[str] | None,
    threads: int | None,
    *,
    workload: list[str] | None,
    **others: Any,
) -> SweepSettings:
    """Resolve names; what is wrong is found here."""
    import torch

    from foretoken.bench.sweep.settings import SweepSettings
    from foretoken.engine.names import resolve_model
    from foretoken.training.folder import fingerprint

    names = drafters or ("auto", *TRAINING_FREE)
    specs = bench._specs(names, model, is_inflated=False)
    drafts = [str(spec.options["path"]) for spec in specs if "path" in spec.options]
    path = resolve_model(model)
    return SweepSettings(
        model=path,
        model_name=bench_specinfer._shown(model),
        weights=tuple(map(fingerprint, (path, *drafts))),
        drafters=tuple(dict.fromkeys(map(str, specs))),
        workloads=_kinds(workload),
        threads=threads or torch.get_num_threads(),
        **others,
    )


def _kinds(names: list[str] | None) -> tuple[Kind, ...]:
    from foretoken.bench.sweep.settings import Kind

    for name in names or ():
        if name not in tuple(Kind):
            raise UnknownNameError("workload of a sweep", name, tuple(Kind))
    return tuple(Kind(name) for name in dict.fromkeys(names or Kind))


def _measure(settings: SweepSettings, folder: Path | None, *, force: bool) -> dict[str, Any]:
    from foretoken.bench.sweep.run import run_sweep
    from foretoken.models.quiet import silence_libraries

    silence_libraries()
    with progress_bar(_Lines(), is_still=True) as report:
        return run_sweep(settings, sys.argv, folder, report, begins_anew=force)


class _Lines:
    """Prints a line for what was found and for every finished cell."""

    def __init__(self) -> None:
        self._num_said = 0

    def __call__(self, progress: Progress) -> None:
        if progress.is_resumed:
            note(resumed(progress))
        elif progress.done > self._num_said and progress.stage:
            left = time_left(progress)
            note(f"{progress.done} of {progress.total} {progress.stage}{', ' * bool(left)}{left}")
        self._num_said = max(self._num_said, progress.done)


def _show(record: Mapping[str, Any], format_name: str) -> None:
    if format_name == options.OutputFormat.JSON:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    from rich.console import Console

    from foretoken.bench.sweep.report import print_report

    print_report(record, Console(width=None if is_terminal(sys.stdout) else bench.PIPE_WIDTH))


def _draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    from foretoken.bench.sweep.plots import write_plots

    return write_plots(record, folder)


bench_app = bench_specinfer.bench_app  # with this command in it

__all__ = ["EXAMPLES", "bench_app"]
