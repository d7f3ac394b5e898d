"""What every benchmark writes beside its numbers."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from foretoken import __version__

OPENINGS = Path(__file__).parents[1] / "src/foretoken/assets/stories/openings.txt"


def environment() -> dict[str, Any]:
    """Return versions, processor and threads."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "foretoken": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {
        "min": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "max": round(max(values), 4),
    }


def write(what: str, result: dict[str, Any], output: Path | None) -> None:
    """Print a record and, if asked, save it."""
    root = f"{Path(__file__).resolve().parents[1]}/"  # of no interest to other machines
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    command = " ".join(word.replace(root, "") for word in words)
    record = {
        "what": what,
        "command": command,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        **result,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
