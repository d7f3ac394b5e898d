"""The shape of a draft model: the numbers that decide how long its pass takes.

Depth decides most: at batch 1 layers run one after the other, whatever their width, so a shallow
and wide draft is faster than a deep and narrow one of as many parameters. Source: Decoding
Speculative Decoding, arXiv:2402.01528.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from foretoken.core.checks import check_int
from foretoken.core.options import ComponentSpec, build_options
from foretoken.errors import ConfigError

EXAMPLE = "layers=2,hidden=256,heads=8,kv_heads=4,head_dim=32,intermediate=704"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape:
    """Sizes of a decoder of the Llama family.

    Args:
        layers: Decoder layers.
        hidden: Channels of the residual stream; a multiple of `heads`.
        heads: Query heads per layer; a multiple of `kv_heads`.
        kv_heads: Key and value heads per layer.
        head_dim: Channels of a head; even, because positions rotate pairs.
        intermediate: Channels of the feed-forward part.
        vocab: Tokens that the draft can say; None for all of the target's.

    Raises:
        ConfigError: A size is no positive integer, or two of them do not go together.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int | None = None

    def __post_init__(self) -> None:
        for name, value in self._given().items():
            check_int(name, value, 1)
        # Not needed by the arithmetic, but transformers refuses configurations without it.
        _check_multiple("hidden", self.hidden, "heads", self.heads)
        _check_multiple("heads", self.heads, "kv_heads", self.kv_heads)
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim is an even number; got {self.head_dim}", hint="change head_dim"
            )

    @classmethod
    def of(cls, config: Any) -> DraftShape:
        """Return the shape of a model.

        Args:
            config: transformers' configuration of a decoder, or one with the same names.
        """
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
        )

    @classmethod
    def parse(cls, text: str, like: DraftShape | None = None) -> DraftShape:
        """Read `layers=2,hidden=256,...`.

        Args:
            text: Sizes by name, in any order.
            like: Says what is left out; without it only `vocab` may be.

        Raises:
            ConfigError: A name or value is not allowed, or a size is missing.
        """
        try:
            spec = ComponentSpec.parse(f"shape:{text}")
            known: Mapping[str, Any] = {} if like is None else asdict(like)
            return build_options(cls, ComponentSpec("shape", {**known, **spec.options}))
        except ConfigError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ConfigError(
                f"draft shape {text!r}: {error}",
                hint=f"write it as {EXAMPLE}; the sizes are {names}",
            ) from error

    def __str__(self) -> str:
        """Return it as `parse` reads it."""
        return ",".join(f"{name}={value}" for name, value in self._given().items())

    def as_config(self) -> dict[str, int]:
        """Return the sizes by transformers' names, without the vocabulary's."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
        }

    def num_parameters(self, config: Any) -> int:
        """Return how many numbers a model of this shape holds.

        Args:
            config: The target's, for what a shape does not say: the tokens, whether the head is
                the embedding, and what its family has beside Llama's matrices and norms.
        """
        vocab = self.vocab or config.vocab_size
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * (query + key)
        if config.model_type == "qwen2":  # biases of queries, keys and values
            attention += query + 2 * key
        if config.model_type == "qwen3":  # norms of queries and keys
            attention += 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        num_tables = 1 if config.tie_word_embeddings else 2
        return num_tables * vocab * self.hidden + self.layers * layer + self.hidden

    def _given(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def _check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"{name} is a multiple of {of}={divisor}; got {value}",
            hint=f"change {name} or {of}",
        )


__all__ = ["DraftShape"]
