"""Parallel heads: the layer of an EAGLE head that says several tokens in one pass.

Behind the row that reads the last known token come rows of learned mask tokens, which read a
learned state; each says the token one place further on.

Source: ParallelSpec, arXiv:2410.05589; the learned state in place of an unknown one, P-EAGLE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foretoken.models.heads.eagle import EagleDesign, EagleModule
from foretoken.models.heads.files import HeadFiles
from foretoken.models.heads.target import TargetShape, TargetTensors

_INIT_STD = 0.02


class ParallelModule(EagleModule):
    """A parallel head; `design.num_steps` is the number of tokens that a pass says.

    Args:
        design: How its layer is built.
        target: What it is for.
        shared: The target's tensors that it shares.

    Attributes:
        mask_embeddings: Of the mask tokens by place, [num_steps - 1, D].
        mask_state: What their rows read for a state, [D].
    """

    def __init__(self, design: EagleDesign, target: TargetShape, shared: TargetTensors) -> None:
        super().__init__(design, target, shared)
        num_masks, width = design.num_steps - 1, design.sizes.hidden
        self.mask_embeddings = nn.Parameter(torch.randn(num_masks, width) * _INIT_STD)
        self.mask_state = nn.Parameter(torch.randn(width) * _INIT_STD)

    def unrolled_inputs(
        self, step: int, token_ids: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the text's tokens and states in the first step, then mask tokens."""
        if step == 0:
            return super().unrolled_inputs(step, token_ids, states)
        shape = (*token_ids.shape, -1)
        return self.mask_embeddings[step - 1].expand(shape), self.mask_state.expand(shape)


def load_parallel(files: HeadFiles, target: TargetShape, shared: TargetTensors) -> ParallelModule:
    """Build a head from its files.

    Raises:
        ModelError: Its options or tensors are not those of a parallel head.
    """
    module = ParallelModule(EagleDesign.from_options(files.options), target, shared)
    files.fill(module)
    return module
