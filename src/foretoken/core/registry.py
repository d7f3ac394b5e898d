"""Name to class tables that import nothing until a name is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from foretoken.errors import ConfigError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """A greppable table of names, open to other packages through entry points.

    Args:
        kind: What is registered, for messages: "drafter", "verifier".
        table: Name to "module:attribute".
        group: Entry-point group in which other packages register theirs. A name of our own
            table wins over an entry point of the same name.
    """

    def __init__(self, kind: str, table: Mapping[str, str], *, group: str) -> None:
        self.kind = kind
        self._table: dict[str, str | T] = dict(table)
        self._group = group

    def __iter__(self) -> Iterator[str]:
        plugins = (entry.name for entry in entry_points(group=self._group))
        return iter(dict.fromkeys((*self._table, *plugins)))

    def add(self, name: str, item: T) -> None:
        """Register something for this process, for example from a notebook.

        Raises:
            ConfigError: The name is taken.
        """
        if name in self:
            raise ConfigError(f"{self.kind} {name!r} exists", hint="choose another name")
        self._table[name] = item

    def load(self, name: str) -> T:
        """Import and return what `name` stands for.

        Raises:
            UnknownNameError: The name is not registered.
            ConfigError: Another package registered it, but importing it failed.
        """
        if name in self._table:
            item = self._table[name]
            if not isinstance(item, str):
                return item
            module, _, attribute = item.partition(":")
            loaded: T = getattr(importlib.import_module(module), attribute)
            return loaded
        for entry in entry_points(group=self._group, name=name):
            try:
                plugin: T = entry.load()
            except Exception as error:  # another package's code may raise anything
                raise ConfigError(
                    f"{self.kind} {name!r} is registered as {entry.value!r}, which does not "
                    f"import: {error}",
                    hint="repair or uninstall the package that registers it",
                ) from error
            return plugin
        raise UnknownNameError(self.kind, name, self)
