"""What a model's files say, whichever way it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretoken.errors import ModelError

# Below this many parameters a CPU pass is bound by operator overhead, not by reading weights,
# and float32 operators are the fast ones.
SMALL_ON_CPU = 50_000_000
DEFAULT_CONTEXT_LIMIT = 32_768


def context_limit(config: Any) -> int:
    """Return the positions that can be used without any request changing another's rotation.

    Rotary embeddings of type dynamic and longrope change all frequencies once the longest
    position in the batch passes the original limit, so those models stop there.
    """
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT_LIMIT
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        kind = str(rope.get("rope_type", "default"))
        if "dynamic" in kind or kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            limit = min(limit, original or limit)
    return int(limit)


def eos_ids(*configs: Any) -> frozenset[int]:
    """Return the ids that end a sequence, as the first configuration says that says any."""
    for config in configs:
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def unreadable(path: str, error: Exception) -> ModelError:
    """Return the error for a model whose files cannot be used."""
    reason = " ".join(str(error).split())[:300]
    where = "" if Path(path).expanduser().exists() else "is no directory here and "
    return ModelError(
        f"model {path!r} {where}cannot be loaded: {reason}",
        hint="give a directory written by save_pretrained with safetensors weights, "
        "or a hub id that can be reached",
    )
