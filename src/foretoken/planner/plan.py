"""A plan: the choices that a user would otherwise have to make, in one file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from foretoken.core.draft import DraftBudget
from foretoken.errors import ConfigError, UnknownNameError

DEFAULT_MAX_NODES = 8
ADAPTIVE_MAX_NODES = 32
AUTO = ("auto",)  # drafters, when Foretoken chooses


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to speculate.

    Args:
        drafters: Specs such as `prompt-lookup` or `draft-model:path=DIR`; "auto" alone lets
            Foretoken choose, "none" is plain decoding.
        verifier: Name of the acceptance rule.
        max_nodes: Most draft tokens per request and step; 0 is plain decoding. None is 8, or 32
            with an adaptive plan, which seldom uses them all.
        adaptive: Whether drafters and sizes are chosen anew as costs and acceptance change, down
            to plain decoding; None says so for the drafters "auto" alone.
    """

    drafters: tuple[str, ...] = AUTO
    verifier: str = "coupled"
    max_nodes: int | None = None
    adaptive: bool | None = None

    def __post_init__(self) -> None:
        is_list = isinstance(self.drafters, (list, tuple))
        if not is_list or not self.drafters or not all(isinstance(it, str) for it in self.drafters):
            raise ConfigError(
                f"a plan's drafters are a list of texts, at least one; got {self.drafters!r}",
                hint='write ["auto"] or ["none"]',
            )
        object.__setattr__(self, "drafters", tuple(self.drafters))
        if not isinstance(self.verifier, str):
            raise ConfigError(
                f"a plan's verifier is a name; got {self.verifier!r}", hint='write "coupled"'
            )
        is_count = isinstance(self.max_nodes, int) and not isinstance(self.max_nodes, bool)
        if self.max_nodes is not None and (not is_count or self.max_nodes < 0):
            raise ConfigError(
                f"max_nodes is an integer >= 0; got {self.max_nodes!r}", hint="change max_nodes"
            )
        if self.adaptive is not None and not isinstance(self.adaptive, bool):
            raise ConfigError(
                f"adaptive is true, false or nothing; got {self.adaptive!r}",
                hint="change adaptive",
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether drafters and sizes are chosen anew as costs and acceptance change."""
        return self.drafters == AUTO if self.adaptive is None else self.adaptive

    @property
    def node_limit(self) -> int:
        """Most draft tokens per request and step."""
        if self.max_nodes is not None:
            return self.max_nodes
        return ADAPTIVE_MAX_NODES if self.is_adaptive else DEFAULT_MAX_NODES

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Plan:
        """Build from a mapping such as a JSON object.

        Raises:
            UnknownNameError: A key is not part of a plan.
            ConfigError: A value is not allowed.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise UnknownNameError("plan entry", key, names)
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            ConfigError: The file cannot be read or holds something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"plan file {str(path)!r} cannot be read: {error.strerror}", hint="check the path"
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"plan file {str(path)!r} is not JSON: {error}", hint="repair the file"
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"plan file {str(path)!r} holds a JSON {type(values).__name__}, not an object",
                hint='write {"drafters": ["auto"], "max_nodes": 8}',
            )
        try:
            return cls.from_mapping(values)
        except ConfigError as error:
            raise ConfigError(f"plan file {str(path)!r}: {error}", hint=error.hint) from error

    def budget(self, num_wanted: int, *, max_width: int | None = None) -> DraftBudget:
        """Return the bounds of one request's draft.

        Args:
            num_wanted: Tokens that the request can still take; the target adds one itself, so
                paths longer than the rest would be for nothing.
            max_width: Most children of a node that the verifier takes.
        """
        # No draft is deeper than it has nodes.
        depth = max(0, min(num_wanted - 1, self.node_limit))
        return _budget(self.node_limit, depth, max_width)


@lru_cache(maxsize=256)
def _budget(max_nodes: int, max_depth: int, max_width: int | None) -> DraftBudget:
    """Return bounds, the same object for the same ones: most steps of a request have them."""
    return DraftBudget(max_nodes=max_nodes, max_depth=max_depth, max_width=max_width)
