"""Loading models through the modules of transformers, for every architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from foretoken.errors import ModelError, UnsupportedModelError
from foretoken.models.adapter import LanguageModel, ModelInfo
from foretoken.models.attention import DECODER_HINT, IMPLEMENTATION
from foretoken.models.files import SMALL_ON_CPU, context_limit, eos_ids, unreadable
from foretoken.models.invariance import check_invariance
from foretoken.models.looped import register
from foretoken.models.loops import LoopShape
from foretoken.models.module_pass import ModulePass
from foretoken.models.packing import check_finite, is_packable, pack_module

register()  # Auto classes know looped models from here on

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def load_through_modules(
    path: str, config: PreTrainedConfig, *, dtype: torch.dtype | None, device: torch.device
) -> LanguageModel:
    """Load a model as transformers builds it.

    Args:
        path: A directory or a hub id.
        config: Its configuration.
        dtype: None for the checkpoint's own, or float32 for small models on CPU.
        device: Where it runs.

    Raises:
        ModelError: The files are missing, broken or no causal language model.
        UnsupportedModelError: The architecture cannot be verified in one pass.
    """
    check_supported(config, path)
    # Weights in the type of their file are not copied from it; packing converts one at a time.
    converts = device.type == "cpu" and dtype == torch.float32
    module = _load_module(path, None if converts else dtype, device)
    if dtype is None and device.type == "cpu" and module.num_parameters() < SMALL_ON_CPU:
        converts = True
    return adapt_module(module, name=path, dtype=torch.float32 if converts else None)


def adapt_module(
    module: PreTrainedModel, *, name: str, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Wrap a module that was built with `attn_implementation="foretoken"`.

    On CPU in float32 and bfloat16 its layers are replaced, in place, by packed ones.

    Args:
        module: A causal language model.
        name: Path or hub id, for messages.
        dtype: Convert to it on the way, where layers are packed; None leaves it as it is.

    Raises:
        ModelError: A parameter is NaN or infinite.
        UnsupportedModelError: The architecture cannot be verified in one pass.
    """
    check_supported(module.config, name)
    check_finite(module, name)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    forward_pass = ModulePass(module, name)
    config: Any = module.config.get_text_config(decoder=True)
    if is_packable(module.device, dtype or module.dtype):
        pack_module(module, dtype)
    info = ModelInfo(
        name=name,
        vocab_size=forward_pass.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=len(forward_pass.kv_layers),
        context_limit=context_limit(config),
        eos_ids=eos_ids(module.generation_config, module.config),
        num_parameters=num_parameters,
        dtype=module.dtype,
        device=module.device,
        kv_layers=forward_pass.kv_layers,
        loops=LoopShape.of(config),
    )
    report = check_invariance(LanguageModel(info, forward_pass), module)
    info = replace(info, exactness=report.exactness, inexact_because=report.reason)
    return LanguageModel(info, forward_pass)


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


def _load_module(path: str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    directory = Path(path).expanduser()
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            str(directory) if directory.is_dir() else path,
            dtype=dtype or "auto",
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        module = module.to(device)
    except Exception as error:  # nor has what safetensors raises
        raise unreadable(path, error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the weights of {path!r} lack {len(missing)} tensors, the first is {missing[0]!r}",
            hint="check that config.json and the weights are of one model, and complete",
        )
    return module
