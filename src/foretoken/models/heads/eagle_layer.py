"""One decoder layer for heads that read the target's states, in plain torch.

Training and serving run the same layer: they differ in where keys and values are, which is the
affair of the `Attend` that the layer is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foretoken.models.decoder_loading import rotary_frequencies

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [..., H, D], keys [..., H of keys, D], values alike) -> [..., H, D], after rotation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """The sizes of a Llama layer.

    Args:
        hidden: Columns of the residual stream.
        heads: Of queries.
        kv_heads: Of keys and values; divides `heads`.
        head_dim: Columns of each.
        intermediate: Of the feed-forward part.
        epsilon: Of the norms.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys are normalized, as in Qwen 3.
        rope: Rotary parameters as transformers writes them.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10_000.0})

    def frequencies(self) -> tuple[Tensor, float]:
        """Return the rotary frequencies, [head_dim / 2], and the factor of cosines and sines."""
        config: Any = SimpleNamespace(rope_parameters=self.rope)
        if self.rope.get("rope_type", "default") != "default":
            from transformers import LlamaConfig

            config = LlamaConfig(head_dim=self.head_dim, rope_parameters=self.rope)
        return rotary_frequencies(config, self.head_dim)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return rows of several heads rotated by their positions.

    Args:
        x: [..., R, H, D].
        cosines: [R, D / 2].
        sines: Likewise.
    """
    first, second = x.chunk(2, dim=-1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


class Norm(nn.RMSNorm):
    """RMS norm with an epsilon that is always given."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(size, eps=epsilon)


class _Attention(nn.Module):
    """Projections under the names of transformers."""

    def __init__(self, sizes: LayerSizes, width: int) -> None:
        super().__init__()
        q_size, kv_size = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(width, q_size, bias=sizes.qkv_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=sizes.qkv_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=sizes.qkv_bias)
        self.o_proj = nn.Linear(q_size, sizes.hidden, bias=False)
        if sizes.qk_norm:
            self.q_norm = Norm(sizes.head_dim, sizes.epsilon)
            self.k_norm = Norm(sizes.head_dim, sizes.epsilon)


class _FeedForward(nn.Module):
    """The gated feed-forward part under the names of transformers."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class HeadLayer(nn.Module):
    """A Llama layer whose queries, keys and values may read something wider than its residual.

    Args:
        sizes: Of the layer.
        width: Columns of what queries, keys and values are computed from.
    """

    def __init__(self, sizes: LayerSizes, width: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.self_attn = _Attention(sizes, width)
        self.mlp = _FeedForward(sizes)
        self.post_attention_layernorm = Norm(sizes.hidden, sizes.epsilon)
        # No buffer: it stays float32 whatever the layer is converted to.
        self._frequencies, self._rotary_factor = sizes.frequencies()

    def forward(
        self, inputs: Tensor, residual: Tensor, positions: Tensor, attend: Attend
    ) -> Tensor:
        """Return the residual stream after the layer, [..., R, hidden].

        Args:
            inputs: What attention reads, normalized, [..., R, width].
            residual: What the layer adds to, [..., R, hidden].
            positions: Of the rows, [R].
            attend: Attention.
        """
        attention, sizes = self.self_attn, self.sizes
        heads = (*inputs.shape[:-1], -1, sizes.head_dim)
        q = attention.q_proj(inputs).view(heads)
        k = attention.k_proj(inputs).view(heads)
        v = attention.v_proj(inputs).view(heads)
        if sizes.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        angles = positions[:, None].float() * self._frequencies.to(positions.device)
        cosines = (angles.cos() * self._rotary_factor).to(q.dtype)
        sines = (angles.sin() * self._rotary_factor).to(q.dtype)
        mixed = attend(rotate(q, cosines, sines), rotate(k, cosines, sines), v)
        x: Tensor = residual + attention.o_proj(mixed.flatten(-2))
        added: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + added


class UnrolledAttention:
    """Attention of drafts made from every position of a text at once, for training.

    Row i of the first call is a position of the text, and sees the rows before it. Row i of a
    later call is a draft that starts behind position i: it sees the text up to there, and of the
    drafts its own, made in the calls before. So a text of R positions costs R keys and one more
    for each call, not R times the text. Later calls may have fewer rows: the first ones.

    Source: EAGLE-3 (training-time test), arXiv:2503.01840, section 3.2; the group-wise mask of
    ParallelSpec, arXiv:2410.05589, is the same.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the mixed values, [B, R, H, D]; the keys and values are kept for later calls."""
        self._keys.append(k)
        self._values.append(v)
        if len(self._keys) == 1:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            mixed = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            return mixed.transpose(1, 2)
        num_rows, kv_heads = q.shape[1], k.shape[2]
        keys = [x[:, :num_rows] for x in self._keys]
        values = [x[:, :num_rows] for x in self._values]
        # Queries of one group read the same keys: [B, R, H of keys, group, D].
        grouped = q.unflatten(2, (kv_heads, -1)) * q.shape[-1] ** -0.5
        text = torch.einsum("brhgd,bshd->brhgs", grouped, keys[0])
        hidden = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).triu(1)
        text = text.masked_fill(hidden[:, None, None], -torch.inf)
        own = torch.einsum("brhgd,sbrhd->brhgs", grouped, torch.stack(keys[1:]))
        weights = torch.cat((text, own), dim=-1).softmax(dim=-1)
        of_text, of_own = weights.split((num_rows, len(keys) - 1), dim=-1)
        mixed = torch.einsum("brhgs,bshd->brhgd", of_text, values[0])
        mixed = mixed + torch.einsum("brhgs,sbrhd->brhgd", of_own, torch.stack(values[1:]))
        return mixed.flatten(2, 3)
