"""Llamas whose layers are run in loops: their configuration and module, for transformers to find.

Importing this imports transformers; `models.loops` knows the layers' places without it.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from foretoken.models.looped.config import LoopedLlamaConfig
from foretoken.models.looped.modeling import LoopedLlamaForCausalLM
from foretoken.models.loops import MODEL_TYPE


def register() -> None:
    """Let transformers' Auto classes find looped models; again is no harm."""
    AutoConfig.register(MODEL_TYPE, LoopedLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(LoopedLlamaConfig, LoopedLlamaForCausalLM, exist_ok=True)


__all__ = ["LoopedLlamaConfig", "LoopedLlamaForCausalLM", "register"]
