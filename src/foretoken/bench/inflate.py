"""Widening a small Llama to a real model's cost without changing what it says: sizes and files.

A looped Llama is widened layer by stored layer and keeps its loops.

How, and why it stays the same function, is told in `widen`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretoken.bench.widen import Sizes, fewest_kv_heads, fits, widen
from foretoken.core.options import ComponentSpec, build_options
from foretoken.errors import ConfigError, ModelError
from foretoken.models.loops import MODEL_TYPE as LOOPED

RECIPE = 1  # part of the folder's name: a change of the recipe makes new files
MODEL_TYPES = ("llama", "mistral", LOOPED)
ROPE_TYPES = ("default", "linear", "llama3")  # those that treat each frequency by itself
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of a widened model; None is chosen to match the rest.

    Args:
        hidden: Hidden size; at least the small model's.
        layers: At least the small model's; None keeps its number. Not for looped models, whose
            layers and loops stay as they are.
        head_dim: A multiple of the small model's; None keeps it.
        heads: Query heads; None is hidden / head_dim.
        kv_heads: Key and value heads; None is as few as the small model allows.
        intermediate: Neurons of the feed-forward part; None keeps the ratio to the hidden size.
        noise: Standard deviation of output weights of added layers, in rows that nothing reads
            but the norms' mean square; 0 leaves them zero, which some engines store once.
    """

    hidden: int
    layers: int | None = None
    head_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None
    noise: float = 1e-5

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `hidden=1536,layers=20,head_dim=64`.

        Raises:
            ConfigError: A key or value is not allowed.
        """
        try:
            return build_options(cls, ComponentSpec.parse(f"inflate:{text}"))
        except ConfigError as error:
            keys = ", ".join(item.name for item in fields(cls))
            raise ConfigError(
                f"--inflate {text!r}: {error}",
                hint=f"write it as hidden=1536,layers=20,head_dim=64; the keys are {keys}",
            ) from error


def inflate(source: Path, shape: Shape, *, dtype: str, folder: Path) -> Path:
    """Write the widened model into a subfolder and return it; one made earlier is returned.

    Args:
        source: Transformers directory of a small Llama.
        shape: What to make of it.
        dtype: Of the weights written.
        folder: Created if missing.

    Raises:
        ConfigError: The shape cannot be made from this model, or the dtype is another.
        ModelError: The model is none that can be widened.
    """
    if dtype not in DTYPES:
        raise ConfigError(
            f"--inflate writes {', '.join(DTYPES)}; got dtype {dtype!r}",
            hint="give --dtype float32 or --dtype bfloat16",
        )
    config = _read_config(source)
    small = Sizes.of(config)
    big = resolve_sizes(small, shape)
    if config["model_type"] == LOOPED and shape.layers is not None:
        raise ConfigError(
            f"{source.name} runs its layers in loops, which stay as they are; got "
            f"layers={shape.layers}",
            hint="leave layers out of --inflate",
        )
    name = f"{source.name}-{big.hidden}x{big.layers}-{dtype}-{_digest(source, shape, dtype)}"
    target = folder / name
    if (target / "config.json").is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Made aside and moved when whole: an interrupted run leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        made = Path(draft) / "model"
        made.mkdir()
        _copy_tokenizer(source, made)
        weights = widen(_load_weights(source), small, big, noise=shape.noise, dtype=DTYPES[dtype])
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_big_config(config, small, big, dtype), indent=2)
        (made / "config.json").write_text(text + "\n", encoding="utf-8")
        try:
            made.rename(target)
        except OSError:  # another run was faster; what it made is the same
            if not (target / "config.json").is_file():
                raise
    return target


def cache_folder() -> Path:
    """Return where widened and converted models are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "foretoken" / "bench"


def resolve_sizes(small: Sizes, shape: Shape) -> Sizes:
    """Return the sizes that a shape means for a model.

    Raises:
        ConfigError: They cannot be made from it; the message says what can.
    """
    head_dim = shape.head_dim or small.head_dim
    heads = shape.heads or shape.hidden // head_dim
    big = Sizes(
        hidden=shape.hidden,
        layers=shape.layers or small.layers,
        head_dim=head_dim,
        heads=heads,
        kv_heads=shape.kv_heads or fewest_kv_heads(small, heads),
        intermediate=shape.intermediate or small.intermediate * shape.hidden // small.hidden,
    )
    multiple = small.head_dim
    _require(head_dim % multiple == 0, "head_dim", head_dim, f"a multiple of {multiple}")
    for name in ("hidden", "layers", "heads", "intermediate"):
        value, least = getattr(big, name), getattr(small, name)
        _require(value >= least, name, value, f"at least {least}")
    # Not needed by the arithmetic, but transformers refuses configurations without it.
    _require(shape.hidden % heads == 0, "heads", heads, f"a divisor of hidden={shape.hidden}")
    allowed = [
        count for count in range(1, heads + 1) if heads % count == 0 and fits(small, heads, count)
    ]
    listed = f"for heads={heads} one of " + (", ".join(map(str, allowed)) or "none")
    _require(big.kv_heads in allowed, "kv_heads", big.kv_heads, listed)
    _require(shape.noise >= 0, "noise", shape.noise, "at least 0")
    return big


def _require(is_met: bool, name: str, value: float, allowed: str) -> None:
    if not is_met:
        raise ConfigError(
            f"this model cannot be widened to {name}={value}; it has to be {allowed}",
            hint=f"change {name} in --inflate",
        )


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{str(source)!r} has no config.json that can be read, so it cannot be widened",
            hint="--inflate takes a local directory written by save_pretrained, or stories",
        ) from error
    rope = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type")
    has_bias = config.get("attention_bias") or config.get("mlp_bias")
    problem = None
    if config.get("model_type") not in MODEL_TYPES:
        problem = f"is of type {config.get('model_type')!r}, not {' or '.join(MODEL_TYPES)}"
    elif rope not in (None, *ROPE_TYPES):
        problem = f"has rotary positions of type {rope!r}, not {', '.join(ROPE_TYPES)}"
    elif has_bias:
        problem = "has biases in its linear layers"
    if problem:
        raise ModelError(
            f"{source.name} {problem}, so it cannot be widened",
            hint="choose another small model, or leave --inflate out",
        )
    return config


def _big_config(config: Mapping[str, Any], small: Sizes, big: Sizes, dtype: str) -> dict[str, Any]:
    epsilon = config.get("rms_norm_eps", 1e-6) * small.hidden / big.hidden
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    sizes = big.as_config()
    if config["model_type"] == LOOPED:  # then it counts each layer as often as it runs
        sizes["num_hidden_layers"] = config["num_hidden_layers"]
    return {**kept, **sizes, "rms_norm_eps": epsilon, "dtype": dtype}


def _load_weights(source: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        weights |= load_file(path)
    if "model.embed_tokens.weight" not in weights:
        raise ModelError(
            f"{source.name} has no safetensors weights of a Llama, so it cannot be widened",
            hint="check the directory",
        )
    return weights


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what is beside weights and configuration; the vocabulary is the same."""
    for path in source.iterdir():
        if path.suffix in (".json", ".model", ".txt") and path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    (target / "model.safetensors.index.json").unlink(missing_ok=True)


def _digest(source: Path, shape: Shape, dtype: str) -> str:
    """Return a text that is another one when anything about the result could be."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(source.glob("*.safetensors"))
    ]
    what = [RECIPE, str(source.resolve()), files, asdict(shape), dtype]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]


__all__ = ["Shape", "cache_folder", "inflate", "resolve_sizes"]
