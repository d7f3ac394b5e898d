"""A draft model from nothing: a Llama of a given shape that speaks the target's tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from foretoken.models.decoder_config import ROPE_TYPES
from foretoken.models.draft_shape import DraftShape
from foretoken.models.draft_vocabulary import SPECIAL_IDS, DraftVocabulary, check_vocabulary
from foretoken.models.looped import LoopedLlamaConfig, register
from foretoken.models.loops import LoopShape
from foretoken.models.trainable import TrainableModel

DEFAULT_THETA = 10_000.0


def blank_model(
    target: TrainableModel,
    shape: DraftShape,
    *,
    vocabulary: DraftVocabulary | None = None,
    loops: LoopShape | None = None,
    seed: int = 0,
) -> TrainableModel:
    """Return a model with random weights, on the target's device; the same seed gives the same.

    Whatever the target's family, it is a Llama, which is compiled on CPU. Positions are encoded as
    in the target where its way is known there.

    Args:
        target: Its tokens, their tokenizer, its context and whether its head is its embedding.
        shape: What to make.
        vocabulary: The tokens that it can say, if the shape has fewer than the target.
        loops: Which of the shape's layers share their weights; None for none.
        seed: Of the weights.

    Raises:
        ConfigError: Shape and vocabulary, or shape and loops, do not go together.
    """
    check_vocabulary(shape, vocabulary, target.vocab_size)
    config = _llama_config(target, shape)
    if loops is not None:
        config = LoopedLlamaConfig.of_llama(config, loops)
    if vocabulary is not None:
        vocabulary.write_into(config)
    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return TrainableModel(
        module.eval().to(target.device), target.directory, target.dtype, vocabulary
    )


def _llama_config(target: TrainableModel, shape: DraftShape) -> LlamaConfig:
    config: Any = target.config
    return LlamaConfig(
        **shape.as_config(),
        vocab_size=target.vocab_size,
        max_position_embeddings=target.context_limit,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-5),
        rope_parameters=_rope(config),
        **{name: getattr(config, name, None) for name in SPECIAL_IDS},
    )


def _rope(config: Any) -> dict[str, Any]:
    """Return how positions are to be encoded: as there, or plainly."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", DEFAULT_THETA)
    if rope.get("rope_type") not in ROPE_TYPES or not isinstance(theta, (int, float)):
        return {"rope_type": "default", "rope_theta": DEFAULT_THETA}
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


__all__ = ["blank_model"]
