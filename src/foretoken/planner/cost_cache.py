"""Cost curves kept on disk, one file for each model, machine and version of what runs it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

from foretoken.core.progress import OnProgress, silent
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_measure import BUDGET_S, measure_cost

FORMAT = 1
FOLDER_VARIABLE = "FORETOKEN_CACHE_DIR"
PACKAGES = ("foretoken", "torch", "numba", "llvmlite", "transformers")
# Code that decides what a pass costs and how that is measured, from the package's own folder.
SOURCES = ("core/jit.py", "models/*.py", "planner/cost*.py")
# Entries of a configuration that change no pass.
SILENT_ENTRIES = ("_name_or_path", "transformers_version", "architectures")

_log = logging.getLogger(__name__)


def load_or_measure(
    model: LanguageModel,
    *,
    budget_s: float = BUDGET_S,
    on_progress: OnProgress = silent,
) -> CostCurve:
    """Return a model's cost curve: the one kept on disk, or one that is measured and kept now.

    A file is used if everything that decides what a pass costs is as it was, see `identity`. One
    that is damaged or of something else is replaced. Where nothing can be written, the curve is
    measured by every process.

    Args:
        model: As it will be run.
        budget_s: Seconds for measuring.
        on_progress: Told of every round of measuring; not called if the curve is there.
    """
    return load_or_make(
        identity(model),
        lambda: measure_cost(model, budget_s=budget_s, on_progress=on_progress),
    )


def load_or_make(wanted: dict[str, Any], make: Callable[[], CostCurve]) -> CostCurve:
    """Return the curve that is kept on disk for something, or make it and keep it.

    Args:
        wanted: All that decides what the curve is, as a JSON object; see `identity`.
        make: Measures it.
    """
    path = cache_folder() / "cost" / f"{_digest(wanted)}.json"
    curve = _load(path, wanted)
    if curve is None:
        curve = make()
        _save(path, wanted, curve)
    return curve


def cache_folder() -> Path:
    """Return where Foretoken keeps what it can make again.

    `$FORETOKEN_CACHE_DIR`, else `foretoken` below `$XDG_CACHE_HOME`, else below `~/.cache`.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretoken"


def identity(model: LanguageModel) -> dict[str, Any]:
    """Return all that decides what a pass of a model costs here, as a JSON object.

    Where the model's files lie is not part of it; what its configuration says is.
    """
    info = model.info
    return {
        "format": FORMAT,
        "model": {
            "config": _config_digest(info.name),
            "vocab_size": info.vocab_size,
            "num_layers": info.num_layers,
            "num_parameters": info.num_parameters,
            "context_limit": info.context_limit,
            "dtype": str(info.dtype).removeprefix("torch."),
            "kv_layers": _digest([list(_shape(layer)) for layer in info.kv_layers]),
            "exactness": info.exactness.value,
            "path": _path(model),
        },
        "machine": {
            "device": _device_name(info.device),
            "threads": torch.get_num_threads(),
            **_processor(),
        },
        "software": _software(),
    }


# -- what decides --------------------------------------------------------------------------------


def _path(model: LanguageModel) -> str:
    """Return what computes the passes: compiled code or modules, all layers or a view of some."""
    parts = [type(part).__name__ for part in vars(model).values()]
    return " ".join([type(model).__name__, *parts, str(getattr(model, "layers", ""))]).strip()


def _shape(layer: Any) -> tuple[int, int, int]:
    return layer.num_heads, layer.key_dim, layer.value_dim


def _config_digest(name: str) -> str:
    """Return a digest of what the model's configuration says; empty if there is none on disk."""
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "config.json")
        except HFValidationError:  # no hub id either: a model that was built in memory
            return ""
        if not isinstance(found, str):
            return ""
        path = Path(found)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in SILENT_ENTRIES}
    return _digest(config)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=1)
def _processor() -> dict[str, Any]:
    features = sorted(name for name, has_it in get_host_cpu_features().items() if has_it)
    return {
        "processor": processor_name(),
        "architecture": get_host_cpu_name(),
        "flags": _digest(features),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor_name() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


@lru_cache(maxsize=1)
def _software() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        **versions,
        "sources": _sources_digest(),
    }


def _sources_digest() -> str:
    """Return a digest of the code that computes and that measures passes."""
    root = Path(__file__).parents[1]
    content = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- files ---------------------------------------------------------------------------------------


def _load(path: Path, wanted: dict[str, Any]) -> CostCurve | None:
    """Return the curve in a file; None if there is none for what is wanted."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] != wanted:
            raise ConfigError(
                "it is of another model or machine", hint="leave files of the cache as they are"
            )
        return CostCurve.from_dict(content["curve"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200]
        _log.warning(
            "cost file %s is not used and will be replaced: %s: %s",
            path,
            type(error).__name__,
            reason,
        )
        return None


def _save(path: Path, wanted: dict[str, Any], curve: CostCurve) -> None:
    """Write a curve; readers see the old file or the new one, whole. Failing is no error."""
    content = {
        "what": "milliseconds of a model's passes, measured by Foretoken; may be deleted",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "identity": wanted,
        "curve": curve.to_dict(),
    }
    text = json.dumps(content, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.info("cost file %s cannot be written, so nothing is kept: %s", path, error)


__all__ = ["cache_folder", "identity", "load_or_make", "load_or_measure", "processor_name"]
