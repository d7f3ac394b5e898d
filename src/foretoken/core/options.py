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
        """Read `name`, `name:key=value,key=value` or `name(key=value,key=value)`.

        A value may hold specs in turn, `merged:of=suffix+draft-model(path=DIR,max_depth=4)`: what
        is in brackets belongs to the inner one.

        Raises:
            ConfigError: An option has no `=`, no name stands before the options, or brackets do
                not match.
        """
        name, rest = _name_and_options(text.strip())
        options: dict[str, str] = {}
        for item in filter(None, _split(rest, ",")):
            key, separator, value = item.partition("=")
            if not separator or not key.strip():
                raise ConfigError(
                    f"options are written key=value,key=value; got {item!r} in {text!r}",
                    hint="for example draft-model:path=DIR,max_depth=6",
                )
            options[key.strip()] = value.strip()
        if not name:
            raise ConfigError(
                f"no name stands before the options in {text!r}", hint="write name:key=value"
            )
        return cls(name, options)

    @classmethod
    def parse_all(cls, text: str) -> tuple[ComponentSpec, ...]:
        """Read several specs joined by `+`; raises what `parse` does."""
        return tuple(cls.parse(part) for part in _split(text, "+"))

    def __str__(self) -> str:
        return f"{self.name}:{self._written_options()}" if self.options else self.name

    def nested(self) -> str:
        """Return it as it is written inside another spec."""
        return f"{self.name}({self._written_options()})" if self.options else self.name

    def _written_options(self) -> str:
        return ",".join(f"{key}={_written(value)}" for key, value in self.options.items())


def _name_and_options(text: str) -> tuple[str, str]:
    """Return what stands before the colon or the bracket, and what is behind or within it."""
    before_colon, before_bracket = text.partition(":")[0], text.partition("(")[0]
    if len(before_bracket) >= len(before_colon):
        return before_colon.strip(), text[len(before_colon) + 1 :]
    if not text.endswith(")"):
        raise _unmatched(text)
    return before_bracket.strip(), text[len(before_bracket) + 1 : -1]


def _split(text: str, separator: str) -> list[str]:
    """Return the parts of a text between separators that stand outside brackets."""
    parts, num_open = [""], 0
    for character in text:
        num_open += {"(": 1, ")": -1}.get(character, 0)
        if num_open < 0:
            raise _unmatched(text)
        if character == separator and num_open == 0:
            parts.append("")
        else:
            parts[-1] += character
    if num_open:
        raise _unmatched(text)
    return parts


def _unmatched(text: str) -> ConfigError:
    return ConfigError(
        f"brackets do not match in {text!r}",
        hint="write an inner component as name(key=value,key=value)",
    )


def _written(value: Any) -> str:
    """Return an option's value as text that is read as the same value."""
    if isinstance(value, ComponentSpec):
        return value.nested()
    if isinstance(value, (list, tuple)):
        joint = "+" if any(isinstance(part, (str, ComponentSpec)) for part in value) else "-"
        return joint.join(map(_written, value))
    return str(value)


def build_options(config_class: type[ConfigT], spec: ComponentSpec) -> ConfigT:
    """Build a component's options, converting text to each field's type.

    Args:
        config_class: A dataclass; its fields may be str, int, float, bool, tuples of int
            (written `1-1-3`) or of `ComponentSpec` (written `first+second(key=value)`), and their
            unions with None.
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
    if isinstance(kind, types.UnionType):
        kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
    if ComponentSpec in typing.get_args(kind):
        return _as_specs(value)
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
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


def _as_specs(value: Any) -> tuple[ComponentSpec, ...]:
    """Return the components that a text, one spec or a list of texts and specs means."""
    if isinstance(value, str):
        return ComponentSpec.parse_all(value)
    specs = [value] if isinstance(value, ComponentSpec) else value
    return tuple(ComponentSpec.parse(it) if isinstance(it, str) else it for it in specs)
