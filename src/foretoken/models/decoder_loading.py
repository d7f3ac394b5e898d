"""From a checkpoint's files to a compiled decoder, a layer at a time and without a second copy."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from foretoken.errors import ModelError
from foretoken.models.decoder import CompiledDecoder, RotaryTable
from foretoken.models.decoder_kernels import Shape, Weights
from foretoken.models.kernels import LANES, is_finite, pack, packed_shape, padded
from foretoken.models.loops import LoopShape
from foretoken.models.pools import LayerShape, as_array
from foretoken.models.products import PANEL

DTYPES = (torch.float32, torch.bfloat16)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def has_safetensors(directory: Path) -> bool:
    """Whether the directory holds a checkpoint that `load_decoder` reads."""
    return (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()


def count_parameters(directory: Path) -> int:
    """Return how many numbers the checkpoint holds, from its headers alone."""
    total = 0
    for file in set(_files(directory).values()):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                total += math.prod(tensors.get_slice(name).get_shape())
    return total


class TensorSource(Protocol):
    """Where a model's tensors come from.

    Attributes:
        name: What it is, for messages.
    """

    name: str

    def __contains__(self, name: object) -> bool: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors that it has, with their names, in any order."""
        ...


class TensorFiles:
    """The tensors of a checkpoint.

    Files are opened anew for every reading: a mapped file's pages count as this process's memory
    until it is closed.

    Args:
        directory: Where the safetensors files are.
    """

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self._file_of = _files(directory)

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._file_of

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors file by file."""
        for file in sorted({self._file_of[name] for name in names}):
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    if self._file_of[name] == file:
                        yield name, tensors.get_tensor(name)


class HeldTensors:
    """Tensors that are in memory; what is made of them may share it.

    Args:
        name: What they are, for messages.
        tensors: By their names in a checkpoint.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors as they are asked for."""
        for name in names:
            yield name, self._tensors[name].detach()


def load_decoder(
    source: TensorSource, config: Any, dtype: torch.dtype
) -> tuple[CompiledDecoder, tuple[LayerShape, ...], int]:
    """Read a checkpoint into a compiled decoder.

    Args:
        source: Its tensors.
        config: One for which `is_plain_decoder` holds.
        dtype: Of the matrices and of the KV cache, one of `DTYPES`.

    Returns:
        The decoder, what its layers store per position, and its number of parameters.

    Raises:
        ModelError: Tensors are missing, have the wrong shape or hold numbers that are not finite.
    """
    reader = _Reader(source, dtype)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = Shape(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_half=_rotary_dim(config, head_dim) // 2,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        epsilon=config.rms_norm_eps,
        scaling=head_dim**-0.5,
    )
    weights = _read_weights(reader, config, shape)
    rotary = RotaryTable(*rotary_frequencies(config, head_dim))
    layers = (LayerShape(kv_heads, head_dim, head_dim),) * config.num_hidden_layers
    decoder = CompiledDecoder(shape, weights, rotary, LoopShape.of(config))
    return decoder, layers, reader.num_parameters


class _Reader:
    """Reads tensors by name and checks them."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self.num_parameters = 0

    def read(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Return tensors as float32, or bfloat16 as uint16; vectors always as float32."""
        missing = sorted(name for name in shapes if name not in self._source)
        if missing:
            raise ModelError(
                f"the weights of {self._source.name!r} lack {len(missing)} tensors, the first "
                f"is {missing[0]!r}",
                hint="check that config.json and the weights are of one model, and complete",
            )
        return {
            name: self._checked(name, tensor, shapes[name])
            for name, tensor in self._source.read(shapes)
        }

    def _checked(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        where = f"the tensor {name!r} of {self._source.name!r}"
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{where} has the mismatched shape {tuple(tensor.shape)}; "
                f"the configuration says {shape}",
                hint="check that config.json and the weights are of one model",
            )
        tensor = tensor.to(self._dtype if tensor.dim() > 1 else torch.float32)
        self.num_parameters += tensor.numel()
        array = as_array(tensor.contiguous())
        if not is_finite(array):
            raise ModelError(
                f"{where} holds NaN or infinite numbers",
                hint="the checkpoint is broken; fetch or train it again, or try dtype=float32",
            )
        return array


def _files(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    single = directory / SINGLE_FILE
    if single.is_file():
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    return {name: directory / file for name, file in index["weight_map"].items()}


def _read_weights(reader: _Reader, config: Any, shape: Shape) -> Weights:
    hidden, head_dim, inner = shape.hidden, shape.head_dim, shape.intermediate
    q_size, kv_size = shape.heads * head_dim, shape.kv_heads * head_dim
    top = {"model.embed_tokens.weight": (shape.vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        top["lm_head.weight"] = (shape.vocab, hidden)
    found = reader.read(top)
    embedding = found["model.embed_tokens.weight"]
    head = np.zeros(packed_shape(shape.vocab, hidden), embedding.dtype)
    pack(found.get("lm_head.weight", embedding), head)

    parts = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.model_type == "qwen2":
        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        parts |= {f"self_attn.{x}_proj.bias": (size,) for x, size in sizes.items()}
    if config.model_type == "qwen3":
        parts |= {f"self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
    windows = _windows(config)
    stacks = _Stacks(len(windows), embedding.dtype)
    for layer in range(len(windows)):
        prefix = f"model.layers.{layer}."
        read = reader.read({prefix + name: size for name, size in parts.items()})
        stacks.fill(layer, {name: read[prefix + name] for name in parts})
    return Weights(
        embedding=embedding.reshape(-1),
        final_norm=found["model.norm.weight"],
        head=head.reshape(-1),
        windows=np.array(windows),
        **stacks.flat(),
    )


class _Stacks:
    """The parameters of all layers, those of one kind in one array.

    Args:
        num_layers: How many there are.
        kind: Type of the matrices.
    """

    def __init__(self, num_layers: int, kind: np.dtype) -> None:
        self._num_layers = num_layers
        self._kind = kind
        names = [
            "input_norm",
            "qkv",
            "qkv_bias",
            "q_norm",
            "k_norm",
            "output",
            "post_norm",
            "gate_up",
            "down",
        ]
        self._arrays = {name: np.zeros(0, np.float32) for name in names}

    def fill(self, layer: int, parts: dict[str, np.ndarray]) -> None:
        """Take one layer's tensors."""
        qkv = np.concatenate([parts[f"self_attn.{x}_proj.weight"] for x in "qkv"])
        self._pack("qkv", layer, qkv)
        self._pack("output", layer, parts["self_attn.o_proj.weight"])
        gate_up = alternated(parts["mlp.gate_proj.weight"], parts["mlp.up_proj.weight"])
        self._pack("gate_up", layer, gate_up)
        self._pack("down", layer, parts["mlp.down_proj.weight"])
        self._put("input_norm", layer, parts["input_layernorm.weight"])
        self._put("post_norm", layer, parts["post_attention_layernorm.weight"])
        if "self_attn.q_proj.bias" in parts:
            bias = np.zeros(packed_shape(*qkv.shape)[0] * PANEL, np.float32)
            bias[: len(qkv)] = np.concatenate([parts[f"self_attn.{x}_proj.bias"] for x in "qkv"])
            self._put("qkv_bias", layer, bias)
        for name in ("q_norm", "k_norm"):
            if f"self_attn.{name}.weight" in parts:
                self._put(name, layer, parts[f"self_attn.{name}.weight"])

    def flat(self) -> dict[str, np.ndarray]:
        """Return each stack as a flat array."""
        return {name: array.reshape(-1) for name, array in self._arrays.items()}

    def _pack(self, name: str, layer: int, matrix: np.ndarray) -> None:
        pack(matrix, self._stack(name, packed_shape(*matrix.shape), self._kind)[layer])

    def _put(self, name: str, layer: int, vector: np.ndarray) -> None:
        self._stack(name, vector.shape, np.dtype(np.float32))[layer] = vector

    def _stack(self, name: str, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
        if not len(self._arrays[name]):
            self._arrays[name] = np.zeros((self._num_layers, *shape), kind)
        return self._arrays[name]


def alternated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return sixteen rows of one, sixteen of the other, and so on, both filled up with zeros."""
    num_rows = padded(len(gate))
    both = np.zeros((num_rows // LANES, 2, LANES, gate.shape[1]), gate.dtype)
    for index, matrix in enumerate((gate, up)):
        num_full = len(matrix) // LANES
        both[:num_full, index] = matrix[: num_full * LANES].reshape(num_full, LANES, gate.shape[1])
        if len(matrix) % LANES:
            both[num_full, index, : len(matrix) % LANES] = matrix[num_full * LANES :]
    return both.reshape(2 * num_rows, -1)


def _windows(config: Any) -> list[int]:
    """Return for each stored layer the positions that a row sees, itself included; 0 for all."""
    if loops := LoopShape.of(config):
        return [0] * loops.num_stored
    window = getattr(config, "sliding_window", None) or 0
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _rotary_dim(config: Any, head_dim: int) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def rotary_frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Return the rotary frequencies, [rotary_dim / 2], and the factor of cosines and sines."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies, float(factor)
    dim = _rotary_dim(config, head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (rope.get("rope_theta", 10_000.0) ** exponents), 1.0
