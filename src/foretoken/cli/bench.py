"""`foretoken bench`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import options
from foretoken.cli.bench_output import written
from foretoken.cli.progress import progress_bar
from foretoken.cli.terminal import is_terminal, loading, note
from foretoken.errors import ConfigError, ForetokenError

if TYPE_CHECKING:
    from foretoken.bench.settings import BenchSettings
    from foretoken.core.options import ComponentSpec

WORK_PANEL = "Work"
PEERS_PANEL = "Other systems"
PIPE_WIDTH = 120  # of tables where no terminal has a width

EXAMPLES = """
[bold]Examples[/]

foretoken bench

foretoken bench --temperature 0 --temperature 1 --max-nodes 4 --max-nodes 8

foretoken bench --model ./big --drafter draft-model:path=./small --drafter prompt-lookup

foretoken bench --model ./big --drafter draft-model:path=./small --against transformers

foretoken bench --inflate hidden=1536,layers=20,head_dim=64 --dtype bfloat16 --output results

foretoken bench --workload spec_bench.jsonl --num-prompts 60 --format json

foretoken bench specinfer
"""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Drafters = Annotated[
    list[str] | None,
    options._model("--drafter", "SPEC", "As of generate; each is measured by itself."),
]
MaxNodes = Annotated[
    list[int] | None,
    options._model(
        "--max-nodes",
        "N",
        "Most draft tokens per step (default 8); each is measured.",
        parser=options._integer,
    ),
]
Inflate = Annotated[
    str | None,
    options._model(
        "--inflate", "SHAPE", "Widen a small Llama first: hidden=1536,layers=20,head_dim=64."
    ),
]


def _work(name: str, metavar: str, help_text: str) -> Any:
    return options._option(name, metavar, help_text, WORK_PANEL, parser=options._integer)


WorkloadName = Annotated[
    str,
    options._option(
        "--workload",
        "NAME",
        "stories (default), or a .txt or .jsonl file of prompts or of Spec-Bench.",
        WORK_PANEL,
    ),
]
NumPrompts = Annotated[int, _work("--num-prompts", "N", "Prompts (default 8).")]
MaxNewTokens = Annotated[
    int, _work("--max-new-tokens", "N", "New tokens per prompt, always all (default 128).")
]
Rounds = Annotated[
    int, _work("--rounds", "N", "How often every system does all the work (default 5).")
]
BatchSizes = Annotated[
    list[int] | None, _work("--batch-size", "N", "Prompts at once (default 1); each is measured.")
]
Temperatures = Annotated[
    list[float] | None,
    options._option(
        "--temperature",
        "T",
        "0 (default): greedy; 1: as the model; each is measured.",
        WORK_PANEL,
        parser=options._number,
    ),
]
Seed = Annotated[int, _work("--seed", "N", "Of the first prompt; then N + 1, ... (default 0).")]
Against = Annotated[
    list[str] | None,
    options._option(
        "--against",
        "PEER",
        "Also run transformers, llama.cpp or openvino; may be repeated.",
        PEERS_PANEL,
    ),
]
NumDraftTokens = Annotated[
    int,
    options._option(
        "--num-draft-tokens",
        "N",
        "Draft tokens per step of the other systems (default 8).",
        PEERS_PANEL,
        parser=options._integer,
    ),
]
OutputFolder = Annotated[
    Path | None, options._files("--output", "DIR", "Write record.json and pictures here.")
]
Force = Annotated[bool, options._files("--force", "", "Let --output overwrite a record.")]
Format = Annotated[
    options.OutputFormat,
    options._files(
        "--format", "FORMAT", "text (default), or json: the record.", parser=options._format
    ),
]
InProcess = Annotated[
    bool,
    options._machine("--in-process", "", "Run every system here, for debuggers and profilers."),
]


@app.callback(invoke_without_command=True, no_args_is_help=False, epilog=EXAMPLES)
def bench(
    context: typer.Context,
    model: options.Model = "stories",
    drafter: Drafters = None,
    max_nodes: MaxNodes = None,
    inflate: Inflate = None,
    workload: WorkloadName = "stories",
    num_prompts: NumPrompts = 8,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperatures = None,
    batch_size: BatchSizes = None,
    rounds: Rounds = 5,
    seed: Seed = 0,
    against: Against = None,
    num_draft_tokens: NumDraftTokens = 8,
    output: OutputFolder = None,
    force: Force = False,
    format_name: Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    in_process: InProcess = False,
    debug: options.Debug = False,
) -> None:
    """Measure what drafts gain here, beside plain decoding and other systems."""
    if context.invoked_subcommand is not None:
        _hand_over(context)
        return
    if not debug:
        warnings.simplefilter("ignore")
    counts = {
        "num_prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "num_draft_tokens": num_draft_tokens,
    }
    for name, values in {**counts, "batch_size": batch_size, "threads": threads}.items():
        check_counts(name, values)
    with written(output, _draw, force=force) as write:
        with loading(model):
            settings = _settings(
                model=model,
                inflate=inflate,
                drafters=tuple(dict.fromkeys(drafter or ("auto",))),
                max_nodes=_each(max_nodes, 8),
                workload=workload,
                temperatures=_each(temperature, 0.0),
                batch_sizes=_each(batch_size, 1),
                peers=tuple(dict.fromkeys(against or ())),
                machine={"dtype": dtype, "device": device, "threads": threads},
                seed=seed,
                in_process=in_process,
                **counts,
            )
        record = _measure(settings)
        _show(record, format_name)
        write(record)
    _check_same_tokens(record)


def _hand_over(context: typer.Context) -> None:
    """Leave the work to a subcommand, which has options of its own.

    Raises:
        ConfigError: An option was given before the subcommand's name, where it means nothing.
    """
    name = f"foretoken bench {context.invoked_subcommand}"
    context.obj.help_command = f"{name} --help"
    given = [
        option.opts[0]
        for option in context.command.params
        if getattr(context.get_parameter_source(option.name or ""), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)} before {context.invoked_subcommand} means nothing",
            hint=f"options follow the name: {name} {given[0]} ...",
        )


def _draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    from foretoken.bench.plots import write_plots

    return write_plots(record, folder)


def _each(values: Sequence[Any] | None, default: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values or (default,)))


def check_counts(name: str, values: int | Sequence[int] | None) -> None:
    """Check that an option's numbers count something.

    Raises:
        ConfigError: One of them is less than 1.
    """
    numbers = [values] if isinstance(values, int) else values or ()
    for number in numbers:
        if number < 1:
            raise ConfigError(
                f"{name} is an integer >= 1; got {number}",
                hint=f"change --{name.replace('_', '-')}",
            )


def _settings(
    *,
    model: str,
    inflate: str | None,
    drafters: tuple[str, ...],
    workload: str,
    num_prompts: int,
    machine: Mapping[str, Any],
    **others: Any,
) -> BenchSettings:
    """Resolve names, and widen the model if asked to; what is wrong is found here."""
    import torch

    from foretoken.bench.inflate import Shape, cache_folder
    from foretoken.bench.inflate import inflate as inflate_model
    from foretoken.bench.inflate_heads import inflate_drafter, is_head
    from foretoken.bench.settings import BenchSettings
    from foretoken.bench.workloads import load_workload
    from foretoken.engine.names import resolve_model

    prompts = load_workload(workload).take(num_prompts)
    specs = _specs(drafters, model, is_inflated=inflate is not None)
    path, dtype, shown = resolve_model(model), machine["dtype"], model
    if inflate is not None:
        dtype = "float32" if dtype == "auto" else dtype
        shape, folder = Shape.parse(inflate), cache_folder() / "inflated"
        wide = inflate_model(Path(path), shape, dtype=dtype, folder=folder)
        specs = [inflate_drafter(spec, Path(path), wide, folder) for spec in specs]
        path = str(wide)
        shown = f"{Path(model).name} widened to {inflate}"
    elif Path(model).expanduser().is_dir():
        shown = Path(model).expanduser().resolve().name
    drafts = [Path(spec.options["path"]).expanduser() for spec in specs if "path" in spec.options]
    peers_draft = next((it for it in drafts if it.is_dir() and not is_head(it)), None)
    return BenchSettings(
        model=path,
        model_name=shown,
        drafters=tuple(map(str, specs)),
        workload=prompts,
        dtype=dtype,
        device=machine["device"],
        threads=machine["threads"] or torch.get_num_threads(),
        draft=peers_draft,
        work_dir=cache_folder() / "peers",
        **others,
    )


def _specs(drafters: Sequence[str], model: str, *, is_inflated: bool) -> list[ComponentSpec]:
    """Return what each name means for the model, before it is widened."""
    from foretoken.core.options import ComponentSpec
    from foretoken.engine.names import resolve_drafters

    specs = []
    for name in drafters:
        found = resolve_drafters((name,), model)
        # Settings are fixed here; the first drafter is what auto is without a planner.
        for spec in found[:1] if name == "auto" else found:
            # Options of an embedded pair suit its own costs, not those of a widened target.
            if name == "auto" and is_inflated and "path" in spec.options:
                spec = ComponentSpec(spec.name, {"path": spec.options["path"]})  # noqa: PLW2901
            specs.append(spec)
    return specs


def _measure(settings: BenchSettings) -> dict[str, Any]:
    from foretoken.bench.record import make_record
    from foretoken.bench.runner import run_bench

    if settings.peers and settings.draft is None:
        note("no drafter has a draft model in a directory: other systems only decode plainly")
    with progress_bar() as report:
        result = run_bench(settings, report)
    return make_record(result, sys.argv)


def _show(record: Mapping[str, Any], format_name: str) -> None:
    if format_name == options.OutputFormat.JSON:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    from rich.console import Console

    from foretoken.bench.report import print_report

    print_report(record, Console(width=None if is_terminal(sys.stdout) else PIPE_WIDTH))


def _check_same_tokens(record: Mapping[str, Any]) -> None:
    """Raise if speculation changed what Foretoken says.

    Raises:
        ForetokenError: It did; the message shows the first prompt.
    """
    from foretoken.bench.record import different_tokens

    differences = different_tokens(record)
    if not differences:
        return
    first = differences[0]
    raise ForetokenError(
        f"{first['system']} gave other tokens than plain decoding in {len(differences)} cases; "
        f"first at output token {first['token'] + 1} of {first['place']}: {first['text']!r} "
        f"(temperature {first['temperature']:g}, batch {first['batch_size']})",
        hint="exactness numerical allows this at near ties only: try --dtype float64, or report it",
    )
