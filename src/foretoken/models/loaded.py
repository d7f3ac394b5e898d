"""Modules that somebody else has loaded and goes on using: wrapped without a trace."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from foretoken.core.verdict import Exactness
from foretoken.errors import ModelError
from foretoken.models.adapter import LanguageModel, ModelInfo
from foretoken.models.attention import IMPLEMENTATION
from foretoken.models.decoder_config import is_plain_decoder
from foretoken.models.decoder_loading import DTYPES as COMPILED_DTYPES
from foretoken.models.decoder_loading import HeldTensors, load_decoder
from foretoken.models.files import context_limit
from foretoken.models.loops import LoopShape
from foretoken.models.modules import adapt_module, check_supported

Fingerprint = tuple[tuple[Any, ...], ...]


def adapt_loaded(module: PreTrainedModel) -> LanguageModel:
    """Wrap a module, whatever its attention, so that the module itself stays as it is.

    Plain decoders on CPU are compiled from its tensors, as they are from files. Others run as a
    second module of the same structure that shares the tensors, except what is packed on CPU. What
    is made here has the module's weights of this moment; see `fingerprint`.

    Args:
        module: A causal language model on one device. It is read, never changed.

    Raises:
        ModelError: A parameter is NaN or infinite, or the module lies on several devices.
        UnsupportedModelError: The architecture cannot be verified in one pass.
    """
    name = module.name_or_path or type(module).__name__
    check_supported(module.config, name)
    devices = sorted({str(parameter.device) for parameter in module.parameters()})
    if len(devices) > 1:
        raise ModelError(
            f"{name}: the module lies on {len(devices)} devices, {', '.join(devices)}; one is "
            "allowed",
            hint="load it on one device, without device_map",
        )
    if _is_plain(module):
        return _compiled(module, name)
    return adapt_module(_twin(module), name=name)


def fingerprint(module: nn.Module) -> Fingerprint:
    """Return what changes when a module's weights are written to, moved or converted.

    Writes through `parameter.data` leave no trace.
    """
    return tuple(
        (
            parameter.data_ptr(),
            0 if parameter.is_inference() else parameter._version,
            parameter.dtype,
            parameter.device,
        )
        for parameter in module.parameters()
    )


def _is_plain(module: PreTrainedModel) -> bool:
    """Whether a module is a plain decoder as transformers builds it, with nothing put into it."""
    config = module.config
    kinds = {parameter.dtype for parameter in module.parameters()}
    if (
        module.device.type != "cpu"
        or len(kinds) != 1
        or not kinds <= set(COMPILED_DTYPES)
        or not is_plain_decoder(config)
        or type(module) is not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    ):
        return False
    with torch.device("meta"):
        fresh = type(module)(copy.deepcopy(config))
    return _structure(module) == _structure(fresh)


def _structure(module: nn.Module) -> list[tuple[Any, ...]]:
    """Return the names and classes of all parts, and whether anything is hooked to them."""
    return [
        (
            name,
            type(part),
            "forward" in vars(part),
            bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks),
            [(key, weight.shape) for key, weight in part.named_parameters(recurse=False)],
        )
        for name, part in module.named_modules()
    ]


def _compiled(module: PreTrainedModel, name: str) -> LanguageModel:
    config = module.config
    tensors = HeldTensors(name, module.state_dict())
    decoder, kv_layers, num_parameters = load_decoder(tensors, config, module.dtype)
    eos = module.generation_config.eos_token_id
    info = ModelInfo(
        name=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=len(kv_layers),
        context_limit=context_limit(config),
        eos_ids=frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos),
        num_parameters=num_parameters,
        dtype=module.dtype,
        device=module.device,
        kv_layers=kv_layers,
        exactness=Exactness.BITWISE,
        loops=LoopShape.of(config),
    )
    return LanguageModel(info, decoder)


def _twin(module: PreTrainedModel) -> PreTrainedModel:
    """Return a module of the same structure, with parameters of its own over the same memory."""
    shared = {id(weight): _sharing(weight) for weight in module.parameters()}
    twin = copy.deepcopy(module, shared)
    twin.set_attn_implementation(IMPLEMENTATION)
    return twin


def _sharing(weight: nn.Parameter) -> nn.Parameter:
    """Return a parameter over the same memory; quantized ones know more than a tensor, and stay."""
    if type(weight) is not nn.Parameter:
        return weight
    return nn.Parameter(weight.detach(), requires_grad=False)


__all__ = ["Fingerprint", "adapt_loaded", "fingerprint"]
