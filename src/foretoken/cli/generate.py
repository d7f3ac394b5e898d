"""`foretoken generate`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from foretoken.cli import control_options as controls
from foretoken.cli import options, work
from foretoken.cli.errors import EXIT_FAILURE
from foretoken.cli.output import FileSink, StdoutSink
from foretoken.cli.prompts import read_jobs
from foretoken.cli.summary import Run
from foretoken.cli.terminal import explain_compilation, loading, note
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.engine.llm import LLM
    from foretoken.planner.plan import Plan

EXIT_INTERRUPTED = 130

EXAMPLES = """
[bold]Examples[/]

foretoken generate "Once upon a time"

foretoken generate "One day" --temperature 0.8 --seed 7 --compare

foretoken generate --model ./big --drafter draft-model:path=./small "Hello"

foretoken generate "A fact as JSON:" --json-schema '{"type": "object"}'

foretoken generate --input prompts.jsonl --format json --output out.jsonl

foretoken generate "Say it again:" --drafter reference --reference draft.txt
"""


def generate(
    prompts: options.Prompts = None,
    model: options.Model = "stories",
    drafter: options.Drafters = None,
    verifier: options.Verifier = None,
    max_nodes: options.MaxNodes = None,
    adaptive: options.Adaptive = None,
    plan: options.PlanFile = None,
    max_new_tokens: options.MaxNewTokens = options.DEFAULTS.max_new_tokens,
    min_new_tokens: controls.MinNewTokens = options.DEFAULTS.min_new_tokens,
    stop: options.Stop = None,
    stop_token_id: controls.StopTokenIds = None,
    ignore_eos: controls.IgnoreEos = options.DEFAULTS.ignore_eos,
    temperature: options.Temperature = options.DEFAULTS.temperature,
    top_k: options.TopK = options.DEFAULTS.top_k,
    top_p: options.TopP = options.DEFAULTS.top_p,
    min_p: options.MinP = options.DEFAULTS.min_p,
    typical_p: controls.TypicalP = options.DEFAULTS.typical_p,
    top_h: controls.TopH = options.DEFAULTS.top_h,
    epsilon_cutoff: controls.EpsilonCutoff = options.DEFAULTS.epsilon_cutoff,
    eta_cutoff: controls.EtaCutoff = options.DEFAULTS.eta_cutoff,
    seed: options.Seed = options.DEFAULTS.seed,
    repetition_penalty: options.RepetitionPenalty = options.DEFAULTS.repetition_penalty,
    presence_penalty: options.PresencePenalty = options.DEFAULTS.presence_penalty,
    frequency_penalty: options.FrequencyPenalty = options.DEFAULTS.frequency_penalty,
    no_repeat_ngram_size: controls.NoRepeatNgramSize = options.DEFAULTS.no_repeat_ngram_size,
    logit_bias: options.LogitBias = None,
    sequence_bias: controls.SequenceBias = None,
    bad_words_ids: controls.BadWordsIds = None,
    allowed_token_ids: controls.AllowedTokenIds = None,
    suppress_tokens: controls.SuppressTokens = None,
    json_schema: controls.JsonSchema = None,
    regex: controls.Regex = None,
    grammar: controls.Grammar = None,
    input_file: options.InputFile = None,
    reference: options.ReferenceFile = None,
    output: options.OutputFile = None,
    force: options.Force = False,
    format_name: options.Format = options.OutputFormat.TEXT,
    logprobs: controls.Logprobs = options.DEFAULTS.logprobs,
    prompt_logprobs: controls.PromptLogprobs = options.DEFAULTS.prompt_logprobs,
    logprobs_mode: controls.LogprobsMode = options.DEFAULTS.logprobs_mode,
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
        "min_new_tokens": min_new_tokens,
        "stop": tuple(stop or ()),
        "stop_token_ids": tuple(stop_token_id or ()),
        "ignore_eos": ignore_eos,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "top_h": top_h,
        "epsilon_cutoff": epsilon_cutoff,
        "eta_cutoff": eta_cutoff,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        **controls.parse_json_options(
            {
                "logit_bias": logit_bias,
                "sequence_bias": sequence_bias,
                "bad_words_ids": bad_words_ids,
                "allowed_token_ids": allowed_token_ids,
                "suppress_tokens": suppress_tokens,
            }
        ),
        "json_schema": controls.read_schema(json_schema),
        "regex": regex,
        "lark": controls.read_grammar(grammar),
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "logprobs_mode": logprobs_mode,
    }
    chosen = {
        "drafters": tuple(drafter or ()),
        "verifier": verifier,
        "max_nodes": max_nodes,
        "adaptive": adaptive,
    }
    copied = "" if reference is None else _read_reference(reference, plan_of(plan, chosen))
    jobs = read_jobs(prompts or [], input_file, sampling, copied)
    work.check_format(jobs, format_name)
    if compare:  # both ways of decoding must draw the same numbers
        jobs = work.with_seeds(jobs)
    sink = StdoutSink() if output is None else FileSink(output, force=force)
    machine = {"dtype": dtype, "device": device, "threads": threads}
    run = Run()
    try:
        with closing(load_llm(model, plan, chosen, machine, is_quiet=not debug)) as llm:
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
    if work.report_failures(run, jobs):
        raise typer.Exit(EXIT_FAILURE)


def load_llm(
    model: str,
    plan_file: Path | None,
    chosen: Mapping[str, Any],
    machine: Mapping[str, Any],
    *,
    is_quiet: bool,
) -> LLM:
    """Return the model and its drafters; what is chosen on the command line wins over the plan."""
    with loading(model):
        from foretoken.engine.llm import LLM
        from foretoken.models.quiet import silence_libraries

        explain_compilation()
        if is_quiet:
            silence_libraries()
        plan = plan_of(plan_file, chosen)
        return LLM(
            model,
            drafters=plan.drafters,
            verifier=plan.verifier,
            max_nodes=plan.max_nodes,
            adaptive=plan.adaptive,
            **machine,
        )


def plan_of(plan_file: Path | None, chosen: Mapping[str, Any]) -> Plan:
    """Return the plan; what is chosen on the command line wins over the file."""
    from foretoken.planner.plan import Plan

    given = {name: value for name, value in chosen.items() if value not in (None, ())}
    return dataclasses.replace(Plan.load(plan_file) if plan_file is not None else Plan(), **given)


def _read_reference(path: Path, plan: Plan) -> str:
    """Return the text of --reference, which there must be a drafter to copy from."""
    if plan.drafters == ("none",):
        raise ConfigError(
            "--reference is for drafters, and there are none", hint="leave out --drafter none"
        )
    return controls.read_text("reference", path)


def _parse_bias(text: str | None) -> Any:
    """Return what the JSON text of --logit-bias says; SamplingParams checks it."""
    return controls.parse_json_options({"logit_bias": text}).get("logit_bias", {})
