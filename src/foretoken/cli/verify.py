"""`foretoken verify`."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import control_options as controls
from foretoken.cli import options, work
from foretoken.cli.errors import EXIT_FAILURE
from foretoken.cli.generate import EXIT_INTERRUPTED, load_llm, plan_of
from foretoken.cli.output import FileSink, StdoutSink
from foretoken.cli.progress import progress_bar
from foretoken.cli.prompts import Job, jobs_or_openings
from foretoken.cli.terminal import is_terminal, note
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.certify.settings import CertifySettings
    from foretoken.engine.llm import LLM
    from foretoken.planner.plan import Plan

WORK_PANEL = "Work"
TEMPERATURES = (0.0, 0.8)  # 0.8, because at 1 a forgotten temperature would not show
PIPE_WIDTH = 120  # of tables where no terminal has a width

EXAMPLES = """
[bold]Examples[/]

foretoken verify

foretoken verify --model ./big --drafter draft-model:path=./small --input prompts.jsonl

foretoken verify --verifier rejection --temperature 0.7 --top-p 0.9

foretoken verify --samples 20000 --format json --output certificate.json
"""


def _work(name: str, metavar: str, help_text: str) -> Any:
    return options._option(name, metavar, help_text, WORK_PANEL, parser=options._integer)


Temperatures = Annotated[
    list[float] | None,
    options._sampling(
        "--temperature",
        "T",
        "Each is certified; 0: greedy (default 0 and 0.8).",
        parser=options._number,
    ),
]
Seed = Annotated[int, _work("--seed", "N", "All that is random follows from it (default 0).")]
NumPrompts = Annotated[
    int | None, _work("--num-prompts", "N", "First N prompts (default: 8 openings, or all given).")
]
MaxNewTokens = Annotated[
    int,
    options._length(
        "--max-new-tokens",
        "N",
        "Compared per text at most (default 48).",
        parser=options._integer,
    ),
]
NumSeeds = Annotated[
    int, _work("--num-seeds", "N", "Sampled texts per prompt to compare (default 2).")
]
BatchSizes = Annotated[
    list[int] | None,
    _work("--batch-size", "N", "Prompts at once; each is compared (default 1, 3 and 8)."),
]
Samples = Annotated[
    int, _work("--samples", "N", "Texts of 10 tokens drawn per temperature (default 1024).")
]
AllowLossy = Annotated[
    bool,
    options._option(
        "--allow-lossy", "", "Let a lossy rule pass; its deviation is measured.", WORK_PANEL
    ),
]
Format = Annotated[
    options.OutputFormat,
    options._files(
        "--format", "FORMAT", "text (default), or json: one object.", parser=options._format
    ),
]


def verify(
    prompts: options.Prompts = None,
    model: options.Model = "stories",
    drafter: options.Drafters = None,
    verifier: options.Verifier = None,
    max_nodes: options.MaxNodes = None,
    plan: options.PlanFile = None,
    max_new_tokens: MaxNewTokens = 48,
    min_new_tokens: controls.MinNewTokens = options.DEFAULTS.min_new_tokens,
    stop: options.Stop = None,
    stop_token_id: controls.StopTokenIds = None,
    ignore_eos: controls.IgnoreEos = options.DEFAULTS.ignore_eos,
    temperature: Temperatures = None,
    top_k: options.TopK = options.DEFAULTS.top_k,
    top_p: options.TopP = options.DEFAULTS.top_p,
    min_p: options.MinP = options.DEFAULTS.min_p,
    typical_p: controls.TypicalP = options.DEFAULTS.typical_p,
    top_h: controls.TopH = options.DEFAULTS.top_h,
    epsilon_cutoff: controls.EpsilonCutoff = options.DEFAULTS.epsilon_cutoff,
    eta_cutoff: controls.EtaCutoff = options.DEFAULTS.eta_cutoff,
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
    num_prompts: NumPrompts = None,
    num_seeds: NumSeeds = 2,
    batch_size: BatchSizes = None,
    samples: Samples = 1024,
    seed: Seed = 0,
    allow_lossy: AllowLossy = False,
    input_file: options.InputFile = None,
    output: options.OutputFile = None,
    force: options.Force = False,
    format_name: Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Check that drafts change nothing: your models, prompts and controls."""
    if not debug:
        warnings.simplefilter("ignore")
    temperatures = tuple(dict.fromkeys(temperature or TEMPERATURES))
    sampling = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "stop": tuple(stop or ()),
        "stop_token_ids": tuple(stop_token_id or ()),
        "ignore_eos": ignore_eos,
        "temperature": temperatures[0],
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "top_h": top_h,
        "epsilon_cutoff": epsilon_cutoff,
        "eta_cutoff": eta_cutoff,
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
    }
    counts = {
        "num_seeds": num_seeds,
        "num_samples": samples,
        "batch_sizes": tuple(dict.fromkeys(batch_size or (1, 3, 8))),
        "seed": seed,
    }
    _check_counts({**counts, "num_prompts": num_prompts})
    jobs = jobs_or_openings(prompts or [], input_file, sampling, num_prompts)
    sink = StdoutSink() if output is None else FileSink(output, force=force)
    chosen = {
        "drafters": tuple(drafter or ()),
        "verifier": verifier,
        "max_nodes": max_nodes,
        "adaptive": False,  # what is certified must not follow the clock
    }
    machine = {"dtype": dtype, "device": device, "threads": threads}
    llm = load_llm(model, plan, chosen, machine, is_quiet=not debug)
    work.check_prompts(llm, jobs)
    settings = _settings(llm, jobs, temperatures, counts)
    record = _certify(llm, replace(settings, allow_lossy=allow_lossy))
    record["subject"] = {
        **_subject(llm, model, plan_of(plan, chosen), machine),
        "max_new_tokens": max_new_tokens,
    }
    _write(record, sink, format_name)
    if output is not None:
        note(f"{record['verdict']}: written to {output}")
    if record["verdict"] != "pass":
        is_failure = record["verdict"] == "fail"
        raise typer.Exit(EXIT_FAILURE if is_failure else EXIT_INTERRUPTED)


def _check_counts(values: Mapping[str, Any]) -> None:
    names = {"num_samples": "samples", "batch_sizes": "batch-size"}
    for name, value in values.items():
        low = 0 if name == "seed" else 1
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < low:
                option = names.get(name, name.replace("_", "-"))
                raise ConfigError(
                    f"{option} is an integer >= {low}; got {number}", hint=f"change --{option}"
                )


def _settings(
    llm: LLM, jobs: Sequence[Job], temperatures: tuple[float, ...], counts: Mapping[str, Any]
) -> CertifySettings:
    from foretoken.certify.settings import CertifyPrompt, CertifySettings

    return CertifySettings(
        prompts=tuple(
            CertifyPrompt(
                prompt_ids=tuple(llm.encode(job.prompt)),
                params=job.params,
                # A line of the input may have a temperature of its own.
                temperatures=temperatures
                if job.params.temperature == temperatures[0]
                else (job.params.temperature,),
                place=job.place or "the prompt",
            )
            for job in jobs
        ),
        **counts,
    )


def _certify(llm: LLM, settings: CertifySettings) -> dict[str, Any]:
    """Return the record; what is finished of it if the user interrupts."""
    from foretoken.certify.certificate import Certification

    tokenizer = llm.tokenizer
    certification = Certification(
        llm.engine,
        settings,
        token_text=lambda token_id: tokenizer.decode([token_id]) if tokenizer else "",
    )
    try:
        with progress_bar() as report:
            certification.run(report)
    except KeyboardInterrupt:
        note("interrupted")
    return certification.record()


def _subject(llm: LLM, model: str, plan: Plan, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was certified, with what, and where; nothing names this machine's folders."""
    import torch

    from foretoken import __version__
    from foretoken.bench.machine import environment
    from foretoken.bench.record import portable, portable_command

    name = Path(model).expanduser()
    return {
        "foretoken": __version__,
        "command": portable_command(sys.argv),
        "model": name.resolve().name if name.is_dir() else model,
        "num_parameters": llm.info.num_parameters,
        "drafters": [portable(spec) for spec in plan.drafters],
        "verifier": plan.verifier,
        "max_nodes": plan.node_limit,
        "dtype": str(llm.info.dtype).removeprefix("torch."),
        "device": llm.info.device.type,
        "environment": environment(machine["threads"] or torch.get_num_threads()),
    }


def _write(record: Mapping[str, Any], sink: FileSink | StdoutSink, format_name: str) -> None:
    from rich.console import Console

    from foretoken.certify.report import print_report

    if format_name == options.OutputFormat.JSON:
        sink.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    elif isinstance(sink, StdoutSink):
        print_report(record, Console(width=None if is_terminal(sys.stdout) else PIPE_WIDTH))
    else:
        text = io.StringIO()
        print_report(record, Console(file=text, width=PIPE_WIDTH))
        sink.write(text.getvalue())
    sink.close()


__all__ = ["EXAMPLES", "verify"]
