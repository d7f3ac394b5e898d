"""Loading models from a directory or the hub, with checks that come before the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from foretoken.errors import ConfigError, ModelError, UnsupportedModelError
from foretoken.models.adapter import LanguageModel
from foretoken.models.attention import DECODER_HINT, IMPLEMENTATION

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Below this many parameters a CPU pass is bound by operator overhead, not by reading weights,
# and float32 operators are the fast ones.
SMALL_ON_CPU = 50_000_000
DEFAULT_CONTEXT_LIMIT = 32_768
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def load_model(path: str, *, dtype: str = "auto", device: str = "auto") -> LanguageModel:
    """Load a causal language model, ready to score token trees.

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
    config = _load_config(path)
    check_supported(config, path)
    module = _load_module(path, dtype, torch_device)
    if dtype == "auto" and torch_device.type == "cpu" and module.num_parameters() < SMALL_ON_CPU:
        module = module.float()
    return adapt_module(module, name=path)


def adapt_module(module: PreTrainedModel, *, name: str) -> LanguageModel:
    """Wrap a module that was built with `attn_implementation="foretoken"`.

    Raises:
        UnsupportedModelError: The architecture cannot be verified in one pass.
    """
    check_supported(module.config, name)
    return LanguageModel(
        module,
        name=name,
        context_limit=_context_limit(module.config.get_text_config(decoder=True)),
        eos_ids=_eos_ids(module),
    )


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


def check_supported(config: PreTrainedConfig, name: str) -> None:
    """Refuse architectures that cannot have a token tree verified in one pass.

    Raises:
        ModelError: The configuration is not a causal language model's.
        UnsupportedModelError: It is one, but its past cannot be branched and rolled back.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class is None:
        raise ModelError(
            f"{name}: {config.model_type!r} is not a causal language model",
            hint="use a model that transformers' AutoModelForCausalLM loads",
        )
    reason = _why_unsupported(config, model_class)
    if reason:
        raise UnsupportedModelError(
            f"{name}: {config.model_type!r} {reason}",
            hint=DECODER_HINT,
        )


def _why_unsupported(config: PreTrainedConfig, model_class: Any) -> str | None:
    text_config = config.get_text_config(decoder=True)
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    if config.is_encoder_decoder:
        return "is an encoder-decoder model"
    if getattr(model_class, "_is_stateful", False):
        return "keeps a recurrent state, which cannot be rolled back to a branch of a tree"
    if layer_types - SUPPORTED_LAYER_TYPES:
        other = ", ".join(sorted(layer_types - SUPPORTED_LAYER_TYPES))
        return f"has layers that are not plain attention ({other})"
    if not getattr(model_class, "_supports_attention_backend", False):
        return "computes attention without transformers' attention registration"
    return None


def _load_config(path: str) -> PreTrainedConfig:
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
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what transformers and the hub raise has no common base
        raise _unreadable(path, error) from error


def _load_module(path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    directory = Path(path).expanduser()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            str(directory) if directory.is_dir() else path,
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        module = module.to(device)
    except Exception as error:  # nor has what safetensors raises
        raise _unreadable(path, error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the weights of {path!r} lack {len(missing)} tensors, the first is {missing[0]!r}",
            hint="check that config.json and the weights are of one model, and complete",
        )
    return module


def _unreadable(path: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    where = "" if Path(path).expanduser().exists() else "is no directory here and "
    return ModelError(
        f"model {path!r} {where}cannot be loaded: {reason}",
        hint="give a directory written by save_pretrained with safetensors weights, "
        "or a hub id that can be reached",
    )


def _context_limit(config: PreTrainedConfig) -> int:
    """Return the positions that can be used without any request changing another's rotation.

    Rotary embeddings of type dynamic and longrope change all frequencies once the longest
    position in the batch passes the original limit, so those models stop there.
    """
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT_LIMIT
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        kind = str(rope.get("rope_type", "default"))
        if "dynamic" in kind or kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            limit = min(limit, original or limit)
    return int(limit)


def _eos_ids(module: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end a sequence; the generation config knows more than the model's."""
    for config in (module.generation_config, module.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
