"""Records that are written part by part, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foretoken import __version__
from foretoken.bench.machine import environment
from foretoken.bench.record import portable_command, write_record
from foretoken.errors import ConfigError

RECORD = "record.json"


def new_record(
    what: str,
    *,
    number: int,
    policy: str,
    settings: Mapping[str, Any],
    threads: int,
    command: Sequence[str],
) -> dict[str, Any]:
    """Return a record without cells.

    Args:
        what: The command that makes such records.
        number: Of the record's format.
        policy: How it is measured, in words.
        settings: All that the numbers depend on, as JSON.
        threads: CPU threads of what is measured.
        command: The command line's words.
    """
    return {
        "what": what,
        "format": number,
        "command": portable_command(command),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "policy": policy,
        "environment": environment(threads),
        "settings": {**settings, "foretoken": __version__},
        "cells": [],
    }


def begun_record(
    what: str, settings: Mapping[str, Any], folder: Path | None, *, number: int
) -> dict[str, Any] | None:
    """Return the record that a run with the same settings has left; None if there is none.

    Args:
        what: The command that makes such records.
        settings: As of `new_record`.
        folder: Where the record would be; None if none is kept.
        number: Of the record's format.

    Raises:
        ConfigError: A record is there, but of another run, or it cannot be read.
    """
    path = None if folder is None else folder / RECORD
    if path is None or not path.exists():
        return None
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        found, cells = dict(record["settings"]), list(record["cells"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"record.json in {str(folder)!r} cannot be continued: {error!r}",
            hint="choose another folder, or overwrite it with --force",
        ) from error
    if record.get("what") == what and record.get("format") != number:
        raise ConfigError(
            f"record.json in {str(folder)!r} has format {record.get('format')}, which was measured "
            f"in another way; this version writes {number}",
            hint="choose another folder, or overwrite it with --force",
        )
    wanted = {**settings, "foretoken": __version__}
    other = [name for name in (*wanted, *found) if found.get(name) != wanted.get(name)]
    if record.get("what") != what or other:
        changes = "; ".join(
            f"{name} {found.get(name)}, now {wanted.get(name)}" for name in dict.fromkeys(other)
        )
        raise ConfigError(
            f"record.json in {str(folder)!r} is of another run: {changes or record.get('what')}",
            hint="repeat the command that began it, choose another folder, or use --force",
        )
    return {**record, "cells": cells}


def save_record(record: Mapping[str, Any], folder: Path) -> None:
    """Put the record in its place, whole or not at all."""
    with TemporaryDirectory(dir=folder, prefix=".") as draft:
        write_record(record, Path(draft)).replace(folder / RECORD)


__all__ = ["begun_record", "new_record", "save_record"]
