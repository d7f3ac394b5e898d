"""A folder that a run can be stopped and resumed in, by the same settings only."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foretoken.errors import ConfigError
from foretoken.training.storage import write_atomically, writing

SETTINGS_FILE = "settings.json"
_EDGE_BYTES = 2**20


class RunFolder:
    """Where a run leaves its results; each is there whole or not at all.

    Args:
        path: The folder; made if it is not there.
        settings: What the results depend on, as JSON values.

    Raises:
        ConfigError: The folder cannot be written, holds other things, or a run with other
            settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        file = path / SETTINGS_FILE
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.is_resumed = file.exists()
            if self.is_resumed:
                self._check_settings(file, settings)
            elif any(path.iterdir()):
                raise ConfigError(
                    f"output folder {str(path)!r} is not empty and holds no run to resume",
                    hint="name a new or empty folder",
                )
            else:
                write_json(file, settings)
        except OSError as error:
            raise ConfigError(
                f"output folder {str(path)!r} cannot be used: {error.strerror or error}",
                hint="name another folder",
            ) from error

    def build(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write a folder inside this one and put it in its place by renaming.

        Args:
            name: Of the folder, below this one.
            write: Fills the empty folder that it is given.

        Raises:
            ConfigError: The system refused to write; nothing is left of it.
        """
        final = self.path / name
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing(name):
            try:
                partial.mkdir(parents=True)
                write(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return final

    def _check_settings(self, file: Path, settings: Mapping[str, Any]) -> None:
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{SETTINGS_FILE} in {str(self.path)!r} cannot be read: {error}",
                hint="delete the folder, or name another one",
            ) from error
        names = [*settings, *(name for name in found if name not in settings)]
        other = [name for name in names if found.get(name) != settings.get(name)]
        if other:
            differences = ", ".join(
                f"{name} {_short(found.get(name))}, now {_short(settings.get(name))}"
                for name in other
            )
            raise ConfigError(
                f"output folder {str(self.path)!r} holds a run with other settings: {differences}",
                hint="repeat the command that began it, or name another folder",
            )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, whole or not at all."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def fingerprint(model: str) -> str:
    """Return a short text that changes when the files of a model directory do.

    It reads configurations in full, and names, sizes and both ends of the weights. A hub id is
    its own fingerprint.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["RunFolder", "fingerprint", "write_json"]
