"""Bodies of requests: strict JSON, and what is wrong with them in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable
from itertools import islice
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

MAX_SHOWN = 80  # characters of a refused value or of a field's name
MAX_PARTS = 2**16  # texts, lists and objects in a body
SPARE_NUMBERS = 2**16  # beyond what prompts and lists of all token ids take

# A text, so that what stands in it does not count. One that never ends reaches to the end.
_TEXT = rb'"(?:[^"\\]++|\\.)*+"?'
_PARTS = re.compile(_TEXT + rb"|[\[{]", re.DOTALL)
_ENTRIES = re.compile(_TEXT + rb"|,", re.DOTALL)

# Branches of unions, which pydantic puts between the names of fields.
_BRANCHES = {"str", "bool", "int", "float", "constrained-str", "constrained-int"}
# pydantic speaks of dictionaries, and of attributes that JSON has not.
_OBJECT = dict.fromkeys(("dict_type", "model_attributes_type", "model_type"), "should be an object")
_NO_OBJECT = "the body is no JSON object (send one, with Content-Type: application/json)"


class StrictRequest(Request):
    """A request whose JSON is that of the standard, and no more of it than is of any use.

    No NaN, no half of a surrogate pair, no nesting beyond 200 levels, UTF-8 and nothing else.
    Parsing and validation hold up all that goes on, in whatever thread they run, and what they
    take depends on the number of values rather than of bytes.

    Attributes:
        max_entries: Most entries of all lists and objects together.
    """

    max_entries = SPARE_NUMBERS

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            HTTPException: With status 400; it is no valid JSON, or has too many values.
        """
        body = await self.body()
        if _has_more(body, _PARTS, b"[{", MAX_PARTS):
            raise HTTPException(400, f"the body has more than {MAX_PARTS} texts, lists and objects")
        if _has_more(body, _ENTRIES, b",", self.max_entries):
            raise HTTPException(
                400,
                f"the body's lists have more than {self.max_entries} entries, which is more than "
                "the model's context and vocabulary have a use for",
            )
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is no valid JSON: {error}") from None


def _has_more(body: bytes, pattern: re.Pattern[bytes], marks: bytes, limit: int) -> bool:
    """Return whether a JSON text has more texts and marks than so many."""
    most = body.count(b'"') // 2 + sum(body.count(mark) for mark in marks)
    # Some of the marks may stand in texts, which only a closer look tells.
    return most > limit and sum(1 for _ in islice(pattern.finditer(body), limit + 1)) > limit


def strict_route(num_token_ids: int) -> type[APIRoute]:
    """Return a kind of route whose requests are `StrictRequest`.

    Args:
        num_token_ids: Most token ids that a request may have a use for.
    """

    class Bounded(StrictRequest):
        max_entries = num_token_ids + SPARE_NUMBERS

    class StrictRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_strictly(request: Request) -> Response:
                return await handle(Bounded(request.scope, request.receive))

            return handle_strictly

    return StrictRoute


def explain(error: RequestValidationError) -> tuple[str | None, str]:
    """Return the first wrong field, with its path in dots, and what is wrong with it."""
    found = list(error.errors())
    path, kind = _path(found[0]), found[0]["type"]
    if not path and kind != "unknown_field":
        return None, _NO_OBJECT
    # Where a value has several forms, there are errors of each; the one that it is nearest to
    # is the one of which most was read.
    same = [item for item in found if _path(item)[:1] == path[:1]]
    most = max(map(_num_read, same))
    nearest = [item for item in same if _num_read(item) == most]
    param = ".".join(_path(nearest[0]))
    messages = [_OBJECT.get(item["type"], item["msg"].removeprefix("Input ")) for item in nearest]
    message = " or ".join(dict.fromkeys(messages))
    if nearest[0]["type"] == "unknown_field":
        param = ".".join([param, _shown_name(nearest[0]["ctx"]["name"])]).lstrip(".")
    elif nearest[0]["type"] != "missing":
        message = f"{message}; got {shortened(nearest[0]['input'])}"
    return param, f"{param}: {message}"


def _num_read(item: dict[str, Any]) -> tuple[int, int]:
    """Return how deep in a value an error is, and how far in the list there."""
    return len(item["loc"]), max((part for part in item["loc"] if isinstance(part, int)), default=0)


def shortened(value: object) -> str:
    """Return a value as a message shows it, cut if it is long."""
    if isinstance(value, dict):
        return "an object" if value else "{}"
    shown = repr(value[:MAX_SHOWN] if isinstance(value, str | list) else value)
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."


def _path(item: dict[str, Any]) -> list[str]:
    """Return the names of fields and places that lead to an error, without union branches."""
    parts = [str(part) for part in item["loc"] if part != "body"]
    if parts[:1] == ["response_format"]:
        del parts[1:2]  # the type that tells the forms apart
    return [_shown_name(part) for part in _without_branches(parts)]


def _without_branches(parts: Iterable[str]) -> Iterable[str]:
    return (part for part in parts if "[" not in part and part not in _BRANCHES)


def _shown_name(name: str) -> str:
    return name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "..."


__all__ = ["StrictRequest", "explain", "shortened", "strict_route"]
