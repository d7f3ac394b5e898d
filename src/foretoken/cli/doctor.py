"""`foretoken doctor`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import options, work
from foretoken.cli.errors import EXIT_FAILURE
from foretoken.cli.generate import load_llm, plan_of
from foretoken.cli.prompts import Job, jobs_or_openings
from foretoken.cli.terminal import ERROR, HINT, OWN, loading, paint

if TYPE_CHECKING:
    from foretoken.bench.doctor import Finding

MAX_NEW_TOKENS = 48

EXAMPLES = """
[bold]Examples[/]

foretoken doctor

foretoken doctor --model ./big --drafter draft-model:path=./small --input prompts.jsonl
"""

MaxNewTokens = Annotated[
    int,
    options._length(
        "--max-new-tokens",
        "N",
        f"Generated per prompt and drafter at most (default {MAX_NEW_TOKENS}).",
        parser=options._integer,
    ),
]
Format = Annotated[
    options.OutputFormat,
    options._files(
        "--format", "FORMAT", "text (default), or json: one object.", parser=options._format
    ),
]


def doctor(
    prompts: options.Prompts = None,
    model: options.Model = "stories",
    drafter: options.Drafters = None,
    verifier: options.Verifier = None,
    max_nodes: options.MaxNodes = None,
    plan: options.PlanFile = None,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    temperature: options.Temperature = options.DEFAULTS.temperature,
    top_k: options.TopK = options.DEFAULTS.top_k,
    top_p: options.TopP = options.DEFAULTS.top_p,
    min_p: options.MinP = options.DEFAULTS.min_p,
    seed: options.Seed = options.DEFAULTS.seed,
    input_file: options.InputFile = None,
    format_name: Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Find what is wrong with a model, its drafters and this machine, and what to do."""
    if not debug:
        warnings.simplefilter("ignore")
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    jobs = jobs_or_openings(prompts or [], input_file, sampling, None)
    chosen = {"drafters": tuple(drafter or ()), "verifier": verifier, "max_nodes": max_nodes}
    machine = {"dtype": dtype, "device": device, "threads": threads}
    findings = []
    for finding in _findings(model, plan, chosen, machine, jobs, is_quiet=not debug):
        findings.append(finding)
        if format_name is options.OutputFormat.TEXT:
            typer.echo(_line(finding))
    if format_name is options.OutputFormat.JSON:
        record = {"findings": [dataclasses.asdict(finding) for finding in findings]}
        typer.echo(json.dumps(record, ensure_ascii=False))
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(EXIT_FAILURE)


def _findings(
    model: str,
    plan_file: Path | None,
    chosen: Mapping[str, Any],
    machine: Mapping[str, Any],
    jobs: Sequence[Job],
    *,
    is_quiet: bool,
) -> Iterator[Finding]:
    """Yield findings as they are made; a model that cannot be loaded is the last."""
    plan = plan_of(plan_file, chosen)
    try:
        llm = load_llm(model, plan_file, chosen, machine, is_quiet=is_quiet)
    except Exception as error:  # noqa: BLE001 - those that are no finding are raised again
        from foretoken.bench.doctor import load_failure

        yield load_failure(error)
        return
    from foretoken.bench.doctor import check_drafter, examine, probe_drafter
    from foretoken.bench.limits import read_limits
    from foretoken.engine.names import resolve_drafters
    from foretoken.planner.adaptive import AdaptivePlanner
    from foretoken.planner.plan import AUTO

    work.check_prompts(llm, jobs)
    specs = resolve_drafters(plan.drafters, model)
    if not isinstance(llm.engine.parts.planner, AdaptivePlanner):
        specs = specs[: 1 if plan.drafters == AUTO else None]
    yield from examine(llm, specs, read_limits(), os.environ)
    # Those that were added by themselves come after those that were named.
    labels = list(llm.engine.drafters)[: len(specs)]
    prompts, params = [job.prompt for job in jobs], [job.params for job in jobs]
    for label in labels:
        with loading(f"the drafts of {label}"):
            counts = probe_drafter(llm, label, prompts, params)
        is_trained = llm.engine.drafters[label].taxonomy.is_trained
        yield check_drafter(label, counts, is_trained=is_trained)


def _line(finding: Finding) -> str:
    style = {"bad": ERROR, "warn": HINT}.get(finding.level, OWN)
    return paint(f"{finding.level}:", style, sys.stdout) + str(finding).removeprefix(
        f"{finding.level}:"
    )


__all__ = ["EXAMPLES", "doctor"]
