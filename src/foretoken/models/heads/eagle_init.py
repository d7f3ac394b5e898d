"""New EAGLE and parallel heads, ready to be trained for a target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foretoken.models.heads.eagle import EagleModule
from foretoken.models.heads.target import TargetTensors

_INIT_STD = 0.02


def initialise(module: EagleModule, shared: TargetTensors) -> None:
    """Give a new head its first weights, in place; random ones come from torch's generator.

    A language-model head of its own begins as the target's, an embedding of its own likewise; in a
    narrower head, as their best approximation with so many columns.

    Args:
        module: Its norms are ones already.
        shared: Of the target.
    """
    width = module.design.sizes.hidden
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=_INIT_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    with torch.no_grad():
        if module.design.has_embedding:
            module.embed_tokens.weight.copy_(main_columns(shared.embedding, width))
        if module.design.has_head:
            rows = shared.head
            if module.design.draft_vocab_size:
                rows = rows[module.draft_ids]
            module.lm_head.weight.copy_(main_columns(rows, width))
        norm = shared.norm
        if module.design.has_output_norm and norm is not None and len(norm) == width:
            module.norm.weight.copy_(norm)


def main_columns(matrix: Tensor, num_columns: int) -> Tensor:
    """Return what a matrix is along its main directions, [V, num_columns] float32.

    It is the product of the matrix with the eigenvectors of its rows' second moment, so inner
    products between rows stay as they are, as far as so many columns can tell. As wide as the
    matrix, it is the matrix itself.

    Args:
        matrix: [V, D].
        num_columns: At least 1; if more than D, those beyond are small noise.
    """
    matrix = matrix.float()
    size = matrix.shape[1]
    if num_columns == size:
        return matrix.clone()
    directions = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)
    found: Tensor = matrix @ directions[:, :num_columns]
    if num_columns < size:
        return found
    noise = torch.randn(len(matrix), num_columns - size) * _INIT_STD
    return torch.cat((found, noise), dim=1)
