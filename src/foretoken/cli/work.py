"""Generating prompts: streamed or written as they finish, counted, compared."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from foretoken.cli.errors import FileError, at, print_lines
from foretoken.cli.output import OrderedWriter, Sink, StdoutSink, make_render
from foretoken.cli.prompts import Job
from foretoken.cli.stream import show_stream
from foretoken.cli.summary import Run, describe, describe_comparison
from foretoken.cli.terminal import loading, note, prompt_progress
from foretoken.errors import ConfigError, ForetokenError

if TYPE_CHECKING:
    from foretoken.engine.llm import LLM, RequestOutput

NUM_WARM_UP_TOKENS = 8


def check_prompts(llm: LLM, jobs: Sequence[Job]) -> None:
    """Check that every prompt fits the model, before the first one starts.

    Raises:
        RequestError: One does not; the message says which.
    """
    for job in jobs:
        try:
            llm.check_prompt(job.prompt, job.params)
        except ForetokenError as error:
            raise at(job.place, error) from error


def check_format(jobs: Sequence[Job], format_name: str) -> None:
    """Check that the output can hold what the prompts ask for.

    Raises:
        ConfigError: A prompt asks for log-probabilities, and the format is text.
    """
    for job in jobs:
        has_logprobs = job.params.logprobs is not None or job.params.prompt_logprobs is not None
        if has_logprobs and format_name != "json":
            error = ConfigError(
                f"log-probabilities are written as JSON only; the format is {format_name}",
                hint="add --format json",
            )
            raise at(job.place, error)


def report_failures(run: Run, jobs: Sequence[Job]) -> int:
    """Say of each request that failed alone what went wrong; return how many there are."""
    failed = [output for output in run.outputs if output.error is not None]
    for output in sorted(failed, key=lambda output: output.index):
        if output.error is not None:
            error = at(jobs[output.index].place, output.error)
            print_lines(str(error), error.hint)
    return len(failed)


def run_jobs(llm: LLM, jobs: Sequence[Job], run: Run, sink: Sink, format_name: str) -> None:
    """Generate all prompts, writing each result as soon as it and those before it are finished.

    One prompt in text format to standard output is shown while it grows.

    Args:
        llm: The model.
        jobs: Checked prompts, at least one.
        run: Receives the results; holds the finished ones if this is interrupted.
        sink: Where records go.
        format_name: "text" or "json".
    """
    if len(jobs) == 1 and format_name == "text" and isinstance(sink, StdoutSink):
        [job] = jobs
        chunks = run.timed(llm.stream(job.prompt, job.params, reference=job.reference))
        run.outputs.append(show_stream(llm, job.prompt, chunks, sink))
    else:
        _write_as_finished(llm, jobs, run, sink, format_name)
    note(describe(run, jobs, sys.stderr))


def compare_with_plain(llm: LLM, jobs: Sequence[Job], run: Run) -> None:
    """Decode the same prompts without drafts and report both speed and tokens.

    Raises:
        ForetokenError: The tokens are not the same although they should be.
    """
    plain = Run()
    with loading(f"plain decoding of {len(jobs)} prompts" if len(jobs) > 1 else "plain decoding"):
        plain.outputs += plain.timed(_outputs(llm, jobs, drafters=()))
    note(describe_comparison(run, plain))


def warm_up(llm: LLM, jobs: Sequence[Job]) -> None:
    """Run both ways of decoding for a few tokens, so that neither pays for what is new."""
    params = replace(jobs[0].params, max_new_tokens=NUM_WARM_UP_TOKENS)
    llm.generate([jobs[0].prompt], params, references=jobs[0].reference)
    llm.generate([jobs[0].prompt], params, drafters=())


def with_seeds(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs, each with a seed of its own where none was given."""
    return [
        job
        if job.params.seed is not None
        else replace(job, params=replace(job.params, seed=secrets.randbits(64)))
        for job in jobs
    ]


def _write_as_finished(
    llm: LLM, jobs: Sequence[Job], run: Run, sink: Sink, format_name: str
) -> None:
    decode = llm.tokenizer.decode if llm.tokenizer else None
    to_stdout = isinstance(sink, StdoutSink)
    render = make_render(format_name, len(jobs), to_stdout=to_stdout, decode=decode)
    writer = OrderedWriter(render, sink)
    with prompt_progress(len(jobs)) as progress:
        try:
            for output in run.timed(_outputs(llm, jobs)):
                run.outputs.append(output)
                progress.advance()
                with progress.hidden():
                    writer.add(output)
        except (FileError, BrokenPipeError):  # nothing more can be written
            raise
        except BaseException:
            with progress.hidden():
                writer.finish()
            raise


def _outputs(
    llm: LLM, jobs: Sequence[Job], *, drafters: Sequence[str] | None = None
) -> Iterator[RequestOutput]:
    return llm.generate_iter(
        [job.prompt for job in jobs],
        [job.params for job in jobs],
        drafters=drafters,
        references=[job.reference for job in jobs],
    )


__all__ = [
    "check_format",
    "check_prompts",
    "compare_with_plain",
    "report_failures",
    "run_jobs",
    "warm_up",
    "with_seeds",
]
