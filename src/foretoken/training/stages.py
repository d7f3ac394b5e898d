"""The stages of a run: each is done once, timed, and found again when the run is resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.errors import ConfigError
from foretoken.training.folder import write_json

STAGES_FILE = "stages.json"


class Stages:
    """Remembers what each stage of a run gave, in a file.

    Args:
        folder: Of the run.
        on_progress: Told about what is found.

    Raises:
        ConfigError: The file cannot be read.
    """

    def __init__(self, folder: Path, on_progress: OnProgress = silent) -> None:
        self._file = folder / STAGES_FILE
        self._on_progress = on_progress
        self._done: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            try:
                self._done = dict(json.loads(self._file.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ConfigError(
                    f"{STAGES_FILE} in {str(folder)!r} cannot be read: {error}",
                    hint="delete the file; finished stages are then checked, or done again",
                ) from error

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a stage's result, as JSON gives it back; a finished stage is not done again.

        Args:
            name: Of the stage.
            work: Does it and returns JSON values.
        """
        if name in self._done:
            self._on_progress(Progress(stage=name, done=1, total=1, is_resumed=True))
            return self.note(name, 0.0, {})
        start_s = time.perf_counter()
        result = work()
        return self.note(name, time.perf_counter() - start_s, result)

    def note(self, name: str, seconds: float, result: Mapping[str, Any]) -> dict[str, Any]:
        """Remember what a stage gave, if it is not known yet, and return what is known.

        Args:
            name: Of the stage.
            seconds: That it took.
            result: JSON values.
        """
        if name not in self._done:
            noted = {"seconds": round(seconds, 1), "result": json.loads(json.dumps(result))}
            write_json(self._file, {**self._done, name: noted})
            self._done[name] = noted
        found: dict[str, Any] = self._done[name]["result"]
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage took; of one that was interrupted, its last part."""
        return {name: stage["seconds"] for name, stage in self._done.items()}


__all__ = ["STAGES_FILE", "Stages"]
