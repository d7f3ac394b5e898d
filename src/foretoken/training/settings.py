"""Checks of a run's settings, whose names are those of the options on the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable

from foretoken.errors import ConfigError


def check_counts(settings: object, names: Iterable[str]) -> None:
    """Check that settings are integers of at least 1, or None.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is an integer >= 1; got {value}", hint=_change(name))


def check_positive(settings: object, names: Iterable[str]) -> None:
    """Check that settings are finite numbers above 0.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is a number above 0; got {value}", hint=_change(name))


def check_seed(seed: int) -> None:
    """Check a seed.

    Raises:
        ConfigError: It is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is an integer >= 0; got {seed}", hint=_change("seed"))


def check_folder_name(path: object) -> None:
    """Check that a folder's name can stand in the spec of a drafter.

    Raises:
        ConfigError: It holds a comma.
    """
    if "," in str(path):
        raise ConfigError(
            f"output folder {str(path)!r} has a comma, which separates options of drafters",
            hint="name another folder",
        )


def _change(name: str) -> str:
    return f"change --{name.replace('_', '-')}"


__all__ = ["check_counts", "check_folder_name", "check_positive", "check_seed"]
