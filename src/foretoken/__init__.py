"""Foretoken: several tokens per forward pass, and the same ones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foretoken.core.params import SamplingParams
    from foretoken.core.verdict import Exactness
    from foretoken.engine.llm import LLM, RequestOutput, StreamChunk
    from foretoken.engine.request import FinishReason
    from foretoken.errors import (
        CapacityError,
        ConfigError,
        DrafterError,
        ForetokenError,
        ModelError,
        RequestError,
    )

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "foretoken.engine.llm",
    "RequestOutput": "foretoken.engine.llm",
    "StreamChunk": "foretoken.engine.llm",
    "SamplingParams": "foretoken.core.params",
    "Exactness": "foretoken.core.verdict",
    "FinishReason": "foretoken.engine.request",
    "CapacityError": "foretoken.errors",
    "ConfigError": "foretoken.errors",
    "DrafterError": "foretoken.errors",
    "ForetokenError": "foretoken.errors",
    "ModelError": "foretoken.errors",
    "RequestError": "foretoken.errors",
}

__all__ = [
    "LLM",
    "CapacityError",
    "ConfigError",
    "DrafterError",
    "Exactness",
    "FinishReason",
    "ForetokenError",
    "ModelError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import foretoken` alone stays instant."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name == "hf":  # foretoken.hf.generate, without an import of its own
        return importlib.import_module("foretoken.hf")
    raise AttributeError(f"module 'foretoken' has no attribute {name!r}")
