"""Which operations of a transformers module may make a row depend on the others of its pass.

A trial pass is watched operation by operation. Those named here give a row the same bits in any
company, by measurement; inside the layers of this package everything may happen, because they
see to that themselves. What is left over is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from foretoken.models.elementwise import InvariantActivation
from foretoken.models.experts import is_packed_experts
from foretoken.models.packed import PackedLinear

# fmt: off
# Move numbers, compare them, or make them from nothing.
_MOVES = frozenset({
    "alias", "arange", "argwhere", "as_strided", "bitwise_and", "bitwise_not", "bitwise_or",
    "bitwise_xor", "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "copy_", "copy",
    "detach", "dropout", "embedding", "empty", "empty_like", "eq", "expand", "expand_as",
    "fill", "fill_", "flatten", "flip", "full", "full_like", "gather", "ge", "gt", "index",
    "index_put_", "index_put", "index_select", "isfinite", "isinf", "isnan", "item", "le",
    "lift_fresh", "lift_fresh_copy", "_local_scalar_dense", "logical_and", "logical_not",
    "logical_or", "lt", "masked_fill", "masked_fill_", "movedim", "narrow", "ne", "new_empty",
    "new_full", "new_ones", "new_zeros", "nonzero", "one_hot", "ones", "ones_like", "permute",
    "repeat", "repeat_interleave", "reshape", "resolve_conj", "resolve_neg", "roll",
    "scalar_tensor", "scatter_", "scatter", "select", "slice", "split", "split_with_sizes",
    "squeeze", "stack", "swapaxes", "t", "take_along_dim", "to", "_to_copy", "transpose",
    "tril", "triu", "type_as", "unbind", "unflatten", "unfold", "_unsafe_view", "unsqueeze",
    "view", "view_as", "where", "zeros", "zeros_like",
})
# One element from one. Either IEEE 754 says how it is rounded, or torch takes the vector
# function even for what does not fill a vector. Not among them: sigmoid, silu, gelu, softplus.
_ELEMENTS = frozenset({
    "abs", "add", "add_", "ceil", "clamp", "clamp_", "clamp_max", "clamp_min", "cos", "div_",
    "div", "erf", "exp", "floor", "floor_divide", "log", "maximum", "minimum", "mul", "mul_",
    "neg", "pow", "reciprocal", "relu", "remainder", "round", "rsqrt", "rsub", "sign", "sin",
    "sqrt", "sub", "sub_", "tanh", "tanh_", "threshold", "trunc",
})
# One row from one, where they go along the last dimension: no two threads share a row.
_ROWS = frozenset({
    "amax", "amin", "argmax", "argmin", "argsort", "cumsum", "_log_softmax", "log_softmax",
    "max", "mean", "min", "softmax", "_softmax", "sort", "std", "sum", "topk", "var", "var_mean",
})
# fmt: on
_NORMS = ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
_PRODUCTS = ("bmm", "matmul", "mm")
_OWN = (PackedLinear, InvariantActivation)
_PACKED = "_linear_pointwise"  # only this package calls it, and in safe row counts


def find_dependence(module: PreTrainedModel, run: Callable[[], object]) -> str | None:
    """Watch a trial pass and name the first operation that is not known to be invariant.

    Args:
        module: The model, packed.
        run: Makes the pass, of several rows.

    Returns:
        For example "model.layers.0.mlp.gate computes aten.mm", or None.
    """
    watch = _Watch()
    with _places(module, watch), watch:
        run()
    return watch.found


class _Watch(TorchDispatchMode):
    """Sees every operation of torch, and knows in which module it happens.

    Attributes:
        places: Names of the modules that run now, the outermost first.
        num_own: How many of them are this package's.
        found: What was not known to be invariant.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: list[str] = []
        self.num_own = 0
        self.found: str | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_watched = self.places and not self.num_own and self.found is None
        if is_watched and not _is_invariant(func, args, kwargs):
            name = func._schema.name.split("::")[-1]
            self.found = f"{self.places[-1] or 'the model'} computes {name}"
        return func(*args, **kwargs)


@contextmanager
def _places(module: PreTrainedModel, watch: _Watch) -> Iterator[None]:
    """Tell the watch which module runs, as long as the context lasts."""
    handles = []

    def enter(name: str, is_ours: bool) -> Callable[..., None]:
        def hook(*_: object) -> None:
            watch.places.append(name)
            watch.num_own += is_ours

        return hook

    def leave(is_ours: bool) -> Callable[..., None]:
        def hook(*_: object) -> None:
            watch.places.pop()
            watch.num_own -= is_ours

        return hook

    for name, layer in module.named_modules():
        is_ours = isinstance(layer, _OWN) or is_packed_experts(layer)
        handles += [
            layer.register_forward_pre_hook(enter(name, is_ours)),
            layer.register_forward_hook(leave(is_ours), always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_invariant(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call gives each row the same bits whatever the other rows."""
    name = func._schema.name.split("::")[-1]
    if name in _MOVES or name in _NORMS or name == _PACKED:
        return True
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    if tensors and not any(tensor.is_floating_point() for tensor in tensors):
        return True  # whole numbers are exact
    if not tensors or tensors[0] is not args[0]:
        return False
    first = tensors[0]
    values = {argument.name: argument.default_value for argument in func._schema.arguments}
    values.update(zip(values, args, strict=False))
    values.update(kwargs)
    if name in _ELEMENTS:
        return _rounds_alike(name, first, values)
    if name in _ROWS:
        dims = values.get("dim")
        dims = [dims] if isinstance(dims, int) else (dims or ())
        return [dim % first.dim() for dim in dims] == [first.dim() - 1]
    # A product of one term each, as in rotary embeddings: nothing is added up.
    return name in _PRODUCTS and first.shape[-1] == 1


def _rounds_alike(name: str, first: Tensor, values: dict[str, Any]) -> bool:
    """Whether an elementwise call treats whole vectors and the rest alike."""
    if name == "pow":
        return values.get("exponent") in (2, 3)
    if name == "rsqrt":
        return first.dtype != torch.bfloat16
    return bool(values.get("alpha", 1) == 1)
