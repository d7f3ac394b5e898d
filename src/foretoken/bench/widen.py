"""The weights of a widened Llama, which computes what the small one does.

Everything new is connected so that it cannot be heard: hidden dimensions beyond the small model's
carry nothing that is read, added heads, neurons and layers have output weights of zero. Four
details keep the rest the same function:

- The mean square over a padded hidden state of size D is d/D of the small one's. So norm weights
  are scaled by sqrt(d/D) and epsilon by d/D.
- A head that is k times as wide has k times as many rotary frequencies, and its frequency number
  k*i is the small head's number i. So pair i moves to pair k*i.
- Scores are divided by the square root of the head's width. So queries are scaled by sqrt(k).
- With fewer query heads per key head than before, key heads are repeated.

Weights that cannot be heard are random, not zero, so that no engine can store two of the large
matrices as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from foretoken.models.loops import LoopShape

FILL = 0.02  # standard deviation of what cannot be heard, as of freshly initialized weights


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers that shape a Llama; layers that share their weights are one."""

    hidden: int
    layers: int
    head_dim: int
    heads: int
    kv_heads: int
    intermediate: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Read a transformers configuration."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        loops = LoopShape.of(SimpleNamespace(**config))
        return cls(
            hidden=hidden,
            layers=loops.num_stored if loops else config["num_hidden_layers"],
            head_dim=config.get("head_dim") or hidden // heads,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            intermediate=config["intermediate_size"],
        )

    def as_config(self) -> dict[str, int]:
        """Return the entries of a transformers configuration."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
        }


def widen(
    weights: Mapping[str, Tensor], small: Sizes, big: Sizes, *, noise: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the weights of the widened model.

    Args:
        weights: The small model's, under the names of transformers.
        small: Its sizes.
        big: Sizes that `resolve_sizes` allowed.
        noise: See `Shape`.
        dtype: Of the result; arithmetic is in float64.
    """
    widener = _Widener(small, big, noise=noise, dtype=dtype)
    wide = {"model.embed_tokens.weight": widener.columns(weights["model.embed_tokens.weight"])}
    for layer in range(big.layers):
        prefix = f"model.layers.{layer}."
        part = (
            {
                key.removeprefix(prefix): value
                for key, value in weights.items()
                if key.startswith(prefix)
            }
            if layer < small.layers
            else None
        )
        wide |= {prefix + key: value for key, value in widener.layer(part or None)}
    wide["model.norm.weight"] = widener.norm(weights["model.norm.weight"])
    if "lm_head.weight" in weights:
        wide["lm_head.weight"] = widener.columns(weights["lm_head.weight"])
    return wide


class _Widener:
    """Makes the large matrices, one by one."""

    def __init__(self, small: Sizes, big: Sizes, *, noise: float, dtype: torch.dtype) -> None:
        self._small, self._big = small, big
        self._noise, self._dtype = noise, dtype
        self._generator = torch.Generator().manual_seed(0)
        self._q_rows, self._kv_rows = _head_rows(small, big)

    def layer(self, weights: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """Yield names and matrices of a layer; without weights, of one that does nothing."""
        small, big = self._small, self._big
        ones = torch.ones(small.hidden)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield name, self.norm(ones if weights is None else weights[name])
        scale = math.sqrt(big.head_dim / small.head_dim)
        neurons = torch.arange(small.intermediate)
        inputs = (
            ("self_attn.q_proj.weight", big.heads * big.head_dim, self._q_rows, scale),
            ("self_attn.k_proj.weight", big.kv_heads * big.head_dim, self._kv_rows, 1.0),
            ("self_attn.v_proj.weight", big.kv_heads * big.head_dim, self._kv_rows, 1.0),
            ("mlp.gate_proj.weight", big.intermediate, neurons, 1.0),
            ("mlp.up_proj.weight", big.intermediate, neurons, 1.0),
        )
        for name, num_rows, rows, factor in inputs:
            wide = self._random(num_rows, big.hidden, FILL)
            if weights is not None:
                value = weights[name].double() * factor
                copies = value if rows.ndim == 1 else self._repeat(value, rows)
                if name == "self_attn.q_proj.weight":  # what is new in a key must not be asked for
                    wide.zero_()
                wide[rows.flatten(), : small.hidden] = copies.to(self._dtype)
            yield name, wide
        outputs = (
            ("self_attn.o_proj.weight", big.heads * big.head_dim, self._q_rows),
            ("mlp.down_proj.weight", big.intermediate, neurons),
        )
        for name, num_columns, columns in outputs:
            wide = torch.zeros(big.hidden, num_columns, dtype=self._dtype)
            if weights is not None:
                wide[: small.hidden, columns] = weights[name].to(self._dtype)
            elif self._noise:
                num_rows = big.hidden - small.hidden
                wide[small.hidden :] = self._random(num_rows, num_columns, self._noise)
            yield name, wide

    def norm(self, weight: Tensor) -> Tensor:
        """Return a norm's weight, scaled; zeros keep the added dimensions from being read."""
        scaled = weight.double() * math.sqrt(self._small.hidden / self._big.hidden)
        padding = torch.zeros(self._big.hidden - self._small.hidden, dtype=torch.float64)
        return torch.cat((scaled, padding)).to(self._dtype)

    def columns(self, weight: Tensor) -> Tensor:
        """Return a matrix of one row per token, padded to the hidden size."""
        wide = torch.zeros(weight.shape[0], self._big.hidden, dtype=self._dtype)
        wide[:, : self._small.hidden] = weight.to(self._dtype)
        return wide

    def _repeat(self, value: Tensor, rows: Tensor) -> Tensor:
        """Return a key or value projection with each head's rows as often as it is copied."""
        copies = rows.shape[1]
        heads = value.view(self._small.kv_heads, 1, self._small.head_dim, -1)
        return heads.expand(-1, copies, -1, -1).reshape(rows.numel(), -1)

    def _random(self, num_rows: int, num_columns: int, deviation: float) -> Tensor:
        matrix = torch.empty(num_rows, num_columns, dtype=self._dtype)
        return matrix.normal_(0.0, deviation, generator=self._generator)


def _head_rows(small: Sizes, big: Sizes) -> tuple[Tensor, Tensor]:
    """Return where the small heads' rows go.

    Returns:
        Row of each query row, [heads * head_dim]; rows of each key row, once per copy of its
        head, [kv_heads, copies, head_dim].
    """
    wider = big.head_dim // small.head_dim
    half = torch.arange(small.head_dim // 2) * wider
    within = torch.cat((half, half + big.head_dim // 2))  # rotary pairs stand half a head apart
    group, big_group = small.heads // small.kv_heads, big.heads // big.kv_heads
    copies = _copies(group, big_group)
    q_heads = [
        (kv_head * copies + member // big_group) * big_group + member % big_group
        for kv_head in range(small.kv_heads)
        for member in range(group)
    ]
    q_rows = (torch.tensor(q_heads)[:, None] * big.head_dim + within).flatten()
    kv_heads = torch.arange(small.kv_heads * copies).view(small.kv_heads, copies, 1)
    return q_rows, kv_heads * big.head_dim + within


def _copies(group: int, big_group: int) -> int:
    """Return how often each key head has to stand there, to serve its query heads."""
    return -(-group // big_group)


def fits(small: Sizes, heads: int, kv_heads: int) -> bool:
    """Whether so many key heads, of so many query heads, can stand for the small model's."""
    copies = _copies(small.heads // small.kv_heads, heads // kv_heads)
    return kv_heads >= small.kv_heads * copies


def fewest_kv_heads(small: Sizes, heads: int) -> int:
    """Return the least number of key heads that fits; the small model's own if none does."""
    counts = range(small.kv_heads, heads + 1)
    return next((n for n in counts if heads % n == 0 and fits(small, heads, n)), small.kv_heads)


__all__ = ["Sizes", "fewest_kv_heads", "fits", "widen"]
