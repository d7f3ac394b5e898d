"""Write a Llama checkpoint as OpenVINO IR, with the KV cache as state of the model.

The graph repeats what a traced export of the transformers model contains, node pattern by node
pattern, because the runtime recognises these patterns and fuses them: RMS normalisation, rotary
embedding, attention with its cache (and, for GenAI, paged attention). It is built node by node
rather than traced, so that no exporter has to support the installed transformers.
"""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretoken.bench.peers.checkpoint import LlamaCheckpoint

__all__ = ["export_openvino"]

_FORMAT = 1  # part of the folder's name; raise it when the graph changes
_MODEL_FILE = "openvino_model.xml"  # the names that GenAI looks for
_TOKENIZER_FILE = "openvino_tokenizer.xml"
# Far below any score, and finite in every dtype: the least float32 is infinite in bfloat16.
_HIDDEN = -65504.0


def export_openvino(folder: Path, dtype: str, work_dir: Path) -> Path:
    """Write the checkpoint as a folder that GenAI loads, or find the one written before.

    Configuration files are left out: they hold ends of sequences and sampling defaults, and each
    request states its own.

    Args:
        folder: The Hugging Face checkpoint.
        dtype: The stored weights' dtype, "float32" or "bfloat16".
        work_dir: Where the folder goes.

    Returns:
        The folder.

    Raises:
        ConfigError: The model is not a plain Llama.
        ModelError: The checkpoint lacks a file or a tensor.
    """
    checkpoint = LlamaCheckpoint(folder)
    target = work_dir / f"{folder.name}-{dtype}-{checkpoint.digest()}-openvino{_FORMAT}"
    if target.exists():
        return target
    ov = importlib.import_module("openvino")
    ops = importlib.import_module("openvino.opset13")
    # A half-written folder must not be found by the next run.
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = _Builder(ov, ops, checkpoint, dtype).build()
    ov.save_model(model, str(partial / _MODEL_FILE), compress_to_fp16=False)
    ov.save_model(_tokenizer(ov, ops), str(partial / _TOKENIZER_FILE))
    partial.rename(target)
    return target


def _tokenizer(ov: Any, ops: Any) -> Any:
    """Return a model that encodes each text as one zero.

    GenAI encodes a probe with target and draft before it accepts the pair. The benchmark hands
    token ids over, so that nothing else is ever encoded.
    """
    texts = ops.parameter([-1], ov.Type.string, name="texts")
    shape = ops.concat([ops.shape_of(texts, "i64"), ops.constant(np.array([1], np.int64))], 0)
    outputs = []
    for name, value in (("input_ids", 0), ("attention_mask", 1)):
        filled = ops.broadcast(ops.constant(np.int64(value)), shape)
        filled.output(0).tensor.set_names({name})
        outputs.append(ops.result(filled))
    return ov.Model(outputs, [texts], "tokenizer")


@dataclass(slots=True)
class _Inputs:
    """The graph's parameters and what all layers derive from them."""

    batch: Any  # shape (1,)
    beam_idx: Any
    mask: Any  # additive, (batch, 1, rows, positions)
    cos: Any  # (batch, 1, rows, head_dim)
    sin: Any


class _Builder:
    """Builds one model; `ov` and `ops` are OpenVINO's modules."""

    def __init__(self, ov: Any, ops: Any, checkpoint: LlamaCheckpoint, dtype: str) -> None:
        self._ov = ov
        self._ops = ops
        self._checkpoint = checkpoint
        self._shape = checkpoint.shape
        self._dtype = dtype
        self._sinks: list[Any] = []

    def build(self) -> Any:
        """Return the model: input_ids, attention_mask, position_ids, beam_idx -> logits."""
        ops, ov = self._ops, self._ov
        names = ("input_ids", "attention_mask", "position_ids")
        parameters = [ops.parameter([-1, -1], ov.Type.i64, name=name) for name in names]
        parameters.append(ops.parameter([-1], ov.Type.i32, name="beam_idx"))
        for parameter, name in zip(parameters, (*names, "beam_idx"), strict=True):
            parameter.output(0).tensor.set_names({name})
        input_ids = parameters[0]
        shared = self._shared(*parameters)
        embedding = self._matrix("model.embed_tokens.weight")
        hidden = ops.gather(embedding, input_ids, self._ints(0))
        for layer in range(self._shape.num_layers):
            hidden = self._layer(hidden, layer, shared)
        hidden = self._norm(hidden, "model.norm.weight")
        head = embedding if self._shape.tied else self._matrix("lm_head.weight")
        logits = ops.matmul(hidden, head, False, True)
        logits.output(0).tensor.set_names({"logits"})
        return ov.Model([ops.result(logits)], self._sinks, parameters, "llama")

    def _shared(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, beam_idx: Any
    ) -> _Inputs:
        ops = self._ops
        shape = ops.shape_of(input_ids, "i64")
        cos, sin = self._rotation(position_ids)
        return _Inputs(
            batch=ops.gather(shape, self._ints([0]), self._ints(0)),
            beam_idx=beam_idx,
            mask=self._causal_mask(attention_mask, ops.gather(shape, self._ints(1), self._ints(0))),
            cos=cos,
            sin=sin,
        )

    def _causal_mask(self, attention_mask: Any, num_rows: Any) -> Any:
        ops = self._ops
        total = ops.gather(ops.shape_of(attention_mask, "i64"), self._ints(1), self._ints(0))
        columns = ops.range(self._ints(0), total, self._ints(1), "i64")
        first_row = ops.subtract(total, num_rows)
        rows = ops.unsqueeze(ops.range(first_row, total, self._ints(1), "i64"), self._ints(1))
        causal = ops.less_equal(columns, rows)
        present = ops.unsqueeze(ops.convert(attention_mask, "boolean"), self._ints([1, 2]))
        allowed = ops.logical_and(present, causal)
        return ops.select(allowed, self._float(0.0), self._float(_HIDDEN))

    def _rotation(self, position_ids: Any) -> tuple[Any, Any]:
        ops, shape = self._ops, self._shape
        exponents = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
        frequencies = (shape.rope_theta**-exponents).astype(np.float32)
        positions = ops.convert(ops.unsqueeze(position_ids, self._ints(1)), "f32")
        angles = ops.matmul(ops.constant(frequencies[None, :, None]), positions, False, False)
        angles = ops.transpose(angles, self._ints([0, 2, 1]))
        angles = ops.concat([angles, angles], -1)
        cos = ops.unsqueeze(ops.cos(angles), self._ints(1))
        sin = ops.unsqueeze(ops.sin(angles), self._ints(1))
        return cos, sin

    def _layer(self, hidden: Any, layer: int, shared: _Inputs) -> Any:
        ops = self._ops
        prefix = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{prefix}.input_layernorm.weight")
        hidden = ops.add(hidden, self._attention(normed, layer, shared))
        normed = self._norm(hidden, f"{prefix}.post_attention_layernorm.weight")
        gate = ops.swish(self._linear(normed, f"{prefix}.mlp.gate_proj.weight"))
        gated = ops.multiply(gate, self._linear(normed, f"{prefix}.mlp.up_proj.weight"))
        return ops.add(hidden, self._linear(gated, f"{prefix}.mlp.down_proj.weight"))

    def _attention(self, normed: Any, layer: int, shared: _Inputs) -> Any:
        ops, shape = self._ops, self._shape
        prefix = f"model.layers.{layer}.self_attn"

        def heads(name: str, count: int) -> Any:
            rows = self._linear(normed, f"{prefix}.{name}.weight")
            split = ops.reshape(rows, self._ints([0, 0, count, shape.head_dim]), True)
            return ops.transpose(split, self._ints([0, 2, 1, 3]))

        query = self._rotate(heads("q_proj", shape.num_heads), shared)
        key = self._rotate(heads("k_proj", shape.num_kv_heads), shared)
        value = heads("v_proj", shape.num_kv_heads)
        keys = self._repeat(self._cached(key, f"past_key_values.{layer}.key", shared))
        values = self._repeat(self._cached(value, f"past_key_values.{layer}.value", shared))
        mixed = ops.scaled_dot_product_attention(query, keys, values, shared.mask)
        mixed = ops.transpose(mixed, self._ints([0, 2, 1, 3]))
        merged = self._ints([0, 0, shape.num_heads * shape.head_dim])
        return self._linear(ops.reshape(mixed, merged, True), f"{prefix}.o_proj.weight")

    def _rotate(self, heads: Any, shared: _Inputs) -> Any:
        ops, half = self._ops, self._shape.head_dim // 2
        step, axis = self._ints([1]), self._ints([3])
        end = self._ints([np.iinfo(np.int64).max])
        first = ops.slice(heads, self._ints([0]), self._ints([half]), step, axis)
        second = ops.slice(heads, self._ints([half]), end, step, axis)
        turned = ops.concat([ops.multiply(second, self._float([[[[-1.0]]]])), first], -1)
        return ops.add(ops.multiply(heads, shared.cos), ops.multiply(turned, shared.sin))

    def _cached(self, fresh: Any, name: str, shared: _Inputs) -> Any:
        """Return the state of this name with the fresh rows after it, which becomes the state."""
        ops, shape = self._ops, self._shape
        dims = [self._ints([shape.num_kv_heads]), self._ints([0]), self._ints([shape.head_dim])]
        empty = ops.broadcast(self._float(0.0), ops.concat([shared.batch, *dims], 0))
        known = [-1, shape.num_kv_heads, -1, shape.head_dim]
        state = ops.read_value(empty, name, self._ov.Type.f32, known)
        past = ops.gather(state, shared.beam_idx, self._ints(0))
        joined = ops.concat([past, fresh], 2)
        self._sinks.append(ops.assign(joined, name))
        return joined

    def _repeat(self, heads: Any) -> Any:
        """Give each group of query heads its own copy of the key or value head."""
        ops, shape = self._ops, self._shape
        repeats = shape.num_heads // shape.num_kv_heads
        if repeats == 1:
            return heads
        dims = ops.shape_of(heads, "i64")
        ends = [ops.gather(dims, self._ints(part), self._ints(0)) for part in ([0, 1], [2, 3])]
        wide = ops.concat([ends[0], self._ints([repeats]), ends[1]], 0)
        copies = ops.broadcast(ops.unsqueeze(heads, self._ints(2)), wide, "BIDIRECTIONAL")
        return ops.reshape(copies, self._ints([0, shape.num_heads, -1, shape.head_dim]), True)

    def _norm(self, hidden: Any, name: str) -> Any:
        ops = self._ops
        squares = ops.power(hidden, self._float([[[2.0]]]))
        mean = ops.reduce_mean(squares, self._ints([-1]), True)
        root = ops.sqrt(ops.add(mean, self._float([[[self._shape.norm_eps]]])))
        scaled = ops.multiply(hidden, ops.divide(self._float([[[1.0]]]), root))
        weight = self._checkpoint.tensor(name)
        if self._dtype == "bfloat16":
            weight = weight.to(torch.bfloat16)
        return ops.multiply(self._float(weight.float().numpy()[None, None]), scaled)

    def _linear(self, rows: Any, name: str) -> Any:
        return self._ops.matmul(rows, self._matrix(name), False, True)

    def _matrix(self, name: str) -> Any:
        ops, ov = self._ops, self._ov
        matrix = self._checkpoint.tensor(name)
        if self._dtype == "float32":
            return ops.constant(matrix.float().contiguous().numpy())
        # numpy has no bfloat16: the bytes are written into a tensor that has the type.
        content = matrix.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        stored = ov.Tensor(ov.Type.bf16, ov.Shape(list(content.shape)))
        stored.data.view(np.int16)[:] = content
        widened = ops.convert(ops.constant(stored), "f32")
        # Marks the conversion as one that the compiler folds into the multiplication.
        widened.get_rt_info()["decompression_0"] = ""
        return widened

    def _ints(self, values: Any) -> Any:
        return self._ops.constant(np.asarray(values, dtype=np.int64))

    def _float(self, values: Any) -> Any:
        return self._ops.constant(np.asarray(values, dtype=np.float32))
