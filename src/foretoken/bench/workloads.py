"""What is continued: prompts from the package, from a text file or from JSON lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foretoken.assets import EMBEDDED
from foretoken.errors import ConfigError

STORIES = "stories"
_SPEC_BENCH_KEYS = {"question_id", "category", "turns"}
_OWN_KEYS = ("prompt", "prompt_ids", "max_new_tokens", "category")
_LINE_HINT = 'write lines such as {"prompt": "Once upon a time"}, or those of Spec-Bench with turns'


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadPrompt:
    """One prompt of a workload.

    Args:
        prompt: Text or token ids.
        place: Where it comes from, for messages.
        category: What kind it is; empty if the workload has none.
        max_new_tokens: A bound of its own below that of the run; None for none.
    """

    prompt: str | tuple[int, ...]
    place: str
    category: str = ""
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts under a name.

    Args:
        name: "stories", or the file's name without its folder.
        prompts: At least one.
    """

    name: str
    prompts: tuple[WorkloadPrompt, ...]

    @property
    def categories(self) -> list[str]:
        """Kinds of prompts in the order of their first one; empty if there are none."""
        return list(dict.fromkeys(item.category for item in self.prompts if item.category))

    def take(self, num_prompts: int) -> Workload:
        """Return the first prompts; with categories, in turn one of each, so that all appear."""
        groups: dict[str, list[WorkloadPrompt]] = {}
        for item in self.prompts:
            groups.setdefault(item.category, []).append(item)
        turns = itertools.zip_longest(*groups.values())
        in_turn = (item for turn in turns for item in turn if item is not None)
        return replace(self, prompts=tuple(itertools.islice(in_turn, num_prompts)))


def load_workload(name: str) -> Workload:
    """Return a workload by its name or from a file.

    Args:
        name: "stories" for the embedded openings; else a .txt file with a prompt a line, or a
            .jsonl file. Its lines are objects with `prompt` or `prompt_ids` and, if wanted,
            `max_new_tokens` and `category`; or questions of Spec-Bench (`question_id`,
            `category`, `turns`), whose first turn is the prompt.

    Raises:
        ConfigError: There is no such file, or one of its lines is wrong.
    """
    if name == STORIES:
        path = EMBEDDED["stories"].target.parent / "openings.txt"
        return _text_workload(STORIES, _read_lines(path))
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"workload {name!r} is neither {STORIES} nor a .txt or .jsonl file",
            hint=f"use --workload {STORIES}, or a file with a prompt a line",
        )
    lines = _read_lines(path)
    if suffix == ".txt":
        return _text_workload(path.name, lines)
    prompts = [_json_prompt(line, f"{path.name}, line {number}") for number, line in lines]
    return _checked(path.name, prompts)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"workload {str(path)!r} cannot be read: {error.strerror}", hint="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"workload {path.name} is not UTF-8 text", hint="save the file as UTF-8"
        ) from error
    lines = enumerate(text.split("\n"), start=1)  # JSON may hold other line separators
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


def _text_workload(name: str, lines: Sequence[tuple[int, str]]) -> Workload:
    prompts = [
        WorkloadPrompt(prompt=line, place=f"{name}, line {number}") for number, line in lines
    ]
    return _checked(name, prompts)


def _checked(name: str, prompts: Sequence[WorkloadPrompt]) -> Workload:
    if not prompts:
        raise ConfigError(
            f"workload {name} has no prompts",
            hint="write a prompt a line; blank lines do not count",
        )
    return Workload(name, tuple(prompts))


def _json_prompt(line: str, place: str) -> WorkloadPrompt:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON: {error}", hint=_LINE_HINT) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{place}: a JSON {type(values).__name__}, not an object", hint=_LINE_HINT
        )
    if values.keys() >= _SPEC_BENCH_KEYS:  # it and its relatives have more keys, of no use here
        return _spec_bench_prompt(values, place)
    for key in values:
        if key not in _OWN_KEYS:
            raise ConfigError(
                f"{place}: unknown key {key!r}; known: {', '.join(_OWN_KEYS)}",
                hint="sampling is the command line's, the same for every system",
            )
    limit = values.get("max_new_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigError(
            f"{place}: max_new_tokens is an integer >= 1; got {limit!r}",
            hint="change max_new_tokens",
        )
    return WorkloadPrompt(
        prompt=_own_prompt(values, place),
        place=place,
        category=str(values.get("category", "")),
        max_new_tokens=limit,
    )


def _spec_bench_prompt(values: dict[str, Any], place: str) -> WorkloadPrompt:
    turns = values["turns"]
    if not isinstance(turns, list) or not turns or not _is_prompt_text(turns[0]):
        raise ConfigError(
            f"{place}: turns is a list of texts, at least one; got {turns!r}", hint=_LINE_HINT
        )
    return WorkloadPrompt(prompt=turns[0], place=place, category=str(values["category"]))


def _own_prompt(values: dict[str, Any], place: str) -> str | tuple[int, ...]:
    text, token_ids = values.get("prompt"), values.get("prompt_ids")
    if (text is None) == (token_ids is None):
        raise ConfigError(
            f"{place}: either prompt or prompt_ids is needed, not both", hint=_LINE_HINT
        )
    if token_ids is None:
        if _is_prompt_text(text):
            return str(text)
        raise ConfigError(
            f"{place}: prompt is a text of at least one character; got {text!r}", hint=_LINE_HINT
        )
    if isinstance(token_ids, list) and token_ids and all(type(it) is int for it in token_ids):
        return tuple(token_ids)
    raise ConfigError(
        f"{place}: prompt_ids is a list of integers; got {token_ids!r}",
        hint="write it as [1, 2, 3]",
    )


def _is_prompt_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


__all__ = ["STORIES", "Workload", "WorkloadPrompt", "load_workload"]
