"""What the bench commands write: files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foretoken.cli.errors import FileError
from foretoken.cli.terminal import note
from foretoken.errors import ConfigError

Writer = Callable[[Mapping[str, Any]], None]
Drawer = Callable[[Mapping[str, Any], Path], list[Path]]


@contextmanager
def written(folder: Path | None, draw: Drawer, *, force: bool) -> Iterator[Writer]:
    """Yield what writes the record and its pictures; all that could hinder it is found first.

    Files appear whole or not at all, and a new folder goes again if nothing gets into it.

    Args:
        folder: Where to; None writes nothing.
        draw: Writes the pictures of a record into a folder and returns their paths.
        force: Whether a record may be overwritten.
    """
    if folder is None:
        yield lambda _: None
        return
    from foretoken.bench.plots import check_plots

    check_plots()
    if (folder / "record.json").exists() and not force:
        raise ConfigError(
            f"output folder {str(folder)!r} holds a record.json",
            hint="choose another folder, or overwrite it with --force",
        )
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield lambda record: _write(record, folder, draw)
    except BaseException:
        if is_new:
            with suppress(OSError):  # the record may be there: then it stays
                folder.rmdir()
        raise


def _write(record: Mapping[str, Any], folder: Path, draw: Drawer) -> None:
    from foretoken.bench.record import write_record

    try:
        with TemporaryDirectory(dir=folder, prefix=".") as draft:
            paths = [write_record(record, Path(draft)), *draw(record, Path(draft))]
            paths = [path.replace(folder / path.name) for path in paths]
    except OSError as error:
        raise _unwritable(folder, error) from error
    note(f"written: {', '.join(map(str, paths))}")


def _unwritable(folder: Path, error: OSError) -> FileError:
    return FileError(
        f"output folder {str(folder)!r} cannot be written: {error.strerror or error}",
        hint="name another folder",
    )


__all__ = ["Drawer", "Writer", "written"]
