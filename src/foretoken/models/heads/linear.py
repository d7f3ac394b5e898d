"""What heads without attention are made of: blocks, and LM heads that may be the target's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """y = x + SiLU(W x + b); begins as the identity.

    Args:
        hidden_size: D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [..., D], for [..., D]."""
        activated: Tensor = functional.silu(self.linear(x))
        return x + activated


class MixingBlock(nn.Module):
    """y = R x + SiLU(W x + b) of several vectors as one; begins as the first of them.

    Args:
        num_vectors: How many vectors of D stand one after the other in x.
        hidden_size: D.

    Source: the first layer of a Hydra head, arXiv:2402.05109.
    """

    def __init__(self, num_vectors: int, hidden_size: int) -> None:
        super().__init__()
        # Rows of R, then of W: one product.
        self.linear = nn.Linear(num_vectors * hidden_size, 2 * hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.weight[:hidden_size, :hidden_size].copy_(torch.eye(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [..., D], for [..., num_vectors * D]."""
        both: Tensor = self.linear(x)
        residual, activated = both.chunk(2, dim=-1)
        return residual + functional.silu(activated)


class SharedLinear(nn.Module):
    """A product with a matrix of the target's, which is neither trained nor saved.

    Args:
        weight: [out, in].
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        return functional.linear(x, self.weight)


def lm_heads(
    num_heads: int, vocab_size: int, hidden_size: int, target_head: Tensor | None, *, own: bool
) -> nn.ModuleList:
    """Return an LM head for each head, begun from the target's, or one that all share with it.

    Args:
        num_heads: K.
        vocab_size: V.
        hidden_size: D.
        target_head: The target's, [V, D]; of heads' own, None leaves them to be filled.
        own: Whether each head has its own.
    """
    if not own:
        if target_head is None:
            raise ValueError("an LM head shared with the target needs the target's")
        return nn.ModuleList([SharedLinear(target_head)] * num_heads)
    heads = nn.ModuleList()
    for _ in range(num_heads):
        head = nn.utils.skip_init(nn.Linear, hidden_size, vocab_size, bias=False)
        if target_head is not None:
            with torch.no_grad():
                head.weight.copy_(target_head)
        heads.append(head)
    return heads


class StateHeads(nn.Module):
    """Heads that say from vectors alone which token comes: blocks, then an LM head each.

    Args:
        blocks: Of each head, a sequence of blocks; the first may be a `MixingBlock`.
        lm_heads: Of each head.
    """

    def __init__(self, blocks: nn.ModuleList, lm_heads: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks
        self.lm_heads = lm_heads

    def say(self, head: int, seen: Tensor) -> Tensor:
        """Return one head's logits, [..., V], from what it sees, [..., D] or vectors in a row."""
        logits: Tensor = self.lm_heads[head](self.blocks[head](seen))
        return logits
