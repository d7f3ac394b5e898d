"""Kangaroo's adapter: one trained layer between the target's first layers and its own head.

The adapter is a Llama layer, run by transformers when it is trained and by the same code as its
target when it is served.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel, LayerView
from foretoken.models.attention import IMPLEMENTATION
from foretoken.models.heads.files import HeadFiles, save_head
from foretoken.models.heads.target import TargetShape, TargetTensors
from foretoken.models.partial import LayerSet
from foretoken.models.served import serve_below_head

KIND = "kangaroo"
HEAD_DIM = 64
MIN_MLP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """What an adapter is made of; kept in its files.

    Args:
        layers: How many of the target's layers run below it; 2 as in the paper, or the first of
            a target that has no more than 2.
        heads: Of its attention, 64 columns each; about as wide as the target if it is 0.
        kv_heads: Of keys and values, a divisor of `heads`; as many if it is 0.
        mlp: Columns of a feed-forward part; 0 for none, as in the paper.
        rope_theta: Base of its rotary frequencies.
        epsilon: Of its norms.
    """

    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    mlp: int = 0
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6

    def for_target(self, target: TargetShape) -> AdapterOptions:
        """Return the options with nothing left open.

        Raises:
            ConfigError: They do not fit the target, or one another.
        """
        layers = self.layers or default_exit(target.num_layers)
        heads = self.heads or max(1, target.hidden_size // HEAD_DIM)
        kv_heads = self.kv_heads or heads
        if not 1 <= layers < target.num_layers:
            raise ConfigError(
                f"kangaroo:layers is from 1 to {target.num_layers - 1} for a target of "
                f"{target.num_layers} layers; got {layers}",
                hint="change layers",
            )
        if min(heads, kv_heads) < 1 or heads % kv_heads or 0 != self.mlp < MIN_MLP:
            raise ConfigError(
                f"kangaroo:heads is a multiple of kv_heads, and mlp is 0 or at least {MIN_MLP}; "
                f"got heads={heads}, kv_heads={kv_heads}, mlp={self.mlp}",
                hint="change heads, kv_heads or mlp",
            )
        return replace(self, layers=layers, heads=heads, kv_heads=kv_heads)


def default_exit(num_layers: int) -> int:
    """Return after how many of a target's layers drafts are made, unless told."""
    return min(2, max(1, num_layers - 1))


class KangarooAdapter(nn.Module):
    """One attention with a norm before and a norm behind it; a feed-forward part if asked for.

    It takes the states after the target's first layers, and its results go through the target's
    own head, which is no part of its files. Untrained it adds nothing to the states: an early exit.

    Args:
        options: With nothing left open, as `AdapterOptions.for_target` returns them.
        target: What it is for.
        head: The target's, [V, D], for training.

    Source: Kangaroo, arXiv:2404.18911, section 3.1.
    """

    head: Tensor | None

    def __init__(
        self, options: AdapterOptions, target: TargetShape, head: Tensor | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.target = target
        self.register_buffer("head", head, persistent=False)
        self.model = LlamaForCausalLM(self._config("sdpa")).model
        layer: Any = self.model.layers[0]
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
        if not options.mlp:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), _Nothing()
        self.model.embed_tokens = nn.Identity()

    @classmethod
    def new(
        cls, target: TargetShape, tensors: TargetTensors, options: AdapterOptions
    ) -> KangarooAdapter:
        """Return an untrained adapter: an early exit through the target's final norm.

        Raises:
            ConfigError: The options do not fit the target.
        """
        adapter = cls(options.for_target(target), target, tensors.head.float())
        if tensors.norm is not None:
            adapter.model.norm.weight.data.copy_(tensors.norm)
        return adapter

    @classmethod
    def load(cls, files: HeadFiles, target: TargetShape) -> KangarooAdapter:
        """Return a trained adapter.

        Raises:
            ConfigError: Its options do not fit the target.
            ModelError: Its tensors do not fit its options.
        """
        adapter = cls(AdapterOptions(**files.options).for_target(target), target)
        files.fill(adapter)
        return adapter.eval().requires_grad_(False)

    def save(self, target: TargetShape, folder: Path, card: str) -> None:
        """Write its directory; arguments as for `save_head`."""
        save_head(self.state_dict(), KIND, target, asdict(self.options), folder, card)

    def forward(self, states: Tensor) -> Tensor:
        """Return what the target's head takes, [B, T, D].

        Args:
            states: After the target's first layers, [B, T, D]; each row sees those before it.
        """
        output: Tensor = self.model(inputs_embeds=states, use_cache=False).last_hidden_state
        return output

    def head_logits(self, outputs: Tensor) -> Tensor:
        """Return the target's logits, [..., V].

        Args:
            outputs: Of `forward`, [..., D].

        Raises:
            ValueError: The adapter was made without the target's head.
        """
        if self.head is None:
            raise ValueError("an adapter that is not trained has no head of its own; serve it")
        return functional.linear(outputs, self.head)

    def serve(self, target: LanguageModel) -> LayerView:
        """Return it as a model that takes states and ends in the target's own head.

        Args:
            target: On its device and in its dtype it runs, compiled where the target is.

        Raises:
            ModelError: A parameter is NaN or infinite.
        """
        module = LlamaForCausalLM(self._config(IMPLEMENTATION))
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        module.load_state_dict(tensors, strict=False)  # what does not run is of no account
        parts = LayerSet((0,), (0,) if self.options.mlp else ())
        return serve_below_head(module, target, parts, name=f"kangaroo of {target.info.name}")

    def _config(self, attention: str) -> LlamaConfig:
        options, hidden_size = self.options, self.target.hidden_size
        return LlamaConfig(
            vocab_size=1,
            hidden_size=hidden_size,
            intermediate_size=options.mlp or MIN_MLP,
            num_hidden_layers=1,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            head_dim=min(HEAD_DIM, hidden_size),
            rms_norm_eps=options.epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=attention,
        )


class _Nothing(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


__all__ = ["KIND", "AdapterOptions", "KangarooAdapter", "default_exit"]
