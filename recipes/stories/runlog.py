"""The run record: what was run, on what, with which settings, for how long, to what end."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def cpu_name() -> str:
    """The processor's name as the kernel states it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


class RunLog:
    """A JSON file that every stage adds its part to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        """What was recorded so far."""
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def start(self, argv: list[str]) -> None:
        """Record one start of the recipe: its options without the folders, and versions."""
        record = self.read()
        starts = record.setdefault("starts", [])
        starts.append({"argv": _without_folders(argv), "at": _now()})
        record["machine"] = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
        names = ("torch", "transformers", "tokenizers", "safetensors")
        record["versions"] = {name: version(name) for name in names}
        record["versions"]["python"] = platform.python_version()
        self._write(record)

    def update(self, stage: str, result: dict[str, Any]) -> None:
        """Record a stage's result."""
        record = self.read()
        record[stage] = result | {"finished": _now()}
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self._path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _without_folders(argv: list[str]) -> list[str]:
    """The arguments with the name of every folder replaced by what it is."""
    cleaned = list(argv)
    for index, word in enumerate(argv[:-1]):
        if word in ("--data", "--work", "--export"):
            cleaned[index + 1] = word[2:].upper()
    return cleaned


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
