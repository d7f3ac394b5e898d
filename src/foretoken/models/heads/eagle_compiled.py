"""The pass of an EAGLE head on CPU, in compiled code over packed matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from foretoken.models.batch import RaggedBatch
from foretoken.models.decoder import BYTES_PER_THREAD, RotaryTable
from foretoken.models.decoder_kernels import Shape
from foretoken.models.decoder_loading import alternated
from foretoken.models.heads.eagle import EagleModule
from foretoken.models.heads.eagle_kernels import NUM_COUNTERS, HeadWeights, run_head
from foretoken.models.kernels import pack, packed_shape, padded
from foretoken.models.pools import as_array
from foretoken.models.products import PANEL
from foretoken.models.state_rows import as_rows
from foretoken.models.threads import entry_point, run_together

_EMPTY = np.empty(0, np.float32)


class CompiledHead:
    """Runs an EAGLE head over ragged batches; states, outputs and logits are float32.

    Args:
        module: Its tensors; nothing of it is kept.
        dtype: Of its matrices: float32 or bfloat16.
        embedding: What rows read of a token, normalized if the head normalizes it, [V, D].
    """

    def __init__(self, module: EagleModule, dtype: torch.dtype, embedding: Tensor) -> None:
        sizes = module.design.sizes
        self._shape = Shape(
            hidden=sizes.hidden,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            rotary_half=sizes.head_dim // 2,
            intermediate=sizes.intermediate,
            vocab=len(module.head),
            epsilon=sizes.epsilon,
            scaling=sizes.head_dim**-0.5,
        )
        self._adds_normed = int(module.design.norm_before_residual)
        self._weights = _weights(module, dtype, embedding)
        self._rotary = RotaryTable(*sizes.frequencies())
        self._bytes: int = sum(array.nbytes for array in self._weights[1:])
        self._buffers: tuple[np.ndarray, ...] = ()
        self._num_buffered = 0
        self._run_head: Callable[..., None] | None = None  # for the types of these weights

    def run(self, batch: RaggedBatch, rows: Sequence[int], states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits wanted and the outputs of all rows; arguments as for `score`."""
        num_padded = padded(self._shape.vocab, PANEL)
        logits = np.empty((len(rows), num_padded), np.float32)
        outputs = np.empty((batch.num_rows, self._shape.hidden), np.float32)
        keys, values = batch.cache.flat_pools
        arguments = (
            self._shape,
            self._weights,
            self._adds_normed,
            batch.packed,
            as_rows(states),
            np.array(rows, np.int64),
            keys,
            values,
            self._rotary.upto(max(batch.num_keys)),
            self._room_for(batch.num_rows),
            logits.reshape(-1),
            outputs,
            np.zeros(NUM_COUNTERS, np.int64),
        )
        if self._run_head is None:
            self._run_head = entry_point(run_head, arguments)
        run_together(self._run_head, arguments, self._num_threads(batch.num_rows))
        return torch.from_numpy(logits[:, : self._shape.vocab]), torch.from_numpy(outputs)

    def _num_threads(self, num_rows: int) -> int:
        limit = torch.get_num_threads()
        return max(1, min(limit, self._bytes * max(1, num_rows // 8) // BYTES_PER_THREAD))

    def _room_for(self, num_rows: int) -> tuple[np.ndarray, ...]:
        """Return what the parts of the layer hand on, with room for so many rows."""
        if num_rows > self._num_buffered:
            shape, kind = self._shape, self._weights.head.dtype
            q_size = shape.heads * shape.head_dim
            qkv_size = padded(q_size + 2 * shape.kv_heads * shape.head_dim, PANEL)
            stream, inner = padded(shape.hidden, PANEL), padded(shape.intermediate)
            self._buffers = (
                np.zeros(num_rows * stream, np.float32),
                np.zeros(num_rows * qkv_size, np.float32),
                np.zeros(num_rows * q_size + 1, kind),
                np.zeros(num_rows * stream, np.float32),
                np.zeros(num_rows * 2 * inner, np.float32),
                np.zeros(num_rows * inner, kind),
            )
            self._num_buffered = num_rows
        return self._buffers


def _weights(module: EagleModule, dtype: torch.dtype, embedding: Tensor) -> HeadWeights:
    design, layer = module.design, module.layer
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    norms = {
        name: _vector(norm.weight)
        for name, norm in module.named_modules()
        if isinstance(norm, nn.RMSNorm)
    }
    gate, up = (_array(part.weight, dtype) for part in (mlp.gate_proj, mlp.up_proj))
    is_eagle3 = design.is_eagle3
    return HeadWeights(
        embedding=_array(embedding, dtype).reshape(-1),
        hidden_norm=norms.get("layer.hidden_norm", _EMPTY),
        fc=_array(module.fc.weight, dtype)[0, :0]
        if is_eagle3
        else _packed(module.fc.weight, dtype),
        fc_bias=_EMPTY if is_eagle3 else _bias([module.fc]),
        # EAGLE-3's is of the embedding.
        input_norm=_EMPTY if is_eagle3 else norms.get("layer.input_layernorm", _EMPTY),
        qkv=_packed(torch.cat([part.weight for part in projections]), dtype),
        qkv_bias=_bias(projections),
        q_norm=norms.get("layer.self_attn.q_norm", _EMPTY),
        k_norm=norms.get("layer.self_attn.k_norm", _EMPTY),
        output=_packed(attention.o_proj.weight, dtype),
        post_norm=norms["layer.post_attention_layernorm"],
        gate_up=_pack(alternated(gate, up)),
        down=_packed(mlp.down_proj.weight, dtype),
        final_norm=norms.get("norm", _EMPTY),
        head=_packed(module.head, dtype),
        windows=np.zeros(1, np.int64),
    )


def _array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return as_array(tensor.detach().to(dtype).contiguous())


def _vector(tensor: Tensor) -> np.ndarray:
    return _array(tensor, torch.float32)


def _packed(weight: Tensor, dtype: torch.dtype) -> np.ndarray:
    return _pack(_array(weight, dtype))


def _pack(matrix: np.ndarray) -> np.ndarray:
    packed = np.zeros(packed_shape(*matrix.shape), matrix.dtype)
    pack(matrix, packed)
    return packed.reshape(-1)


def _bias(parts: Sequence[nn.Linear]) -> np.ndarray:
    """Return the biases of layers that are applied together, padded; none if they have none."""
    if parts[0].bias is None:
        return _EMPTY
    bias = _vector(torch.cat([part.bias for part in parts]))
    return np.pad(bias, (0, padded(len(bias), PANEL) - len(bias)))
