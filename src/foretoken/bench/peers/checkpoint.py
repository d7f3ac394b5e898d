"""Read a Llama checkpoint of Hugging Face, to write it in another engine's format.

Only the plain shape is read: no biases, no scaled rotary embedding, SiLU. Everything else is
refused by name, because a peer that computes another function would be measured for nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open

from foretoken.errors import ConfigError, ModelError, VocabularyMismatchError

__all__ = ["LlamaCheckpoint", "LlamaShape", "check_pair"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The numbers of a Llama configuration that decide its function."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys of a `config.json`.

        Args:
            config: The parsed file.

        Returns:
            The shape.

        Raises:
            ConfigError: The configuration asks for something that is not written.
        """
        # transformers 5 writes `rope_parameters`; 4 wrote `rope_theta` and `rope_scaling`.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        found = {
            "model_type": (config.get("model_type"), "llama"),
            "rope_type": (rope_type, "default"),
            "hidden_act": (config.get("hidden_act", "silu"), "silu"),
            "attention_bias": (bool(config.get("attention_bias")), False),
            "mlp_bias": (bool(config.get("mlp_bias")), False),
        }
        for key, (value, wanted) in found.items():
            if value != wanted:
                raise ConfigError(
                    f"cannot convert a model with {key} {value!r} for another engine; "
                    f"convertible: {key} {wanted!r}",
                    hint="compare on a plain Llama model, or leave out --against",
                )
        num_heads = int(config["num_attention_heads"])
        hidden_size = int(config["hidden_size"])
        return cls(
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            tied=bool(config.get("tie_word_embeddings", False)),
        )


class LlamaCheckpoint:
    """A folder with `config.json` and safetensors, read tensor by tensor.

    Args:
        folder: The folder of the checkpoint.

    Raises:
        ConfigError: The model is not a plain Llama.
        ModelError: A file is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = folder / "config.json"
        if not config.is_file():
            raise ModelError(
                f"no config.json in {folder}",
                hint="name a folder with a downloaded model; a Hub id is not read here",
            )
        self.config: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        self.shape = LlamaShape.from_config(self.config)
        self._files = self._locate()

    def _locate(self) -> dict[str, Path]:
        """Map each tensor's name to its file."""
        index = self.folder / _INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        single = self.folder / _SINGLE
        if not single.is_file():
            raise ModelError(
                f"no {_SINGLE} and no {_INDEX} in {self.folder}",
                hint="save the model with safe_serialization, transformers' default",
            )
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor as it is stored.

        Args:
            name: The name in the state dictionary of transformers.

        Returns:
            The tensor, in the checkpoint's dtype.

        Raises:
            ModelError: The checkpoint has no such tensor.
        """
        if name not in self._files:
            raise ModelError(
                f"no tensor {name!r} in {self.folder}",
                hint="the checkpoint is incomplete; save or download it again",
            )
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor

    def digest(self) -> str:
        """Return a name for this content, by file names, sizes and times.

        Returns:
            Twelve hexadecimal digits; they change when a file of the checkpoint is replaced, so
            that a converted copy is not reused for another model of the same name.
        """
        files = [self.folder / "config.json", *sorted(set(self._files.values()))]
        stats = [(str(file.resolve()), file.stat()) for file in files]
        text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_pair(target: Path, draft: Path | None) -> None:
    """Refuse a draft model whose token ids are not the target's.

    Converted files carry no tokenizer, so that the engines cannot tell; one of them ends the
    process at an id outside its vocabulary.

    Args:
        target: Checkpoint of the target.
        draft: Checkpoint of the draft model, if there is one.

    Raises:
        VocabularyMismatchError: The vocabularies differ in size.
    """
    if draft is None:
        return
    sizes = [LlamaCheckpoint(folder).shape.vocab_size for folder in (target, draft)]
    if sizes[0] != sizes[1]:
        raise VocabularyMismatchError(f"draft {sizes[1]} ids, target {sizes[0]} ids")
