"""Component options: frozen dataclasses built from text such as `name:key=value,key=value`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from foretoken.errors import ConfigError, UnknownNameError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """Which component, with which options.

    Args:
        name: A registered name.
        options: Option name to value; text values are converted to the option's type.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> ComponentSpec:
        """Read `name` or `name:key=value,key=value`.

        Raises:
            ConfigError: An option has no `=`, or no name stands before the colon.
        """
        name, _, rest = text.partition(":")
        options: dict[str, str] = {}
        for item in filter(None, rest.split(",")):
            key, separator, value = item.partition("=")
            if not separator or not key.strip():
                raise ConfigError(
                    f"options are written key=value,key=value; got {item!r} in {text!r}",
                    hint="for example draft-model:path=DIR,max_depth=6",
                )
            options[key.strip()] = value.strip()
        if not name.strip():
            raise ConfigError(
                f"no name stands before the colon in {text!r}", hint="write name:key=value"
            )
        return cls(name.strip(), options)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def build_options(config_class: type[ConfigT], spec: ComponentSpec) -> ConfigT:
    """Build a component's options, converting text to each field's type.

    Args:
        config_class: A dataclass; its fields may be str, int, float, bool, tuples of int
            (written `1-1-3`) and their unions with None.
        spec: The component's name, for messages, and its options.

    Raises:
        UnknownNameError: There is no such option; the nearest one is suggested.
        ConfigError: A value cannot be read, is not allowed, or a required option is missing.
    """
    kinds = typing.get_type_hints(config_class)
    fields = {item.name: item for item in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for key in spec.options:
        if key not in fields:
            raise UnknownNameError(f"option of {spec.name}", key, fields)
    for name, item in fields.items():
        no_default = item.default is dataclasses.MISSING
        if no_default and item.default_factory is dataclasses.MISSING and name not in spec.options:
            raise ConfigError(
                f"{spec.name} needs the option {name!r}", hint=f"write {spec.name}:{name}=..."
            )
    values = {
        key: _convert(value, kinds[key], f"{spec.name}:{key}")
        for key, value in spec.options.items()
    }
    return config_class(**values)


def _convert(value: Any, kind: Any, name: str) -> Any:
    """Return the value that a text means for a field of the given type."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(kind, types.UnionType):
        kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in value.split("-"))
        return kind(value)
    except (ValueError, KeyError):
        word = {bool: "true or false", int: "an integer", float: "a number"}.get(
            kind, "integers joined by '-', such as 1-1-3"
        )
        raise ConfigError(f"{name} is {word}; got {value!r}", hint=f"change {name}") from None
