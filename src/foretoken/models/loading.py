"""Loading models from a directory or the hub, with checks that come before the weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from foretoken.core.verdict import Exactness
from foretoken.errors import ConfigError, ForetokenError, ModelError
from foretoken.models.adapter import LanguageModel, ModelInfo
from foretoken.models.decoder_config import is_plain_decoder, read_plain_config
from foretoken.models.decoder_loading import DTYPES as COMPILED_DTYPES
from foretoken.models.decoder_loading import (
    TensorFiles,
    count_parameters,
    has_safetensors,
    load_decoder,
)
from foretoken.models.draft_vocabulary import DraftVocabulary, ReducedModel
from foretoken.models.files import SMALL_ON_CPU, context_limit, unreadable
from foretoken.models.loops import LoopShape

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(path: str, *, dtype: str = "auto", device: str = "auto") -> LanguageModel:
    """Load a causal language model, ready to score token trees.

    A draft model with a vocabulary of its own beside its weights speaks the target's tokens.

    Args:
        path: A directory written by `save_pretrained`, or a hub id.
        dtype: A name in `DTYPES`, or "auto": the checkpoint's own, except that models under 50
            million parameters run in float32 on CPU.
        device: A torch device, or "auto": CUDA where there is one, else CPU.

    Raises:
        ConfigError: dtype or device is not one that exists here.
        ModelError: The files are missing, broken or no causal language model.
        UnsupportedModelError: The architecture cannot be verified in one pass.
    """
    torch_device = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(
            f"dtype is auto or one of {', '.join(DTYPES)}; got {dtype!r}", hint="change dtype"
        )
    model = _load(path, dtype, torch_device)
    vocabulary = DraftVocabulary.load(path)
    return model if vocabulary is None else ReducedModel(model, vocabulary)


def _load(path: str, dtype: str, torch_device: torch.device) -> LanguageModel:
    """Load a model that speaks the tokens of its own configuration."""
    config = read_plain_config(path) or load_config(path)
    if torch_device.type == "cpu" and is_plain_decoder(config):
        try:
            model = _load_compiled(path, config, dtype)
        except ForetokenError:
            raise
        except Exception as error:  # what safetensors and the hub raise has no common base
            raise unreadable(path, error) from error
        if model is not None:
            return model
    # Importing transformers' modules takes seconds, which plain decoders do without.
    from foretoken.models.modules import load_through_modules

    config = load_config(path) if isinstance(config, SimpleNamespace) else config
    return load_through_modules(path, config, dtype=DTYPES.get(dtype), device=torch_device)


def _load_compiled(path: str, config: Any, wanted: str) -> LanguageModel | None:
    """Load a plain decoder; None if its files or the dtype ask for transformers' modules."""
    directory = local_directory(path)
    dtype = _compiled_dtype(directory, config, wanted)
    if dtype is None:
        return None
    decoder, kv_layers, num_parameters = load_decoder(TensorFiles(directory), config, dtype)
    info = ModelInfo(
        name=path,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=len(kv_layers),
        context_limit=context_limit(config),
        eos_ids=_eos_ids(directory, config),
        num_parameters=num_parameters,
        dtype=dtype,
        device=torch.device("cpu"),
        kv_layers=kv_layers,
        exactness=Exactness.BITWISE,
        loops=LoopShape.of(config),
    )
    return LanguageModel(info, decoder)


def _compiled_dtype(directory: Path, config: Any, dtype: str) -> torch.dtype | None:
    """Return the dtype in which to compile a plain decoder; None if it cannot be."""
    if not has_safetensors(directory):
        return None
    if dtype != "auto":
        return DTYPES[dtype] if DTYPES[dtype] in COMPILED_DTYPES else None
    if count_parameters(directory) < SMALL_ON_CPU:
        return torch.float32
    return config.dtype if config.dtype in COMPILED_DTYPES else None


def local_directory(path: str) -> Path:
    """Return where a model's files are, fetched first if it is a hub id."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


def _eos_ids(directory: Path, config: Any) -> frozenset[int]:
    """Return the ids that end a sequence; the generation config knows more than the model's."""
    generation = directory / "generation_config.json"
    eos = None
    if generation.is_file():
        eos = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
    eos = config.eos_token_id if eos is None else eos
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def resolve_device(device: str) -> torch.device:
    """Return the torch device that a name stands for.

    Raises:
        ConfigError: There is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"device {device!r} cannot be used: {reason}", hint="try auto or cpu"
        ) from error
    return resolved


def load_config(path: str) -> Any:
    """Read a model's configuration.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    directory = Path(path).expanduser()
    looks_local = path.startswith(("/", ".", "~")) or directory.exists()
    if looks_local and not directory.is_dir():
        found = "is a file, not a directory" if directory.exists() else "does not exist"
        raise ModelError(f"model directory {path!r} {found}", hint="check the path")
    if looks_local and not (directory / "config.json").is_file():
        raise ModelError(
            f"{path!r} has no config.json, so it is not a transformers model directory",
            hint="give a directory written by save_pretrained",
        )
    source = str(directory) if looks_local else path
    from transformers import AutoConfig

    from foretoken.models.looped import register

    register()
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what transformers and the hub raise has no common base
        raise unreadable(path, error) from error
