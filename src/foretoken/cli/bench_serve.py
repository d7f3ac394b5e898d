"""`foretoken bench serve`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import bench, bench_specinfer, bench_sweep, options
from foretoken.cli import serve as serve_command
from foretoken.cli.bench_output import written
from foretoken.cli.progress import progress_bar
from foretoken.cli.terminal import is_terminal, loading
from foretoken.errors import ConfigError, ForetokenError

if TYPE_CHECKING:
    from foretoken.bench.serve.settings import ServeSettings
    from foretoken.bench.serve.trace import Trace

LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.2)
AZURE_TRACE = "AzureLLMInferenceTrace_conv.csv"
LOAD_PANEL = "Load"
PACKAGES = (*serve_command.PACKAGES, "httpx")

EXAMPLES = """
[bold]Examples[/]

foretoken bench serve --trace AzureLLMInferenceTrace_conv.csv --output results

foretoken bench serve --trace conv.csv --text book.txt --load 0.5 --load 1 --rounds 5

foretoken bench serve --trace conv.csv --model ./big --drafter draft-model:path=./small
"""


def _load(name: str, metavar: str, help_text: str, parser: Any = options._number) -> Any:
    return options._option(name, metavar, help_text, LOAD_PANEL, parser=parser)


Trace_ = Annotated[
    Path | None,
    options._option(
        "--trace",
        "FILE",
        "CSV of arrivals: TIMESTAMP, ContextTokens, GeneratedTokens. Needed.",
        LOAD_PANEL,
    ),
]
Minutes = Annotated[float, _load("--minutes", "M", "Of the trace, its first ones (default 10).")]
TextFile = Annotated[
    Path | None,
    options._option(
        "--text",
        "FILE",
        "Text that prompts are cut from (default: stories by the included model, used again when "
        "they end).",
        LOAD_PANEL,
    ),
]
Loads = Annotated[
    list[float] | None,
    _load(
        "--load",
        "X",
        "Part of what plain decoding can do; repeatable (default 0.25, 0.5, 0.75, 0.9, 1, 1.2).",
    ),
]
Rounds = Annotated[
    int, _load("--rounds", "N", "Replays of each load (default 3).", options._integer)
]
Duration = Annotated[float, _load("--duration", "S", "Seconds of a replay (default 12).")]
MaxPromptTokens = Annotated[
    int | None,
    _load(
        "--max-prompt-tokens",
        "N",
        "Scale prompts so that 99 % are within N (default: by one ratio with outputs).",
        options._integer,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    _load("--max-new-tokens", "N", "Scale outputs likewise.", options._integer),
]
Temperature = Annotated[float, _load("--temperature", "T", "0 (default): greedy.")]
SloFirstToken = Annotated[
    float | None, _load("--slo-first-token", "MS", "Also count answers that begin within it.")
]
SloInterToken = Annotated[
    float | None,
    _load("--slo-inter-token", "MS", "Also count answers whose mean time per token is within it."),
]
OutputFolder = Annotated[
    Path | None,
    options._files(
        "--output", "DIR", "Write record.json, load by load, and pictures; go on with it."
    ),
]


@bench.app.command(epilog=EXAMPLES, no_args_is_help=False)
def serve(
    model: options.Model = "stories",
    drafter: options.Drafters = None,
    max_nodes: options.MaxNodes = None,
    adaptive: options.Adaptive = None,
    trace: Trace_ = None,
    minutes: Minutes = 10.0,
    text: TextFile = None,
    load: Loads = None,
    rounds: Rounds = 3,
    duration: Duration = 12.0,
    max_prompt_tokens: MaxPromptTokens = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    seed: bench.Seed = 0,
    slo_first_token: SloFirstToken = None,
    slo_inter_token: SloInterToken = None,
    max_requests: serve_command.MaxRequests = 16,
    max_queue: serve_command.MaxQueue = serve_command.DEFAULTS.max_queue,
    kv_cache_tokens: serve_command.KvCacheTokens = None,
    output: OutputFolder = None,
    force: bench_sweep.Force = False,
    format_name: bench.Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Replay recorded arrivals against a server with drafts and one without, load by load."""
    if not debug:
        warnings.simplefilter("ignore")
    counts = {
        "rounds": rounds,
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "max_requests": max_requests,
    }
    for name, value in {**counts, "threads": threads}.items():
        bench.check_counts(name, value)
    _check_packages()
    arrivals = _trace(trace, minutes)
    with written(output, _draw, force=True) as write:  # a record that is there is gone on with
        with loading(model):
            settings = _settings(
                model,
                drafter,
                threads,
                trace=arrivals,
                max_nodes=max_nodes,
                adaptive=adaptive,
                text=text,
                loads=tuple(dict.fromkeys(load or LOADS)),
                duration_s=duration,
                temperature=temperature,
                seed=seed,
                slo_first_token_ms=slo_first_token,
                slo_inter_token_ms=slo_inter_token,
                max_queue=max_queue,
                kv_cache_tokens=kv_cache_tokens,
                dtype=dtype,
                device=device,
                **counts,
            )
        record = _measure(settings, output, force=force)
        _show(record, format_name)
        write(record)
    _check_same_texts(record)


def _check_packages() -> None:
    """Check that server and client can run.

    Raises:
        ConfigError: They cannot.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"bench serve needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'foretoken[server,bench]'",
        )


def _trace(path: Path | None, minutes: float) -> Trace:
    """Return the first minutes of the trace that was named."""
    from foretoken.bench.serve.trace import load_trace

    if path is None:
        raise ConfigError(
            "bench serve replays recorded arrivals; got no --trace",
            hint=f"name one, such as {AZURE_TRACE} of github.com/Azure/AzurePublicDataset",
        )
    if not minutes > 0:
        raise ConfigError(f"--minutes is a number > 0; got {minutes}", hint="change --minutes")
    return load_trace(path, minutes)


def _settings(
    model: str, drafters: list[str] | None, threads: int | None, **others: Any
) -> ServeSettings:
    """Resolve names; what is wrong is found here."""
    import torch

    from foretoken.bench.serve.settings import ServeSettings
    from foretoken.engine.names import resolve_drafters, resolve_model
    from foretoken.training.folder import fingerprint

    names = tuple(dict.fromkeys(drafters or ("auto",)))
    specs = resolve_drafters(names, model)
    drafts = [str(spec.options["path"]) for spec in specs if "path" in spec.options]
    return ServeSettings(
        model=model,
        model_name=bench_specinfer._shown(model),
        weights=tuple(map(fingerprint, (resolve_model(model), *drafts))),
        drafters=names,
        threads=threads or torch.get_num_threads(),
        **others,
    )


def _measure(settings: ServeSettings, folder: Path | None, *, force: bool) -> dict[str, Any]:
    from foretoken.bench.serve.run import run_serve
    from foretoken.models.quiet import silence_libraries

    silence_libraries()
    with progress_bar(bench_sweep._Lines()) as report:
        return run_serve(settings, sys.argv, folder, report, begins_anew=force)


def _show(record: Mapping[str, Any], format_name: str) -> None:
    if format_name == options.OutputFormat.JSON:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    from rich.console import Console

    from foretoken.bench.serve.report import print_report

    print_report(record, Console(width=None if is_terminal(sys.stdout) else bench.PIPE_WIDTH))


def _draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    from foretoken.bench.serve.plots import write_plots

    return write_plots(record, folder)


def _check_same_texts(record: Mapping[str, Any]) -> None:
    """Raise if drafts changed what the server says although it promises that they do not.

    Raises:
        ForetokenError: They did.
    """
    from foretoken.bench.serve.summary import num_unexpected_texts

    num_different = num_unexpected_texts(record)
    if num_different:
        raise ForetokenError(
            f"{num_different} answers differ from those of plain decoding",
            hint="report it, with the record",
        )


bench_app = bench_sweep.bench_app  # with this command in it

__all__ = ["EXAMPLES", "bench_app"]
