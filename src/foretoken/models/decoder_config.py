"""Configurations of plain decoders, read without the seconds that importing transformers' take."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from foretoken.models.loops import MODEL_TYPE as LOOPED

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", LOOPED)
# The others change their frequencies with the length of the batch, or are not known here.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_REQUIRED = {"rms_norm_eps", "hidden_act", "tie_word_embeddings", "eos_token_id", *_SIZES}
# Without these a family falls back on defaults of its own, which transformers knows.
_REQUIRED_OF = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {"use_sliding_window"},
    "qwen3": {"use_sliding_window", "attention_bias", "head_dim"},
    LOOPED: {
        "attention_bias",
        "mlp_bias",
        "prelude_layers",
        "group_layers",
        "num_loops",
        "coda_layers",
    },
}


def is_plain_decoder(config: Any) -> bool:
    """Whether a configuration is of a decoder that can be compiled.

    Args:
        config: transformers' own, or one that `read_plain_config` gave.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # Qwen 2 always has a bias on queries, keys and values; Llama's is on the output too.
    has_other_bias = config.model_type != "qwen2" and getattr(config, "attention_bias", False)
    return (
        config.model_type in MODEL_TYPES
        and getattr(config, "hidden_act", "") == "silu"
        and rope.get("rope_type", "default") in ROPE_TYPES
        and not getattr(config, "mlp_bias", False)
        and not has_other_bias
        and getattr(config, "quantization_config", None) is None
    )


def read_plain_config(path: str) -> SimpleNamespace | None:
    """Return a local configuration that says itself all that has to be known of a plain decoder.

    None for every other: transformers knows the defaults and the history of the fields, and says
    what is wrong with broken files.
    """
    try:
        text = (Path(path).expanduser() / "config.json").read_text(encoding="utf-8")
        values = json.loads(text)
        model_type = values["model_type"]
        required = _REQUIRED | _REQUIRED_OF[model_type]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rope = _rope(values)
    if rope is None or not required <= values.keys() or not _has_sound_sizes(values):
        return None
    if values.get("use_sliding_window") and "layer_types" not in values:
        return None
    if "use_sliding_window" in values and not values["use_sliding_window"]:
        values["sliding_window"] = None
    dtype = getattr(torch, str(values.get("dtype", values.get("torch_dtype"))), None)
    return SimpleNamespace(**{**values, "rope_parameters": rope, "dtype": dtype})


def _has_sound_sizes(values: dict[str, Any]) -> bool:
    sizes = [values[name] for name in _SIZES]
    if any(not isinstance(size, int) or size < 1 for size in sizes):
        return False
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    return heads % kv_heads == 0 and (bool(values.get("head_dim")) or sizes[1] % heads == 0)


def _rope(values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the rotary parameters if they are the plain ones, in either way of writing them."""
    rope = values.get("rope_parameters")
    if rope is None and "rope_theta" in values and not values.get("rope_scaling"):
        rope = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    if not isinstance(rope, dict) or rope.get("rope_type") != "default" or "rope_theta" not in rope:
        return None
    return None if "partial_rotary_factor" in values else rope
