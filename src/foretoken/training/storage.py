"""Writing files whole or not at all, and saying so plainly when the disk is full."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foretoken.errors import ConfigError

# How Rust's standard library, and so safetensors, words an error of the system.
_RUST_ERROR = re.compile(r"([^:]+) \(os error \d+\)")


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an error of the system, such as a full disk, into one that says what to do.

    Args:
        what: Is written, in a few words.

    Raises:
        ConfigError: The system refused. What libraries make of its refusal is understood;
            every other error passes.
    """
    try:
        yield
    except Exception as error:
        reason = _system_reason(error)
        if reason is None:
            raise
        raise ConfigError(
            f"{what} cannot be written: {reason}",
            hint="free some space, or repair the folder; the same command then goes on from "
            "what was written before",
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that whoever reads it, even after a crash, finds the old or the new one.

    Args:
        path: The file.
        write: Writes to the path that it is given.

    Raises:
        ConfigError: The system refused; the old file is there, and takes no more room than before.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path.name):
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _system_reason(error: BaseException | None) -> str | None:
    """Return the system's words if it refused; torch raises its own errors on top of them."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        worded = _RUST_ERROR.search(str(error))
        if worded:
            return worded.group(1).strip()
        error = error.__cause__ or error.__context__
    return None


__all__ = ["write_atomically", "writing"]
