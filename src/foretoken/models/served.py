"""Small trained models that run inside a target: they take its states and end in its own head."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from foretoken.models.adapter import LanguageModel, LayerView
from foretoken.models.decoder import CompiledDecoder
from foretoken.models.decoder_loading import HeldTensors, load_decoder
from foretoken.models.module_pass import ModulePass
from foretoken.models.packing import check_finite, is_packable, pack_module
from foretoken.models.partial import LayerSet
from foretoken.models.pools import LayerShape


def serve_below_head(
    module: PreTrainedModel, target: LanguageModel, layers: LayerSet, *, name: str
) -> LayerView:
    """Return a model that takes states in place of tokens and has the target's logits.

    Compiled where the target is; else it runs through its module, on the target's device. The
    target's head is shared, not copied.

    Args:
        module: A plain decoder of the target's width, built with `attn_implementation="foretoken"`.
            Its embedding and its head do not matter; it is changed.
        target: Whose head it ends in.
        layers: What of the module runs.
        name: For messages.

    Raises:
        ModelError: A parameter is NaN or infinite.
        TypeError: The target's passes are of a kind that shares no head.
    """
    forward_pass, info = target.forward_pass, target.info
    own: CompiledDecoder | ModulePass
    kv_layers: tuple[LayerShape, ...]
    if isinstance(forward_pass, CompiledDecoder):
        tensors = HeldTensors(name, module.state_dict())
        decoder, kv_layers, _ = load_decoder(tensors, module.config, info.dtype)
        own = decoder.with_head_of(forward_pass)
    elif isinstance(forward_pass, ModulePass):
        check_finite(module, name)
        module = module.to(device=info.device, dtype=info.dtype)
        if is_packable(info.device, info.dtype):
            pack_module(module)
        module.lm_head = forward_pass.module.get_output_embeddings()
        own = ModulePass(module, name)
        kv_layers = own.kv_layers
    else:
        raise TypeError(f"passes of kind {type(forward_pass).__name__} have no head to share")
    info = replace(info, name=name, num_layers=len(kv_layers), kv_layers=kv_layers)
    return LanguageModel(info, own).with_layers(layers)


__all__ = ["serve_below_head"]
