"""Write a Llama checkpoint as GGUF, the file format of llama.cpp.

The file has no tokenizer: a benchmark hands token ids over, so that every engine decodes the same
prompt. Names and the row order of the query and key projections are those of llama.cpp's own
converter.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from foretoken.bench.peers.base import missing_package
from foretoken.bench.peers.checkpoint import LlamaCheckpoint, LlamaShape

__all__ = ["export_gguf"]

_FORMAT = 1  # part of the file's name; raise it when what is written changes

_LAYER_MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def export_gguf(folder: Path, dtype: str, work_dir: Path) -> Path:
    """Write the checkpoint as one GGUF file, or find the one written before.

    Args:
        folder: The Hugging Face checkpoint.
        dtype: The matrices' dtype, "float32" or "bfloat16"; norms are float32 in both.
        work_dir: Where the file goes.

    Returns:
        The file.

    Raises:
        ConfigError: The package `gguf` is missing, or the model is not a plain Llama.
        ModelError: The checkpoint lacks a file or a tensor.
    """
    checkpoint = LlamaCheckpoint(folder)
    path = work_dir / f"{folder.name}-{dtype}-{checkpoint.digest()}-{_FORMAT}.gguf"
    if path.exists():
        return path
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise missing_package("llama.cpp", "gguf") from error
    work_dir.mkdir(parents=True, exist_ok=True)
    # A half-written file must not be found by the next run.
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_metadata(writer, checkpoint.shape, folder.name, gguf, dtype)
    _add_tensors(writer, checkpoint, gguf, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return path


def _add_metadata(writer: Any, shape: LlamaShape, name: str, gguf: Any, dtype: str) -> None:
    file_types = {"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}
    writer.add_name(name)
    writer.add_file_type(file_types[dtype])
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _add_tensors(writer: Any, checkpoint: LlamaCheckpoint, gguf: Any, dtype: str) -> None:
    shape = checkpoint.shape

    def add_matrix(name: str, matrix: torch.Tensor) -> None:
        if dtype == "float32":
            writer.add_tensor(name, matrix.float().contiguous().numpy())
            return
        # numpy has no bfloat16: the writer takes its bytes.
        content = matrix.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, content, raw_dtype=gguf.GGMLQuantizationType.BF16)

    def add_norm(name: str, vector: torch.Tensor) -> None:
        # llama.cpp multiplies norms in float32 whatever the model's dtype. Rounding them first
        # gives the weights that the other engines compute with.
        rounded = vector.to(torch.bfloat16) if dtype == "bfloat16" else vector
        writer.add_tensor(name, rounded.float().contiguous().numpy())

    add_matrix("token_embd.weight", checkpoint.tensor("model.embed_tokens.weight"))
    add_norm("output_norm.weight", checkpoint.tensor("model.norm.weight"))
    if not shape.tied:
        add_matrix("output.weight", checkpoint.tensor("lm_head.weight"))
    for layer in range(shape.num_layers):
        source, target = f"model.layers.{layer}", f"blk.{layer}"
        for hf_name, gguf_name in _LAYER_MATRICES.items():
            matrix = checkpoint.tensor(f"{source}.{hf_name}.weight")
            if gguf_name == "attn_q":
                matrix = _interleave_halves(matrix, shape.num_heads)
            elif gguf_name == "attn_k":
                matrix = _interleave_halves(matrix, shape.num_kv_heads)
            add_matrix(f"{target}.{gguf_name}.weight", matrix)
        for hf_name, gguf_name in _LAYER_NORMS.items():
            add_norm(
                f"{target}.{gguf_name}.weight", checkpoint.tensor(f"{source}.{hf_name}.weight")
            )


def _interleave_halves(matrix: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows: transformers rotates row i with i + d/2, llama.cpp row 2i with 2i + 1."""
    halves = matrix.reshape(num_heads, 2, -1, matrix.shape[-1])
    return halves.transpose(1, 2).reshape(matrix.shape)
