"""`foretoken bench specinfer`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import bench, options
from foretoken.cli.bench_output import written
from foretoken.cli.progress import progress_bar
from foretoken.cli.terminal import is_terminal, loading
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.bench.specinfer.settings import SpecInferSettings

EXAMPLES = """
[bold]Examples[/]

foretoken bench specinfer

foretoken bench specinfer --num-prompts 16 --num-seeds 1 --max-width 3

foretoken bench specinfer --model ./big --draft ./small --verifier rrs --output results
"""

Draft = Annotated[
    str | None,
    options._model("--draft", "MODEL", "Directory or hub id of the draft (stories: included)."),
]
Verifiers = Annotated[
    list[str] | None,
    options._model(
        "--verifier",
        "NAME",
        "Also this rule; beside coupled, mss, naive and rejection; repeatable.",
    ),
]
MaxWidth = Annotated[
    int, bench._work("--max-width", "N", "Widths 1 to N of the trees (default 5).")
]
NumPrompts = Annotated[int, bench._work("--num-prompts", "N", "Prompts (default 64).")]
NumSeeds = Annotated[
    int, bench._work("--num-seeds", "N", "Outputs per prompt at temperature 1 (default 2).")
]
Seed = Annotated[
    int, bench._work("--seed", "N", "Of the first output; then N + 1, ... (default 0).")
]


@bench.app.command(epilog=EXAMPLES, no_args_is_help=False)
def specinfer(
    model: options.Model = "stories",
    draft: Draft = None,
    verifier: Verifiers = None,
    workload: bench.WorkloadName = "stories",
    num_prompts: NumPrompts = 64,
    max_new_tokens: bench.MaxNewTokens = 128,
    num_seeds: NumSeeds = 2,
    max_width: MaxWidth = 5,
    seed: Seed = 0,
    output: bench.OutputFolder = None,
    force: bench.Force = False,
    format_name: bench.Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Count success rates and tokens per step as the SpecInfer paper does, beside its numbers."""
    if not debug:
        warnings.simplefilter("ignore")
    counts = {
        "num_prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
        "num_seeds": num_seeds,
        "threads": threads,
    }
    for name, value in counts.items():
        bench.check_counts(name, value)
    if max_width < 2:
        raise ConfigError(
            f"max_width is at least 2, to compare widths; got {max_width}",
            hint="change --max-width",
        )
    with written(output, _draw, force=force) as write:
        with loading(model):
            settings = _settings(
                model,
                draft,
                workload=workload,
                num_prompts=num_prompts,
                max_new_tokens=max_new_tokens,
                num_seeds=num_seeds,
                seed=seed,
                max_width=max_width,
                verifiers=tuple(dict.fromkeys(verifier or ())),
                dtype=dtype,
                device=device,
                threads=threads,
            )
        record = _measure(settings)
        _show(record, format_name)
        write(record)


def _settings(
    model: str,
    draft: str | None,
    *,
    workload: str,
    num_prompts: int,
    threads: int | None,
    **others: Any,
) -> SpecInferSettings:
    import torch

    from foretoken.assets import EMBEDDED
    from foretoken.bench.specinfer.settings import SpecInferSettings
    from foretoken.bench.workloads import load_workload
    from foretoken.engine.names import resolve_model

    if draft is None and model not in EMBEDDED:
        raise ConfigError(
            f"model {model!r} has no draft model of its own", hint="name one with --draft"
        )
    path = resolve_model(model)
    return SpecInferSettings(
        model=path,
        model_name=_shown(model),
        draft=str(EMBEDDED[model].draft) if draft is None else draft,
        draft_name=f"{model}/draft" if draft is None else _shown(draft),
        workload=load_workload(workload).take(num_prompts),
        threads=threads or torch.get_num_threads(),
        **others,
    )


def _shown(model: str) -> str:
    """Return a model's name without the folders above it."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _measure(settings: SpecInferSettings) -> dict[str, Any]:
    from foretoken.bench.specinfer.record import make_record
    from foretoken.bench.specinfer.run import run_specinfer
    from foretoken.models.quiet import silence_libraries

    silence_libraries()
    with progress_bar() as report:
        result = run_specinfer(settings, report)
    return make_record(result, sys.argv)


def _show(record: Mapping[str, Any], format_name: str) -> None:
    if format_name == options.OutputFormat.JSON:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    from rich.console import Console

    from foretoken.bench.specinfer.report import print_report

    print_report(record, Console(width=None if is_terminal(sys.stdout) else bench.PIPE_WIDTH))


def _draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    from foretoken.bench.specinfer.plots import write_plots

    return write_plots(record, folder)


bench_app = bench.app  # with this command in it

__all__ = ["EXAMPLES", "bench_app"]
