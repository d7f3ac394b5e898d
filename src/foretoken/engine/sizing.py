"""How much memory the KV cache and how much time prompts may take when nobody says."""

from __future__ import annotations

import os

import torch

from foretoken.models.adapter import ModelInfo
from foretoken.models.cache import BLOCK_SIZE

MEMORY_SHARE = 0.25  # of what is free when the model has been loaded
MIXED_CHUNK = 64  # on CPU, where it makes a step some six times as long; see decision 0014


def default_kv_cache_tokens(info: ModelInfo, *, max_requests: int, max_nodes: int) -> int:
    """Return how many positions the cache should hold.

    Enough for `max_requests` full contexts, but no more than a quarter of the free memory, and
    never less than one full context.

    Args:
        info: The model.
        max_requests: Requests that run at once.
        max_nodes: Most draft tokens per request and step.
    """
    one_request = info.context_limit + max_nodes + 1 + BLOCK_SIZE
    affordable = int(MEMORY_SHARE * _free_bytes(info.device)) // max(1, info.kv_bytes_per_token)
    return max(one_request, min(max_requests * one_request, affordable))


def default_mixed_chunk(device: torch.device) -> int | None:
    """Return how many prompt tokens may be fed beside requests that decode; None for no bound.

    On CPU a pass takes time for every row. Elsewhere its first few hundred rows cost little more
    than the reading of the weights, which decoding pays for anyway.
    """
    return MIXED_CHUNK if device.type == "cpu" else None


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 2 * 1024**3
