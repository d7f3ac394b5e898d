"""Errors that Foretoken raises on purpose.

    ForetokenError
    ├── ConfigError            an option is unknown, out of range or contradictory
    │   └── UnknownNameError   a name that no registry knows; suggests the nearest
    ├── ModelError             a model cannot be loaded or served
    │   ├── UnsupportedModelError   its architecture cannot be verified in one pass
    │   └── VocabularyMismatchError draft and target do not share token ids
    ├── RequestError           one request is wrong; the others go on
    ├── CapacityError          no room now; try again later (retryable)
    └── DrafterError           a drafter broke its contract

Every message says what is wrong, what was given and what is allowed; `hint` says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "CapacityError",
    "ConfigError",
    "DrafterError",
    "ForetokenError",
    "ModelError",
    "RequestError",
    "UnknownNameError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "interruption_in",
]


class ForetokenError(Exception):
    """Base of every error that Foretoken raises on purpose.

    Args:
        message: What is wrong, what was given, what is allowed; one line.
        hint: What to do about it; one line.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(ForetokenError):
    """An option is unknown, out of range or contradicts another."""


class UnknownNameError(ConfigError):
    """A name that is not registered; the hint suggests the nearest known ones.

    Args:
        kind: What was looked up, for example "drafter" or "sampling parameter".
        name: The name that was given.
        known: All names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        listed = ", ".join(names) or "none"
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"use one of: {listed}"
        super().__init__(f"unknown {kind} {name!r}; known: {listed}", hint=hint)


class ModelError(ForetokenError):
    """A model cannot be loaded or served."""


class UnsupportedModelError(ModelError):
    """The architecture cannot have a token tree verified in one pass."""


class VocabularyMismatchError(ModelError):
    """Draft model and target model do not share token ids.

    Args:
        detail: The first difference found, as `draft ..., target ...`.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"draft and target vocabularies differ: {detail}",
            hint="use a draft model of the same family, or a drafter without a model "
            "such as prompt-lookup",
        )


class RequestError(ForetokenError):
    """One request is wrong; other requests are not affected."""


class CapacityError(ForetokenError):
    """There is no room for the request now."""

    retryable = True


class DrafterError(ForetokenError):
    """A drafter returned something that its contract forbids."""


def interruption_in(error: BaseException) -> BaseException | None:
    """Return what a signal's handler raised while native code handed arrays to Python, if that.

    The handler (Ctrl-C's, most often) then runs inside numba, and what it raises arrives as the
    cause of a `SystemError`, which nobody who waits for a `KeyboardInterrupt` would catch.

    Args:
        error: What was caught.
    """
    cause = error
    while isinstance(cause, SystemError) and cause.__cause__ is not None:
        cause = cause.__cause__
    return cause if cause is not error else None
