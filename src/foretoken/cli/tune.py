"""`foretoken tune`."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import bench, options
from foretoken.cli.bench_output import written
from foretoken.cli.generate import EXIT_INTERRUPTED
from foretoken.cli.progress import progress_bar
from foretoken.cli.prompts import read_jobs
from foretoken.cli.terminal import explain_compilation, is_terminal, note
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.bench.tune.settings import TunePrompt, TuneSettings
    from foretoken.planner.plan import Plan

NUM_PROMPTS = 8
MAX_NEW_TOKENS = 128

EXAMPLES = """
[bold]Examples[/]

foretoken tune

foretoken tune --model ./big --drafter draft-model:path=./small --input prompts.jsonl --output tuned

foretoken generate --model ./big --plan tuned/plan.json "Once upon a time"
"""

Drafters = Annotated[
    list[str] | None,
    options._model(
        "--drafter", "SPEC", "Consider this one; repeatable (default: what suits the model)."
    ),
]
MaxNodes = Annotated[
    list[int] | None,
    options._model(
        "--max-nodes",
        "N",
        "Consider this size; repeatable (default 1, 2, 4, 8 and 16).",
        parser=options._integer,
    ),
]
WorkloadName = Annotated[
    str | None,
    options._option(
        "--workload",
        "NAME",
        "stories (default), or a .txt or .jsonl file of Spec-Bench.",
        bench.WORK_PANEL,
    ),
]
NumPrompts = Annotated[
    int | None,
    bench._work("--num-prompts", "N", "First N prompts (default: 8, or all of --input)."),
]
MaxNewTokens = Annotated[
    int, bench._work("--max-new-tokens", "N", "Most new tokens per prompt (default 128).")
]
BatchSize = Annotated[int, bench._work("--batch-size", "N", "Prompts at once (default 1).")]
Rounds = Annotated[
    int, bench._work("--rounds", "N", "How often the best ways are measured (default 5).")
]
OutputFolder = Annotated[
    Path | None,
    options._files("--output", "DIR", "Write plan, report, record.json and pictures here."),
]


def tune(
    model: options.Model = "stories",
    drafter: Drafters = None,
    max_nodes: MaxNodes = None,
    input_file: options.InputFile = None,
    workload: WorkloadName = None,
    num_prompts: NumPrompts = None,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    temperature: options.Temperature = options.DEFAULTS.temperature,
    top_k: options.TopK = options.DEFAULTS.top_k,
    top_p: options.TopP = options.DEFAULTS.top_p,
    min_p: options.MinP = options.DEFAULTS.min_p,
    batch_size: BatchSize = 1,
    rounds: Rounds = 5,
    seed: bench.Seed = 0,
    output: OutputFolder = None,
    force: bench.Force = False,
    format_name: bench.Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Find the fastest way to decode your prompts on this machine, and write it as a plan."""
    if not debug:
        warnings.simplefilter("ignore")
    counts = {
        "num_prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "rounds": rounds,
        "max_nodes": max_nodes,
        "threads": threads,
    }
    for name, values in counts.items():
        bench.check_counts(name, values)
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    work = _Work()
    with written(output, work.draw, force=force) as write:
        source, prompts = _prompts(input_file, workload, num_prompts, sampling)
        settings = _settings(
            model,
            drafter or [],
            max_nodes,
            source=source,
            prompts=prompts,
            batch_size=batch_size,
            rounds=rounds,
            seed=seed,
            dtype=dtype,
            device=device,
            threads=threads,
        )
        record = work.run(settings, is_quiet=not debug)
        _show(record, format_name)
        write(record)
    if not record["is_finished"]:
        raise typer.Exit(EXIT_INTERRUPTED)


class _Work:
    """One tuning, and what of it is written besides the record."""

    def __init__(self) -> None:
        self.plan: Plan | None = None

    def run(self, settings: TuneSettings, *, is_quiet: bool) -> dict[str, Any]:
        """Return the record; what is finished of it if the user interrupts after a while."""
        from foretoken.bench.tune.record import make_record, winning_plan
        from foretoken.bench.tune.run import Tuner
        from foretoken.models.quiet import silence_libraries

        explain_compilation()
        if is_quiet:
            silence_libraries()
        tuner = Tuner(settings)
        try:
            with progress_bar() as report:
                tuner.run(report)
        except KeyboardInterrupt:
            if tuner.result.plain is None:  # nothing is known that would be worth a file
                raise
            note("interrupted")
        record = make_record(tuner.result, sys.argv)
        self.plan = winning_plan(tuner.result, record["winner"])
        return record

    def draw(self, record: Mapping[str, Any], folder: Path) -> list[Path]:
        """Write the plan, the report and the pictures; return the files."""
        from foretoken.bench.tune.plots import write_plots
        from foretoken.bench.tune.report import markdown

        pictures = write_plots(record, folder)
        report = folder / "report.md"
        report.write_text(markdown(record, [path.name for path in pictures]), encoding="utf-8")
        if self.plan is None:
            return [report, *pictures]
        plan = folder / "plan.json"
        plan.write_text(
            json.dumps(dataclasses.asdict(self.plan), indent=2) + "\n", encoding="utf-8"
        )
        return [plan, report, *pictures]


def _prompts(
    input_file: str | None,
    workload: str | None,
    num_prompts: int | None,
    sampling: Mapping[str, Any],
) -> tuple[str, tuple[TunePrompt, ...]]:
    """Return where the prompts come from, and the prompts."""
    from foretoken.bench.tune.settings import TunePrompt
    from foretoken.bench.workloads import STORIES, load_workload
    from foretoken.core.params import SamplingParams

    if input_file is not None and workload is not None:
        raise ConfigError("--input and --workload both name prompts", hint="leave one of them out")
    if input_file is not None:
        jobs = read_jobs([], input_file, sampling)[:num_prompts]
        found = [TunePrompt(prompt=it.prompt, params=it.params, place=it.place) for it in jobs]
        return Path(input_file).name, tuple(found)
    loaded = load_workload(workload or STORIES).take(num_prompts or NUM_PROMPTS)
    found = []
    for item in loaded.prompts:
        wanted = sampling["max_new_tokens"]
        limit = min(wanted, item.max_new_tokens or wanted)
        params = SamplingParams.from_mapping({**sampling, "max_new_tokens": limit})
        found.append(TunePrompt(prompt=item.prompt, params=params, place=item.place))
    return loaded.name, tuple(found)


def _settings(
    model: str,
    drafters: Sequence[str],
    max_nodes: Sequence[int] | None,
    *,
    threads: int | None,
    **others: Any,
) -> TuneSettings:
    import torch

    from foretoken.bench.tune.settings import MAX_NODES, TuneSettings, auto_plan, candidates

    path = Path(model).expanduser()
    return TuneSettings(
        model=model,
        model_name=path.resolve().name if path.is_dir() else model,
        candidates=candidates(drafters, model),
        auto=auto_plan(drafters),
        max_nodes=tuple(sorted(set(max_nodes or MAX_NODES))),
        threads=threads or torch.get_num_threads(),
        **others,
    )


def _show(record: Mapping[str, Any], format_name: str) -> None:
    if format_name == options.OutputFormat.JSON:
        typer.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console

    from foretoken.bench.tune.report import print_report

    print_report(record, Console(width=None if is_terminal(sys.stdout) else bench.PIPE_WIDTH))


__all__ = ["EXAMPLES", "tune"]
