"""`foretoken generate`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from foretoken.cli import options, work
from foretoken.cli.output import FileSink, StdoutSink
from foretoken.cli.prompts import read_jobs
from foretoken.cli.summary import Run
from foretoken.cli.terminal import explain_compilation, loading, note
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.engine.llm import LLM

EXIT_INTERRUPTED = 130

EXAMPLES = """
[bold]Examples[/]

foretoken generate "Once upon a time"

foretoken generate "One day" --temperature 0.8 --seed 7 --compare

foretoken generate --model ./big --drafter draft-model:path=./small "Hello"

foretoken generate --input prompts.jsonl --format json --output out.jsonl
"""


def generate(
    prompts: options.Prompts = None,
    model: options.Model = "stories",
    drafter: options.Drafters = None,
    verifier: options.Verifier = None,
    max_nodes: options.MaxNodes = None,
    plan: options.PlanFile = None,
    max_new_tokens: options.MaxNewTokens = options.DEFAULTS.max_new_tokens,
    temperature: options.Temperature = options.DEFAULTS.temperature,
    top_k: options.TopK = options.DEFAULTS.top_k,
    top_p: options.TopP = options.DEFAULTS.top_p,
    min_p: options.MinP = options.DEFAULTS.min_p,
    repetition_penalty: options.RepetitionPenalty = options.DEFAULTS.repetition_penalty,
    presence_penalty: options.PresencePenalty = options.DEFAULTS.presence_penalty,
    frequency_penalty: options.FrequencyPenalty = options.DEFAULTS.frequency_penalty,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    seed: options.Seed = options.DEFAULTS.seed,
    input_file: options.InputFile = None,
    output: options.OutputFile = None,
    force: options.Force = False,
    format_name: options.Format = options.OutputFormat.TEXT,
    compare: options.Compare = False,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Continue prompts with a model; drafts make it faster, not different."""
    if not debug:
        warnings.simplefilter("ignore")
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": _parse_bias(logit_bias),
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    jobs = read_jobs(prompts or [], input_file, sampling)
    if compare:  # both ways of decoding must draw the same numbers
        jobs = work.with_seeds(jobs)
    sink = StdoutSink() if output is None else FileSink(output, force=force)
    chosen = {"drafters": tuple(drafter or ()), "verifier": verifier, "max_nodes": max_nodes}
    machine = {"dtype": dtype, "device": device, "threads": threads}
    run = Run()
    try:
        llm = _load(model, plan, chosen, machine, is_quiet=not debug)
        work.check_prompts(llm, jobs)
        if compare:
            work.warm_up(llm, jobs)
        work.run_jobs(llm, jobs, run, sink, format_name)
        if compare:
            work.compare_with_plain(llm, jobs, run)
    except KeyboardInterrupt:
        note(f"interrupted: {len(run.outputs)} of {len(jobs)} prompts finished")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        sink.close()


def _load(
    model: str,
    plan_file: Path | None,
    chosen: Mapping[str, Any],
    machine: Mapping[str, Any],
    *,
    is_quiet: bool,
) -> LLM:
    """Load the model; what is chosen on the command line wins over the plan."""
    with loading(model):
        from foretoken.engine.llm import LLM
        from foretoken.models.quiet import silence_libraries
        from foretoken.planner.plan import Plan

        explain_compilation()
        if is_quiet:
            silence_libraries()
        plan = Plan.load(plan_file) if plan_file is not None else Plan()
        given = {name: value for name, value in chosen.items() if value not in (None, ())}
        plan = dataclasses.replace(plan, **given)
        return LLM(
            model,
            drafters=plan.drafters,
            verifier=plan.verifier,
            max_nodes=plan.max_nodes,
            **machine,
        )


def _parse_bias(text: str | None) -> Any:
    """Return what the JSON text says; SamplingParams checks it."""
    try:
        return json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--logit-bias is not JSON: {error}", hint="""write it as '{"42": -1.5}'"""
        ) from error
