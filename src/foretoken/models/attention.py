"""Tree attention behind transformers' public attention registration.

Every supported architecture calls `ALL_ATTENTION_FUNCTIONS["foretoken"]` with its queries, keys
and values after position encoding. The step's batch arrives there as a keyword argument that went
through the model's own forward, so there is no hidden state between calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from foretoken.errors import UnsupportedModelError
from foretoken.models.attention_kernels import attend_layer
from foretoken.models.batch import RaggedBatch
from foretoken.models.in_flight import InFlightBatch
from foretoken.models.pools import as_array
from foretoken.models.threads import run_together

IMPLEMENTATION = "foretoken"
BATCH_KEYWORD = "ragged_batch"
COMPILED_DTYPES = (torch.float32, torch.bfloat16)
WORK_PER_THREAD = 4_000_000  # multiply-adds; waking another thread takes as long as some of them
DECODER_HINT = "use a decoder-only model with standard attention, such as Llama, Qwen or Gemma"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One layer's attention, as the model asks for it.

    Args:
        layer: Index of the layer.
        query: [R, H, D].
        key: [R, H of the cache, D].
        value: [R, H of the cache, D of values].
        scaling: Multiplies the scores.
        window: Positions that a node sees, itself included; None for all.
        softcap: Bounds the scores softly (Gemma 2); None for off.
        sinks: [H] extra logits that take probability but give no value (GPT-OSS), or None.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class AttentionBackend(Protocol):
    """What stands behind the batch keyword: computes a layer's attention for all rows."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the attention output, [R, H, D of values]."""
        ...


def _dispatch(
    module: nn.Module,
    query: Tensor,  # [1, H, R, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Take a layer's attention from transformers to the backend that came with the batch."""
    backend: AttentionBackend | None = kwargs.get(BATCH_KEYWORD)
    if backend is None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise _refusal(module, backend, attention_mask)
    call = AttentionCall(
        layer=module.layer_idx,  # type: ignore[arg-type]
        query=query[0].transpose(0, 1),
        key=key[0].transpose(0, 1),
        value=value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    # Contiguous, as transformers' own functions return it: some models take a view of it.
    return backend.attend(call).contiguous().unsqueeze(0), None


def _refusal(
    module: nn.Module, backend: AttentionBackend | None, attention_mask: Tensor | None
) -> UnsupportedModelError:
    """Say why a layer's attention cannot be a token tree's."""
    if backend is None:
        reason = "does not hand keyword arguments down to its attention"
    elif attention_mask is not None:
        reason = "computes an attention mask of its own"
    else:
        reason = "lets tokens see those after them, so it cannot predict them"
    model_type = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    return UnsupportedModelError(f"{model_type!r} {reason}", hint=DECODER_HINT)


AttentionInterface.register(IMPLEMENTATION, _dispatch)


class ReferenceAttention:
    """Tree attention in plain torch: right on every device, the yardstick for faster ones.

    Args:
        batch: The rows of the pass; their keys and values go into its cache.
    """

    def __init__(self, batch: RaggedBatch) -> None:
        self._batch = batch

    def attend(self, call: AttentionCall) -> Tensor:
        """Store the rows' keys and values, then let each row look at its ancestors."""
        cache, layout = self._batch.cache, self._batch.reference
        key_pool, value_pool = cache.keys[call.layer], cache.values[call.layer]
        key_pool.index_copy_(0, self._batch.slots, call.key)
        value_pool.index_copy_(0, self._batch.slots, call.value)

        num_segments, num_nodes, num_keys = layout.shape
        num_heads, num_kv_heads = call.query.shape[1], key_pool.shape[1]
        group = num_heads // num_kv_heads
        keys = key_pool.index_select(0, layout.key_slots).view(
            num_segments, num_keys, *key_pool.shape[1:]
        )
        values = value_pool.index_select(0, layout.key_slots).view(
            num_segments, num_keys, *value_pool.shape[1:]
        )
        query = call.query if layout.pad_rows is None else call.query[layout.pad_rows]
        # Queries of one group of heads read the same keys: fold them into one matrix.
        query = query.reshape(num_segments, num_nodes, num_kv_heads, group, -1)
        query = query.permute(0, 2, 3, 1, 4).reshape(
            num_segments, num_kv_heads, group * num_nodes, -1
        )
        scores = (query @ keys.permute(0, 2, 3, 1)) * call.scaling
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        scores = scores.view(num_segments, num_kv_heads, group, num_nodes, num_keys)
        bias = layout.bias(call.window, scores.dtype)
        if bias is not None:
            scores = scores + bias[:, None, None]
        probs = _softmax_with_sinks(scores, call.sinks)
        output = probs.view(
            num_segments, num_kv_heads, group * num_nodes, num_keys
        ) @ values.transpose(1, 2)
        output = output.view(num_segments, num_kv_heads, group, num_nodes, -1)
        output = output.permute(0, 3, 1, 2, 4).reshape(num_segments * num_nodes, num_heads, -1)
        return output if layout.unpad_rows is None else output[layout.unpad_rows]


class CompiledAttention:
    """Tree attention for CPU in compiled code, float32 and bfloat16.

    Each row looks at its past in the order of positions, so the bits of its result depend neither
    on where its ancestors lie nor on what else is in the batch.

    Args:
        batch: The rows of the pass; their keys and values go into its cache.
    """

    def __init__(self, batch: RaggedBatch) -> None:
        self._batch = batch

    def attend(self, call: AttentionCall) -> Tensor:
        """Store the rows' keys and values, then let each row look at its ancestors."""
        cache, (num_rows, num_heads, key_size) = self._batch.cache, call.query.shape
        keys, values = cache.keys[call.layer], cache.values[call.layer]
        num_kv_heads, value_size = values.shape[1:]
        out = call.query.new_empty(num_rows, num_heads, value_size)
        work = num_rows * num_heads * max(self._batch.num_keys) * (key_size + value_size)
        arguments = (
            self._batch.layout,
            *(_flat(tensor) for tensor in (call.query, call.key, call.value)),
            key_size,
            value_size,
            num_kv_heads,
            _flat(keys),
            _flat(values),
            call.scaling,
            call.window or 0,
            call.softcap or 0.0,
            _sinks(call.sinks, num_heads),
            _flat(out),
            np.zeros(2, np.int64),
        )
        num_threads = max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))
        run_together(attend_layer, arguments, num_threads)
        return out


class InFlightAttention:
    """Attention of rows at different depths: depth by depth, each with its loop's keys and values.

    Args:
        batch: The rows of the pass; their keys and values go into its cache.
    """

    def __init__(self, batch: InFlightBatch) -> None:
        shift_of = dict(zip(batch.depths, batch.layout.shifts.tolist(), strict=True))
        self._parts = [
            (
                shift,
                torch.tensor(batch.rows_at(depth), device=batch.cache.device),
                _backend_for(batch.at_depth(depth)),
            )
            for depth, shift in shift_of.items()
        ]

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute a layer's attention for the rows of each depth in turn."""
        if len(self._parts) == 1:
            shift, _, backend = self._parts[0]
            return backend.attend(replace(call, layer=call.layer + shift))
        out = call.query.new_empty(*call.query.shape[:2], call.value.shape[2])
        for shift, rows, backend in self._parts:
            states = {name: getattr(call, name)[rows] for name in ("query", "key", "value")}
            out[rows] = backend.attend(replace(call, layer=call.layer + shift, **states))
        return out


def _flat(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a flat array that shares its memory if it is contiguous."""
    return as_array(tensor.reshape(-1))


def _sinks(sinks: Tensor | None, num_heads: int) -> np.ndarray:
    if sinks is None:
        return np.full(num_heads, -np.inf, np.float32)
    return sinks.float().numpy()


def attention_for(batch: RaggedBatch) -> AttentionBackend:
    """Return the fastest attention there is for a batch's device and dtype."""
    return InFlightAttention(batch) if isinstance(batch, InFlightBatch) else _backend_for(batch)


def _backend_for(batch: RaggedBatch) -> AttentionBackend:
    pool = batch.cache.keys[0]
    if pool.device.type == "cpu" and pool.dtype in COMPILED_DTYPES:
        return CompiledAttention(batch)
    return ReferenceAttention(batch)


def _softmax_with_sinks(
    scores: Tensor,  # [B, H of the cache, group, N, T]
    sinks: Tensor | None,  # [H]
) -> Tensor:
    """Return softmax over the keys, in float32 at least; sinks share the denominator."""
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    if sinks is None:
        return scores.softmax(dim=-1, dtype=wide).to(scores.dtype)
    column = sinks.to(scores.dtype).view(1, scores.shape[1], scores.shape[2], 1, 1)
    column = column.expand(*scores.shape[:-1], 1)
    with_sink = torch.cat((scores, column), dim=-1).softmax(dim=-1, dtype=wide)
    return with_sink[..., :-1].to(scores.dtype)
