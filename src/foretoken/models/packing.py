"""Turns a transformers module into one whose arithmetic does not depend on who shares the pass."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foretoken.errors import ModelError
from foretoken.models.elementwise import ACTIVATIONS, InvariantActivation
from foretoken.models.experts import is_experts, pack_experts, use_own_experts
from foretoken.models.packed import (
    PACKABLE_DTYPES,
    PackedLinear,
    PackedWeight,
    pack_matrix,
)

_LINEAR = (nn.Linear, Conv1D)
# Their two-dimensional parameters are not factors of a matrix product.
_KEPT = (nn.Embedding, nn.Conv1d, nn.LayerNorm)
_CHECKED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `pack_module` is for such models: on CPU in float32 or bfloat16."""
    return device.type == "cpu" and dtype in PACKABLE_DTYPES


def pack_module(module: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Replace linear layers, experts, routers and activations by invariant ones, in place.

    Each weight is freed as soon as it is packed, so a second copy exists of one layer at a time;
    an embedding that is also the output layer stays, and its packed copy comes on top. What cannot
    be packed on this machine stays as it is.

    Args:
        module: A model for whose device and (new) dtype `is_packable` holds.
        dtype: Convert to it on the way; None leaves every parameter as it is. As long as they
            are those of the file, parameters take no memory.
    """
    if any(is_experts(layer) for layer in module.modules()):
        use_own_experts(module)
    # Held while its children change, so no layer that is to be freed may be among them.
    leaves = (*_LINEAR, InvariantActivation)
    parents = [layer for layer in module.modules() if type(layer) not in leaves]
    replacements: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()
    for parent in parents:
        for name, child in list(parent.named_children()):
            if child not in replacements:  # layers that are shared stay so
                replacements[child] = _replacement(child, dtype)
            if (replacement := replacements[child]) is not None:
                setattr(parent, name, replacement)
        if is_experts(parent):
            pack_experts(parent, dtype)
        elif not isinstance(parent, (*_KEPT, *_LINEAR)):
            _pack_own_weights(parent, dtype)
    if dtype is not None:
        module.to(dtype)
    for parameter in module.parameters():
        # What lies in the checkpoint's mapping keeps all of it in memory, as a second copy.
        parameter.data = parameter.data.clone()


def _replacement(module: nn.Module, dtype: torch.dtype | None) -> nn.Module | None:
    if "forward" in vars(module):  # somebody has wrapped it, and relies on being called
        return None
    if isinstance(module, ACTIVATIONS):
        return InvariantActivation(module)
    # Classes derived from these may compute something else.
    if type(module) not in _LINEAR:
        return None
    layer: Any = module
    weight = layer.weight if type(module) is nn.Linear else layer.weight.t()
    matrix = pack_matrix(weight, layer.bias, dtype)
    return None if matrix is None else PackedLinear(matrix)


def _pack_own_weights(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Pack matrices that a module keeps itself, such as a router's."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        matrix = pack_matrix(parameter, None, dtype) if parameter.dim() == 2 else None
        if matrix is not None:
            delattr(module, name)
            setattr(module, name, PackedWeight(matrix))


def check_finite(module: PreTrainedModel, name: str) -> None:
    """Check that a model's parameters are numbers.

    Args:
        module: The model.
        name: Path or hub id, for the message.

    Raises:
        ModelError: One is NaN or infinite.
    """
    for key, parameter in module.named_parameters():
        if not _is_finite(parameter):
            raise ModelError(
                f"{name}: the tensor {key!r} holds NaN or infinite numbers",
                hint="the checkpoint is broken, or its numbers are too large for this dtype; "
                "fetch or train it again, or try dtype=float32",
            )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype not in _CHECKED_DTYPES or tensor.numel() == 0:
        return True
    # Finds NaN too, and unlike isfinite() makes no tensor as large as the weight.
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
