"""A draft model cut from its target: the parts that its outputs depend on most.

Everything that is kept keeps its weights. Where the residual stream gets narrower, norms see fewer
channels and would scale the rest up or down; their weights make good for it. Heads of a group share
their keys and values and stay with them.

Sources: LLM-Pruner, arXiv:2305.11627; Sheared LLaMA, arXiv:2310.06694; Decoding Speculative
Decoding, arXiv:2402.01528, for drafts of few layers and full width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from foretoken.errors import ConfigError, UnsupportedModelError
from foretoken.models.decoder_config import MODEL_TYPES
from foretoken.models.draft_shape import DraftShape
from foretoken.models.draft_vocabulary import DraftVocabulary, check_vocabulary
from foretoken.models.importance import (
    Importance,
    measure_importance,
    num_layer_tokens,
    select_layers,
    texts_of,
)
from foretoken.models.trainable import TrainableModel


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """What is kept of one layer.

    Args:
        index: Which layer of the target it is.
        groups: Key heads, each with the query heads that it serves; all groups are as large.
        values: For each group the channels that are kept of its value head, [kv_heads, head_dim].
        channels: Of the feed-forward part, [intermediate].
    """

    index: int
    groups: Sequence[tuple[int, Sequence[int]]]
    values: Tensor
    channels: Tensor


@dataclass(frozen=True, slots=True)
class KeptParts:
    """What is kept of a target.

    Args:
        hidden: Channels of the residual stream, ascending, [hidden].
        layers: In order.
        norm_scales: What each norm's weight is multiplied by: two per layer, then the final one.
    """

    hidden: Tensor
    layers: Sequence[KeptLayer]
    norm_scales: Sequence[float]


def prune(
    target: TrainableModel,
    shape: DraftShape,
    examples: Sequence[Sequence[int]],
    *,
    vocabulary: DraftVocabulary | None = None,
) -> TrainableModel:
    """Return a model of a shape made of the target's parts that its texts depend on most.

    Layers are chosen first, then what is kept within them. Nothing is random.

    Args:
        target: A decoder of the Llama, Mistral, Qwen 2 or Qwen 3 family; left as it is.
        shape: What to cut.
        examples: Token ids of texts that the target wrote; the first few thousand tokens count.
        vocabulary: The tokens that it can say, if the shape has fewer than the target.

    Raises:
        ConfigError: The shape is no part of the target, it and the vocabulary do not go together,
            or no example has two tokens.
        UnsupportedModelError: The target is of another family.
    """
    check_prunable(target.config, shape)
    check_vocabulary(shape, vocabulary, target.vocab_size)
    layer_texts = texts_of(target, examples, num_layer_tokens(target))
    layers = select_layers(target, shape.layers, layer_texts)
    importance = measure_importance(target, layers, texts_of(target, examples))
    return cut(target, shape, select_parts(layers, importance, shape), vocabulary=vocabulary)


def check_prunable(config: Any, shape: DraftShape) -> None:
    """Check that a shape can be cut from a target.

    Args:
        config: The target's, of transformers.
        shape: The draft's.

    Raises:
        ConfigError: A size is more than the target's, or goes against its groups of heads.
        UnsupportedModelError: The target is of a family that cannot be pruned.
    """
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} cannot be pruned; those of type "
            f"{', '.join(MODEL_TYPES)} can",
            hint="let the draft begin from scratch",
        )
    whole = DraftShape.of(config)
    for name in ("layers", "hidden", "intermediate"):
        most = getattr(whole, name)
        _require(getattr(shape, name) <= most, name, getattr(shape, name), f"at most {most}")
    is_divisor = whole.head_dim % shape.head_dim == 0
    _require(is_divisor, "head_dim", shape.head_dim, f"a divisor of {whole.head_dim}")
    group, wanted = whole.heads // whole.kv_heads, shape.heads // shape.kv_heads
    allowed = f"at most {group} heads per kv_head"
    _require(wanted <= group, "heads per kv_head", wanted, allowed)
    most = whole.kv_heads * (group // wanted)
    allowed = f"at most {most} with {wanted} heads each"
    _require(shape.kv_heads <= most, "kv_heads", shape.kv_heads, allowed)


def select_parts(layers: Sequence[int], importance: Importance, shape: DraftShape) -> KeptParts:
    """Return the most important parts of a shape, as they stand in the target.

    Args:
        layers: Those that are kept, ascending.
        importance: Of these layers' parts.
        shape: One that `check_prunable` allows.
    """
    hidden = _best(importance.hidden, shape.hidden)
    return KeptParts(
        hidden=hidden,
        layers=[
            _select_layer(index, heads, channels, shape)
            for index, heads, channels in zip(
                layers, importance.heads, importance.channels, strict=True
            )
        ],
        norm_scales=norm_scales(importance, hidden),
    )


def norm_scales(importance: Importance, hidden: Tensor) -> list[float]:
    """Return by how much each norm is to be multiplied to see only some channels.

    A norm divides by the root of the mean square of what it sees: with the strong channels kept,
    that mean is higher than it was, and what is behind the norm would become weaker.

    Args:
        importance: With the channels' energies.
        hidden: The channels that it will see.
    """
    if len(hidden) == len(importance.hidden):
        return [1.0] * len(importance.energy)
    return [energy[hidden].mean().sqrt().item() for energy in importance.energy]


def cut(
    target: TrainableModel,
    shape: DraftShape,
    parts: KeptParts,
    *,
    vocabulary: DraftVocabulary | None = None,
) -> TrainableModel:
    """Return a model of some parts of a target, with copies of their weights.

    Args:
        target: Left as it is.
        shape: Of the parts.
        parts: What is kept.
        vocabulary: The tokens that are kept; None for all.
    """
    tokens = slice(None) if vocabulary is None else vocabulary.d2t.to(target.device)
    weights = {name: it.detach() for name, it in target.module.state_dict().items()}
    state = {
        name: weights[name][tokens][:, parts.hidden]
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    state["model.norm.weight"] = weights["model.norm.weight"][parts.hidden] * parts.norm_scales[-1]
    whole = DraftShape.of(target.config)
    for place, layer in enumerate(parts.layers):
        prefix = f"model.layers.{layer.index}."
        tensors = {
            name.removeprefix(prefix): it for name, it in weights.items() if name.startswith(prefix)
        }
        scales = parts.norm_scales[2 * place : 2 * place + 2]
        for name, tensor in _cut_layer(tensors, _Cut.of(layer, parts.hidden, whole, shape), scales):
            state[f"model.layers.{place}.{name}"] = tensor
    config = _config(target, shape, [layer.index for layer in parts.layers], vocabulary)
    with torch.random.fork_rng(devices=[]):  # its random weights are overwritten
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module.load_state_dict(state)
    module = module.eval().to(target.device)
    return TrainableModel(module, target.directory, target.dtype, vocabulary)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which rows and columns of each linear layer are kept, by its name.

    Args:
        rows: Of outputs.
        columns: Of inputs.
        rotary: Channels of a head that are kept in queries and keys.
        score_scale: Of attention scores, which are divided by the root of the head's width.
    """

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    rotary: Tensor
    score_scale: float

    @classmethod
    def of(cls, layer: KeptLayer, hidden: Tensor, whole: DraftShape, shape: DraftShape) -> _Cut:
        """Return what is kept of a layer of a target of the shape `whole`."""
        group_size, device = whole.heads // whole.kv_heads, hidden.device
        # A head that is k times narrower has every k-th of the rotary frequencies; a pair of
        # channels stands half a head apart.
        step = whole.head_dim // shape.head_dim
        half = torch.arange(shape.head_dim // 2, device=device) * step
        rotary = torch.cat((half, half + whole.head_dim // 2))
        key_heads = torch.tensor([head for head, _ in layer.groups], device=device)[:, None]
        members = torch.tensor([list(members) for _, members in layer.groups], device=device)
        starts = (key_heads * group_size + members) * whole.head_dim  # [kv_heads, group]
        key_starts = key_heads * whole.head_dim  # [kv_heads, 1]
        return cls(
            rows={
                "self_attn.q_proj": (starts[..., None] + rotary).flatten(),
                "self_attn.k_proj": (key_starts + rotary).flatten(),
                "self_attn.v_proj": (key_starts + layer.values).flatten(),
                "self_attn.o_proj": hidden,
                "mlp.gate_proj": layer.channels,
                "mlp.up_proj": layer.channels,
                "mlp.down_proj": hidden,
            },
            columns={
                **dict.fromkeys((f"self_attn.{it}_proj" for it in "qkv"), hidden),
                "self_attn.o_proj": (starts[..., None] + layer.values[:, None]).flatten(),
                "mlp.gate_proj": hidden,
                "mlp.up_proj": hidden,
                "mlp.down_proj": layer.channels,
            },
            rotary=rotary,
            score_scale=math.sqrt(shape.head_dim / whole.head_dim),
        )


def _cut_layer(
    tensors: Mapping[str, Tensor], kept: _Cut, norm_scales: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a layer that is left."""
    norms = dict(zip(("input_layernorm", "post_attention_layernorm"), norm_scales, strict=True))
    # Where queries are normed, a scale in front of the norm would not be heard.
    scaled = "self_attn.q_norm" if "self_attn.q_norm.weight" in tensors else "self_attn.q_proj"
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if module in norms:
            yield name, tensor[kept.columns["mlp.gate_proj"]] * norms[module]
            continue
        part = tensor[kept.rows.get(module, kept.rotary)]  # q_norm and k_norm have one head's
        if tensor.dim() == 2:
            part = part[:, kept.columns[module]]
        yield name, part * kept.score_scale if module == scaled else part


def _config(
    target: TrainableModel,
    shape: DraftShape,
    layers: Sequence[int],
    vocabulary: DraftVocabulary | None,
) -> Any:
    """Return the target's configuration with the sizes of the draft."""
    config: Any = copy.deepcopy(target.config)
    config.rms_norm_eps *= config.hidden_size / shape.hidden  # as much as the mean square may rise
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    for name, value in shape.as_config().items():
        setattr(config, name, value)
    if vocabulary is not None:
        vocabulary.write_into(config)
    return config


def _select_layer(index: int, heads: Tensor, channels: Tensor, shape: DraftShape) -> KeptLayer:
    """Return what is kept of a layer; see `Importance` for the scores."""
    size = shape.heads // shape.kv_heads
    candidates = []
    for key_head, scores in enumerate(heads.sum(dim=-1).tolist()):
        by_rank = sorted(range(len(scores)), key=lambda it: -scores[it])
        # A group that is larger than the draft's may stand for several, each with copies of its
        # keys and values.
        for start in range(0, len(scores) - size + 1, size):
            members = sorted(by_rank[start : start + size])
            candidates.append((sum(scores[it] for it in members), key_head, members))
    best = sorted(candidates, key=lambda it: -it[0])[: shape.kv_heads]
    groups = sorted((key_head, members) for _, key_head, members in best)
    values = [_best(heads[it, members].sum(dim=0), shape.head_dim) for it, members in groups]
    return KeptLayer(index, groups, torch.stack(values), _best(channels, shape.intermediate))


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores, ascending; of equal ones, the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _require(is_met: bool, name: str, value: int, allowed: str) -> None:
    if not is_met:
        raise ConfigError(
            f"a draft of {name}={value} cannot be cut from this target; it has to be {allowed}",
            hint=f"change {name} in the draft's shape, or let the draft begin from scratch",
        )


__all__ = [
    "KeptLayer",
    "KeptParts",
    "check_prunable",
    "cut",
    "norm_scales",
    "prune",
    "select_parts",
]
