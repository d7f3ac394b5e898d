"""Mixture-of-experts layers, through transformers' public registration of experts functions.

Each expert's rows go through packed matrices; a token's experts are added up in the order in
which its router chose them. Neither depends on the other tokens of the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from foretoken.models.elementwise import whole
from foretoken.models.packed import PackedMatrix, pack_matrix

IMPLEMENTATION = "foretoken"
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class PackedExperts(nn.Module):
    """The packed weights of one layer's experts, kept beside the layer's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: dict[str, list[PackedMatrix]] = {}


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer of experts that asks the registration for its forward."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias")) and any(
        isinstance(getattr(module, name, None), Tensor) for name in PROJECTIONS
    )


def is_packed_experts(module: nn.Module) -> bool:
    """Whether a module is a layer of experts, all of them packed."""
    packed = getattr(module, "foretoken_packed", None)
    return isinstance(packed, PackedExperts) and not is_experts(module)


def pack_experts(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the parameters of a layer of experts by packed ones, one kind after the other.

    Args:
        module: For which `is_experts` holds.
        dtype: Convert to it; None leaves them as they are.
    """
    packed = PackedExperts()
    for name in PROJECTIONS:
        weights = getattr(module, name, None)
        if not isinstance(weights, Tensor):
            continue
        biases = getattr(module, f"{name}_bias") if module.has_bias else [None] * len(weights)
        matrices = []
        for weight, bias in zip(weights, biases, strict=True):
            matrix = pack_matrix(weight.t() if module.is_transposed else weight, bias, dtype)
            if matrix is None:
                break
            matrices.append(matrix)
        else:
            packed.matrices[name] = matrices
            setattr(module, name, None)
    module.foretoken_packed = packed


def use_own_experts(module: PreTrainedModel) -> None:
    """Make a model's layers of experts run `experts_forward`."""
    module.set_experts_implementation(IMPLEMENTATION)


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,  # [T, hidden]
    top_k_index: Tensor,  # [T, K] int64
    top_k_weights: Tensor,  # [T, K]
) -> Tensor:
    """Return the weighted sum of each token's experts, [T, hidden]."""
    num_tokens, num_chosen = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    outputs = hidden_states.new_empty(num_tokens * num_chosen, hidden_states.shape[1])
    for expert in chosen.unique().tolist():
        places = (chosen == expert).nonzero().view(-1)
        outputs[places] = _expert(module, expert, hidden_states[places // num_chosen])
    weighted = outputs.view(num_tokens, num_chosen, -1) * top_k_weights.unsqueeze(-1)
    if weighted.dtype == torch.bfloat16:
        weighted = weighted.float()  # rounded once, after the sum
    total, *others = weighted.unbind(1)
    for other in others:
        total = total + other
    return total.to(hidden_states.dtype)


ExpertsInterface.register(IMPLEMENTATION, experts_forward)


def _expert(module: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """Return one expert's output for its rows, [R, hidden]."""
    if module.has_gate:
        inner = _gated(module, _project(module, "gate_up_proj", expert, rows))
    else:
        inner = module.act_fn(_project(module, "up_proj", expert, rows))  # type: ignore[operator]
    output = _project(module, "down_proj", expert, inner)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)  # type: ignore[operator]
    return output


def _gated(module: nn.Module, gate_up: Tensor) -> Tensor:
    """Apply the layer's gate, which may be a function of its own, to whole vectors only."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    num_filled = whole(num_rows * width, multiple_of=width) // width
    if num_filled > num_rows:
        gate_up = nn.functional.pad(gate_up, (0, 0, 0, num_filled - num_rows))
    gated: Tensor = module._apply_gate(gate_up)  # type: ignore[operator]
    return gated[:num_rows]


def _project(module: nn.Module, name: str, expert: int, rows: Tensor) -> Tensor:
    packed = getattr(module, "foretoken_packed", None)
    if packed is not None and name in packed.matrices:
        result: Tensor = packed.matrices[name][expert](rows)
        return result
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(rows, weight.t() if module.is_transposed else weight, bias)
