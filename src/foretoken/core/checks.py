"""Checks of option values: each refuses with what is wrong, what was given and what is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import index
from typing import Any

from foretoken.errors import ConfigError

TokenSequences = tuple[tuple[int, ...], ...]
SequenceBias = tuple[tuple[tuple[int, ...], float], ...]


def check_bool(name: str, value: object) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is true or false; got {value!r}", hint=f"change {name}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse what is not an integer from `low` to `high`, both included."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and low <= value and (high is None or value <= high):  # type: ignore[operator]
        return
    allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
    raise ConfigError(f"{name} is an integer {allowed}; got {value!r}", hint=f"change {name}")


def check_real(name: str, value: object, allowed: str, is_allowed: Callable[[float], bool]) -> None:
    """Refuse what is not a finite number that `is_allowed` takes; `allowed` says which."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond every float
            if math.isfinite(value) and is_allowed(value):
                return
    raise ConfigError(f"{name} is a number {allowed}; got {value!r}", hint=f"change {name}")


def check_text(name: str, value: object) -> None:
    """Refuse what is not a text of at least one character."""
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{name} is a text of at least one character; got {value!r}", hint=f"change {name}"
        )


def checked_stop(stop: object) -> tuple[str, ...]:
    """Return the stop texts as a tuple; one text stands for itself."""
    texts = (stop,) if isinstance(stop, str) else stop
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts):
        return tuple(texts)
    raise ConfigError(
        f"stop holds texts of at least one character; got {stop!r}",
        hint="leave empty stop texts out",
    )


def checked_bias(bias: Mapping[int, float]) -> Mapping[int, float]:
    """Return a copy of the bias with integer keys; JSON objects bring their keys as text."""
    try:
        checked = {
            int(token_id) if isinstance(token_id, str) else index(token_id): float(value)
            for token_id, value in bias.items()
        }
        if any(token_id < 0 for token_id in checked) or not all(
            math.isfinite(value) for value in checked.values()
        ):
            raise ValueError
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"logit_bias maps token ids >= 0 to finite numbers; got {bias!r}",
            hint='write it as {"42": -1.5}',
        ) from None
    return checked


def checked_ids(name: str, token_ids: object) -> tuple[int, ...]:
    """Return token ids as a tuple, each once, in the order given."""
    if isinstance(token_ids, (list, tuple, set, frozenset)) and all(map(_is_id, token_ids)):
        return tuple(dict.fromkeys(token_ids))
    raise ConfigError(
        f"{name} is a list of token ids, integers >= 0; got {token_ids!r}",
        hint="write it as [42, 43]",
    )


def checked_sequences(name: str, sequences: object) -> TokenSequences:
    """Return sequences of token ids as tuples, none of them empty."""
    if isinstance(sequences, (list, tuple)) and all(map(_is_sequence, sequences)):
        return tuple(dict.fromkeys(map(tuple, sequences)))
    raise ConfigError(
        f"{name} is a list of non-empty lists of token ids, integers >= 0; got {sequences!r}",
        hint="write it as [[42], [7, 8]]",
    )


def checked_sequence_bias(bias: object) -> SequenceBias:
    """Return pairs of a sequence and its bias, from pairs or from a mapping of tuples."""
    pairs = tuple(bias.items()) if isinstance(bias, Mapping) else bias
    if isinstance(pairs, (list, tuple)) and all(map(_is_biased, pairs)):
        return tuple({tuple(ids): float(value) for ids, value in pairs}.items())
    raise ConfigError(
        "sequence_bias is a list of pairs of a non-empty list of token ids and a finite number; "
        f"got {bias!r}",
        hint="write it as [[[7, 8], -1.5]]",
    )


def checked_schema(schema: object) -> str | None:
    """Return a JSON schema as text; a parsed one is written out again."""
    if schema is None:
        return None
    hint = """write it as '{"type": "object"}'"""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"json_schema is JSON; got text that is not, at line {error.lineno}, column "
            f"{error.colno}: {error.msg}",
            hint=hint,
        ) from None
    except (ValueError, TypeError, RecursionError):
        text, parsed = "", None
    if isinstance(parsed, (dict, bool)):
        return text
    raise ConfigError(
        f"json_schema is a JSON object or true, as text or parsed; got {schema!r}", hint=hint
    )


def checked_callables(name: str, functions: object) -> tuple[Callable[..., Any], ...]:
    """Return functions as a tuple; one function stands for itself."""
    listed = (functions,) if callable(functions) else functions
    if isinstance(listed, (list, tuple)) and all(map(callable, listed)):
        return tuple(listed)
    raise ConfigError(
        f"{name} is a list of functions of (input_ids, scores); got {functions!r}",
        hint="give functions, or objects of transformers' LogitsProcessor",
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sequence(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_id, value))


def _is_biased(pair: object) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not _is_sequence(pair[0]):
        return False
    is_number = isinstance(pair[1], (int, float)) and not isinstance(pair[1], bool)
    with suppress(OverflowError):
        return is_number and math.isfinite(pair[1])
    return False
