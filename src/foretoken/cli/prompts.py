"""Prompts from arguments and files, each with its own sampling parameters."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foretoken.cli.errors import FileError, at
from foretoken.core.params import SamplingParams
from foretoken.errors import ConfigError, RequestError, UnknownNameError

STDIN = "-"
NUM_OPENINGS = 8
_PARAM_NAMES = tuple(item.name for item in dataclasses.fields(SamplingParams))
_LINE_KEYS = ("prompt", "prompt_ids", "reference", *_PARAM_NAMES)
_LINE_HINT = 'write a line such as {"prompt": "Once upon a time", "seed": 7}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt to continue.

    Args:
        prompt: Text or token ids.
        params: How.
        place: Where it comes from, for messages; empty if there is only this one.
        reference: Text that the output may copy from; empty for none.
    """

    prompt: str | list[int]
    params: SamplingParams
    place: str
    reference: str = ""


def read_jobs(
    prompts: Sequence[str],
    input_file: str | None,
    sampling: Mapping[str, Any],
    reference: str = "",
) -> list[Job]:
    """Return the prompts of the command line, then those of the input file.

    Args:
        prompts: Given as arguments.
        input_file: A .txt or .jsonl file, or "-" for standard input.
        sampling: Sampling parameters of every prompt; lines of a .jsonl file may override them.
        reference: Text that outputs may copy from; lines of a .jsonl file may have their own.

    Raises:
        ConfigError: There is no prompt, or a parameter or line is wrong.
        RequestError: A prompt is empty or no text.
        FileError: The input file cannot be read.
    """
    default = Job(
        prompt="", params=SamplingParams.from_mapping(sampling), place="", reference=reference
    )
    jobs = [
        replace(default, prompt=text, place=f"prompt {number}" if len(prompts) > 1 else "")
        for number, text in enumerate(prompts, start=1)
    ]
    if input_file is not None:
        jobs += _file_jobs(input_file, default, sampling)
    for job in jobs:
        _check_text(job)
    if jobs:
        return jobs
    if input_file is not None:
        raise ConfigError(
            f"input {_name(input_file)} has no prompts",
            hint="write one prompt a line; blank lines do not count",
        )
    raise ConfigError(
        "there is no prompt",
        hint='give one, such as foretoken generate "Once upon a time", or --input FILE',
    )


def _check_text(job: Job) -> None:
    """Refuse what a tokenizer cannot take."""
    if job.prompt == "":
        error = RequestError("the prompt is empty", hint="give at least one character of text")
        raise at(job.place, error)
    for name, text in (("prompt", job.prompt), ("reference", job.reference)):
        try:
            if isinstance(text, str):
                text.encode()
        except UnicodeEncodeError:
            error = RequestError(
                f"the {name} is not valid Unicode text", hint=f"write the {name} in UTF-8"
            )
            raise at(job.place, error) from None


def jobs_or_openings(
    prompts: Sequence[str],
    input_file: str | None,
    sampling: Mapping[str, Any],
    num_prompts: int | None,
) -> list[Job]:
    """Return the prompts of the command line and of the input file, or openings of stories.

    Args:
        prompts: As for `read_jobs`.
        input_file: As for `read_jobs`.
        sampling: As for `read_jobs`.
        num_prompts: The first so many; None for all, or for a few openings.

    Raises:
        ConfigError: As for `read_jobs`.
    """
    if prompts or input_file is not None:
        return read_jobs(prompts, input_file, sampling)[:num_prompts]
    from foretoken.bench.workloads import STORIES, load_workload

    openings = load_workload(STORIES).take(num_prompts or NUM_OPENINGS).prompts
    jobs = read_jobs([str(item.prompt) for item in openings], None, sampling)
    return [replace(job, place=item.place) for job, item in zip(jobs, openings, strict=True)]


def _file_jobs(input_file: str, default: Job, sampling: Mapping[str, Any]) -> Iterator[Job]:
    name = _name(input_file)
    lines = _read_text(input_file, name).split("\n")  # JSON may hold other line separators
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    is_json = _is_jsonl(input_file, numbered)
    for number, line in numbered:
        place = f"{name}, line {number}"
        if is_json:
            yield _json_job(line, replace(default, place=place), sampling)
        else:
            yield replace(default, prompt=line.removesuffix("\r"), place=place)


def _name(input_file: str) -> str:
    return "standard input" if input_file == STDIN else input_file


def _is_jsonl(input_file: str, lines: Sequence[tuple[int, str]]) -> bool:
    """Whether lines are JSON objects; on standard input the first line decides."""
    if input_file == STDIN:
        return bool(lines) and lines[0][1].lstrip().startswith("{")
    suffix = Path(input_file).suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"input file {input_file!r} ends in {suffix or 'nothing'}; .txt and .jsonl are known",
            hint="rename it: .txt has one prompt a line, .jsonl one JSON object a line",
        )
    return suffix == ".jsonl"


def _read_text(input_file: str, name: str) -> str:
    try:
        stdin = getattr(sys.stdin, "buffer", None)
        if input_file != STDIN:
            content = Path(input_file).read_bytes()
        else:
            content = stdin.read() if stdin is not None else b""
    except OSError as error:
        raise FileError(
            f"input {name} cannot be read: {error.strerror}", hint="check the path"
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise FileError(
            f"{name}, line {number}: not UTF-8 text", hint="save the file as UTF-8"
        ) from error


def _json_job(line: str, default: Job, sampling: Mapping[str, Any]) -> Job:
    place = default.place
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON: {error}", hint=_LINE_HINT) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{place}: a JSON {type(values).__name__}, not an object", hint=_LINE_HINT
        )
    try:
        prompt = _json_prompt(values)
        reference = values.pop("reference", default.reference)
        if not isinstance(reference, str):
            raise ConfigError(f"reference is a text; got {reference!r}", hint=_LINE_HINT)
        params = SamplingParams.from_mapping({**sampling, **values})
    except (ConfigError, RequestError) as error:
        raise at(place, error) from error
    return replace(default, prompt=prompt, params=params, reference=reference)


def _json_prompt(values: dict[str, Any]) -> str | list[int]:
    """Take the prompt out of a line's object; what stays is known."""
    for key in values:
        if key not in _LINE_KEYS:
            raise UnknownNameError("key", key, _LINE_KEYS)
    if ("prompt" in values) == ("prompt_ids" in values):
        raise ConfigError("either prompt or prompt_ids is needed, not both", hint=_LINE_HINT)
    if "prompt" in values:
        prompt = values.pop("prompt")
        if isinstance(prompt, str):
            return prompt
        raise ConfigError(f"prompt is a text; got {prompt!r}", hint=_LINE_HINT)
    prompt_ids = values.pop("prompt_ids")
    if isinstance(prompt_ids, list) and all(type(token_id) is int for token_id in prompt_ids):
        return prompt_ids
    raise ConfigError(
        f"prompt_ids is a list of integers; got {prompt_ids!r}", hint="write it as [1, 2, 3]"
    )


__all__ = ["STDIN", "Job", "jobs_or_openings", "read_jobs"]
