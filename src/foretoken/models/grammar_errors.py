"""What is wrong with a grammar, in one line, with its place in the user's own text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, pairwise
from typing import Any

from foretoken.errors import RequestError

Explain = Callable[[Any], str]
"""Maps a parsed JSON schema to the compiler's message about it, "" if it compiles."""

Pointer = tuple[str | int, ...]

_NO_TEXT = "NoExtension"  # how the compiler begins its message about a grammar without texts

MAX_MESSAGE = 300
MAX_TRIES = 500  # subschemas that are compiled alone to find the one at fault
MAX_SEARCH_S = 0.5  # in which they are; after that, the smallest one found has to do

_JSON_HINT = "correct the schema; {} allows any JSON value"
_REGEX_HINT = (
    "the syntax is that of Rust's regex crate: like Python's, without look-around and "
    "back-references, and ^ and $ only at the ends"
)
_LARK_HINT = "correct the grammar; docs/grammars.md shows the dialect"

# Keywords whose value holds schemas by name; the shared definitions come first, so that an error
# is found where it stands and not where it is referred to.
_NAMED = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalProperties",
    "not",
    "contains",
    "propertyNames",
    "if",
    "then",
    "else",
)

# How the compiler names an assertion inside a regular expression, and how users write it.
_ASSERTIONS = {
    "WordUnicode": r"\b",
    "WordUnicodeNegate": r"\B",
    "WordAscii": r"\b",
    "WordAsciiNegate": r"\B",
    "Start": "^",
    "StartLF": "^",
    "End": "$",
    "EndLF": "$",
}


# -- JSON schema -----------------------------------------------------------------------------


def parse_schema(text: str) -> Any:
    """Return the parsed schema.

    Raises:
        RequestError: The text is no JSON, or no object and no boolean.
    """
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"json_schema at line {error.lineno}, column {error.colno}: no valid JSON: {error.msg}",
            hint=_JSON_HINT,
        ) from None
    except RecursionError:
        raise _nested_too_deeply() from None
    if not isinstance(schema, (dict, bool)):
        raise RequestError(
            f"json_schema is a JSON object or true; got {_shortened(text)}", hint=_JSON_HINT
        )
    return schema


def schema_error(text: str, schema: Any, message: str, explain: Explain) -> RequestError:
    """Return the error for a schema that does not compile.

    The compiler does not say where; the smallest subschema with the same error is the place.
    """
    if message.startswith("recursion limit"):
        return _nested_too_deeply()
    pointer = _guilty_part(schema, message, explain)
    name = "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in pointer)
    line, column = _line_and_column(text, _offset_of(text, pointer))
    hint = _JSON_HINT
    what = re.sub(r" at line \d+ column \d+$", "", _one_line(message))
    unknown = re.fullmatch(r"Unimplemented keys: \[(.*)\]", what)
    if unknown:
        what = f"keywords that are not supported: {unknown[1]}"
        hint = 'leave them out, or add "x-guidance": {"lenient": true} to have them ignored'
    return RequestError(
        f"json_schema at {name or 'its top'} (line {line}, column {column}): {what}", hint=hint
    )


def _nested_too_deeply() -> RequestError:
    return RequestError(
        "json_schema is nested too deeply", hint="give inner schemas names in $defs, and refer"
    )


def _guilty_part(schema: Any, message: str, explain: Explain) -> Pointer:
    """Return the way to the smallest subschema that fails with the same message."""
    pointer: Pointer = ()
    part, tries, end_s = schema, count(), time.monotonic() + MAX_SEARCH_S
    shared = {key: schema[key] for key in _NAMED[:2] if isinstance(schema, dict) and key in schema}
    while isinstance(part, dict):
        for steps, child in _subschemas(part):
            # References of the part go to definitions at the top.
            alone = {**shared, **child} if isinstance(child, dict) else child
            is_tried = next(tries) < MAX_TRIES and time.monotonic() < end_s
            if is_tried and explain(alone) == message:
                pointer, part = (*pointer, *steps), child
                break
        else:
            break
        shared = {key: value for key, value in shared.items() if key not in pointer}
    return pointer


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[Pointer, Any]]:
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            yield from (((key, name), part) for name, part in schema[key].items())
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            yield from (((key, place), part) for place, part in enumerate(schema[key]))
    for key in _SINGLE:
        if isinstance(schema.get(key), (dict, bool)):
            yield (key,), schema[key]


def _offset_of(text: str, pointer: Pointer) -> int:
    """Return where in a JSON text the value stands that a pointer leads to."""
    offset = _skip_space(text, 0)
    for step in pointer:
        offset = _offset_of_member(text, offset, step)
    return offset


def _offset_of_member(text: str, offset: int, step: str | int) -> int:
    """Return where a member of the object or array at `offset` begins; the last of equal names."""
    decoder = json.JSONDecoder()
    is_object = text[offset] == "{"
    found, place = offset, 0
    offset = _skip_space(text, offset + 1)
    while text[offset] not in "}]":
        name: object = place
        if is_object:
            name, offset = decoder.raw_decode(text, offset)
            offset = _skip_space(text, _skip_space(text, offset) + 1)  # over the colon
        if name == step:
            found = offset
        _, offset = decoder.raw_decode(text, offset)
        offset = _skip_space(text, offset)
        if text[offset] == ",":
            offset = _skip_space(text, offset + 1)
        place += 1
    return found


def _skip_space(text: str, offset: int) -> int:
    while offset < len(text) and text[offset] in " \t\n\r":
        offset += 1
    return offset


# -- regular expression ----------------------------------------------------------------------


def check_regex(regex: str) -> None:
    """Refuse what the compiler would silently take for something else.

    Raises:
        RequestError: The last backslash has nothing to escape.
    """
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise _regex_error(regex, len(regex) - 1, "a backslash at the end escapes nothing")


def regex_error(regex: str, message: str) -> RequestError:
    """Return the error for a regular expression that does not compile."""
    lines = message.splitlines()
    for printed, marker in pairwise(lines):
        if printed.startswith("    ") and re.fullmatch(r" {4,}\^+", marker):
            offset = _offset_before_escaping(regex, marker.index("^") - 4)
            return _regex_error(regex, offset, _problem(message))
    assertion = re.search(r"look\w* not supported yet; (\w+)", message)
    if assertion:
        written = _ASSERTIONS.get(assertion[1], assertion[1])
        offset = max(_find_unescaped(regex, written), 0)
        return _regex_error(regex, offset, f"{written} is not supported here")
    return _regex_error(regex, 0, _one_line(message))


def _regex_error(regex: str, offset: int, what: str) -> RequestError:
    line, column = _line_and_column(regex, offset)
    return RequestError(
        f"regex at line {line}, column {column}: {what}; got {_shortened(regex)}",
        hint=_REGEX_HINT,
    )


def _units(regex: str) -> Iterator[tuple[int, str]]:
    """Yield each character, or backslash with what it escapes, with its offset."""
    for found in re.finditer(r"\\?.", regex, re.DOTALL):
        yield found.start(), found[0]


def _offset_before_escaping(regex: str, printed_offset: int) -> int:
    """Return the place in the regex of a place in the form that the compiler prints.

    On its way through a Lark grammar a newline becomes a backslash and n, a slash is escaped.
    """
    printed = 0
    for offset, unit in _units(regex):
        if printed >= printed_offset:
            return offset
        printed += 2 if unit in ("\n", "/") else len(unit)
    return len(regex) - 1


def _find_unescaped(regex: str, written: str) -> int:
    places = [offset for offset, unit in _units(regex) if unit == written]
    # Anchors are fine at their own end: the one at fault is another.
    if written == "^":
        places = [offset for offset in places if offset > 0]
    if written == "$":
        places = [offset for offset in places if offset < len(regex) - 1]
    return places[0] if places else -1


# -- Lark ------------------------------------------------------------------------------------


def lark_error(grammar: str, message: str) -> RequestError:
    """Return the error for a Lark grammar that does not compile."""
    what = _one_line(message)
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", what)
    if place:
        line = int(place[1])
        what = what[place.end() :]
        column = _column_of_byte(grammar, line, int(place[2]))
        return _lark_error(f"lark at line {line}, column {column}: {what}")
    embedded = re.match(r'failed to parse "(%\w+)"', what)
    if embedded:
        offset, problem = _broken_json_after(grammar, embedded[1])
        line, column = _line_and_column(grammar, offset)
        return _lark_error(
            f"lark at line {line}, column {column}: no valid JSON after {embedded[1]}: {problem}"
        )
    return _lark_error(f"lark: {what}")


def _lark_error(message: str) -> RequestError:
    return RequestError(message, hint=_LARK_HINT)


def _column_of_byte(text: str, line: int, column: int) -> int:
    """Return the column in characters; the compiler counts bytes."""
    lines = text.split("\n")
    before = lines[line - 1].encode()[: column - 1] if line <= len(lines) else b""
    return len(before.decode(errors="replace")) + 1


def _broken_json_after(grammar: str, directive: str) -> tuple[int, str]:
    """Return place and problem of the first JSON after a directive that does not parse."""
    for found in re.finditer(re.escape(directive), grammar):
        start = _skip_space(grammar, found.end())
        try:
            json.JSONDecoder().raw_decode(grammar, start)
        except json.JSONDecodeError as error:
            return min(error.pos, max(len(grammar) - 1, 0)), error.msg
    return max(grammar.find(directive), 0), "it does not parse"


# -- all -------------------------------------------------------------------------------------


def unsatisfiable(kind: str, message: str) -> RequestError:
    """Return the error for a grammar that compiles but cannot even begin."""
    what = "no text matches it" if message.startswith(_NO_TEXT) else _one_line(message)
    return RequestError(
        f"{kind} cannot be followed: {what}", hint="give every rule a way to end, or simplify it"
    )


def too_complex(message: str) -> RequestError:
    """Return the error for a grammar that could not be followed any further."""
    return RequestError(
        f"the grammar is too complex to follow any further: {_one_line(message)}",
        hint="use fewer alternatives that begin alike and smaller repetition counts",
    )


def unspeakable() -> RequestError:
    """Return the error for a text that the model's tokens cannot spell."""
    return RequestError(
        "the grammar asks for a text that the model has no tokens for",
        hint="allow only characters that the model's vocabulary can spell",
    )


def _one_line(message: str) -> str:
    """Return what a message of several lines says, without the echo of the grammar."""
    lines = message.splitlines() or ["it does not compile"]
    what = lines[0]
    if "regex parse error:" in message:
        where = what.split(" (in regex)")[0] if "invalid regex" in what else "invalid regex"
        what = f"{where}: {_problem(message)}"
    return what if len(what) <= MAX_MESSAGE else f"{what[:MAX_MESSAGE]}…"


def _problem(message: str) -> str:
    """Return what the parser of regular expressions says last."""
    lines = message.splitlines()
    problems = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return problems[0] if problems else lines[0]


def _line_and_column(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _shortened(text: Sequence[str]) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
