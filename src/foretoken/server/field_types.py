"""Kinds of fields that requests to the API have, and the objects that hold them.

Validation is strict: a text is not a number, and no field is unknown. Ranges that depend on the
model, and all that a field means to the sampler, are for `SamplingParams` to check.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_ENTRIES = 4096  # of an object or a list of sampling options
MAX_COUNT = 2**31 - 1
MAX_BIAS = 100.0


def _refuse_unserved(value: Any) -> None:
    """Accept only what says the same as leaving the field out."""
    if value is not None and value is not False and value not in ("", [], {}):
        raise PydanticCustomError("unserved", "not served here: leave it out")


def _with_whole_numbers(value: Any) -> Any:
    """Return a value whose 5.0 are 5: to JSON they are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and float in set(map(type, value)):
        return [_with_whole_numbers(part) for part in value]
    return value


def refuse_many(value: Any) -> Any:
    """Refuse an object of too many entries before they make as many errors."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_many", "has at most {limit} entries", {"limit": MAX_ENTRIES})
    return value


def _check_finite(schema: Any) -> Any:
    try:
        json.dumps(schema, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("finite_number", "holds a number beyond all floats") from None
    return schema


Unserved = Annotated[
    Any,
    BeforeValidator(_refuse_unserved),
    WithJsonSchema({"enum": [None, False, "", [], {}], "description": "Not served."}),
]
Ignored = Any
ONE_BY_ONE = Field(fail_fast=True)
AT_LEAST_ONE = Field(fail_fast=True, min_length=1)
FEW = Field(fail_fast=True, max_length=MAX_ENTRIES)
ONE_TO_FEW = Field(fail_fast=True, min_length=1, max_length=MAX_ENTRIES)
WHOLE = BeforeValidator(_with_whole_numbers)
_Id = Annotated[int, Field(ge=0, le=MAX_COUNT)]
AnyTokenIds = Annotated[list[_Id], ONE_BY_ONE, WHOLE]
TokenIds = Annotated[list[_Id], FEW, WHOLE]
TokenSequence = Annotated[list[_Id], AT_LEAST_ONE, WHOLE]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT), WHOLE]
Limit = Annotated[int, Field(ge=1, le=MAX_COUNT), WHOLE]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Cutoff = Annotated[float, Field(ge=0, lt=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NonEmpty = Annotated[str, Field(min_length=1)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_check_finite)]


class Schema(BaseModel):
    """An object without unknown fields; whoever gives one is told the nearest known."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = _known_fields(cls)
            for key in data:
                if key not in known:
                    raise _unknown_field(key, known)
        return data


@functools.cache
def _known_fields(schema: type[BaseModel]) -> dict[str, None]:
    """Return the names of a schema's fields, in order; asked for every object of a body."""
    return dict.fromkeys(field.alias or name for name, field in schema.model_fields.items())


def _unknown_field(name: str, known: Iterable[str]) -> PydanticCustomError:
    nearest = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"known are {', '.join(known)}"
    return PydanticCustomError(
        "unknown_field", "there is no such field; {hint}", {"name": name, "hint": hint}
    )
