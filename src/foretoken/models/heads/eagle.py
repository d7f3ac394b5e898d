"""EAGLE heads: one decoder layer that goes on from the target's states, as a module to train.

Row i reads the token at position i + 1 and the state behind position i, and says what comes at
position i + 2. Behind the last token that the target has run, the head's own output stands for the
state. Two designs:

- EAGLE-1 (and 2, which is the same head with another tree; arXiv:2401.15077, arXiv:2406.16858):
  the state is the target's last one, normalized; `fc` joins it with the token's embedding to what
  goes through the layer; embedding and language-model head are the target's.
- EAGLE-3 (arXiv:2503.01840): the state is low, middle and high ones of the target, joined by `fc`;
  attention reads the normalized embedding beside the normalized state; head and norm are its own,
  and may know only some of the target's tokens. It may be narrower than the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foretoken.errors import ModelError
from foretoken.models.heads.eagle_layer import (
    Attend,
    HeadLayer,
    LayerSizes,
    Norm,
    UnrolledAttention,
)
from foretoken.models.heads.files import HeadFiles
from foretoken.models.heads.target import TargetShape, TargetTensors

EAGLE_1, EAGLE_3 = "eagle-1", "eagle-3"


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleDesign:
    """How an EAGLE head is built; kept as the options of its files.

    Args:
        variant: `EAGLE_1` or `EAGLE_3`.
        sizes: Of its layer; EAGLE-1 is as wide as the target.
        target_layers: Layers of the target whose states it reads, in the order of `fc`'s columns.
        draft_vocab_size: Tokens that it can say; None for all of the target's.
        has_embedding: Whether it has an embedding of its own.
        has_head: Whether it has a language-model head of its own.
        has_input_norm: Whether EAGLE-1 normalizes what goes into its layer. EAGLE-3 always does.
        has_output_norm: Likewise before the language-model head.
        has_embedding_norm: Likewise, EAGLE-1's embedding.
        has_fc_norm: Whether EAGLE-3 normalizes the target's states.
        fc_bias: Whether `fc` has a bias.
        norm_before_residual: Whether EAGLE-3's layer adds to the normalized state.
        num_steps: How far drafts went in its training; it may draft further.
    """

    variant: str
    sizes: LayerSizes
    target_layers: tuple[int, ...]
    draft_vocab_size: int | None = None
    has_embedding: bool = False
    has_head: bool = False
    has_input_norm: bool = False
    has_output_norm: bool = False
    has_embedding_norm: bool = False
    has_fc_norm: bool = False
    fc_bias: bool = False
    norm_before_residual: bool = False
    num_steps: int = 1

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EagleDesign:
        """Read the options of a head's files.

        Raises:
            ModelError: They are not those of an EAGLE head.
        """
        try:
            values = dict(options)
            sizes = LayerSizes(**values.pop("sizes"))
            layers = tuple(values.pop("target_layers"))
            return cls(sizes=sizes, target_layers=layers, **values)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"the options of the head are not those of an EAGLE head: {error}",
                hint="check its config.json, or train it again",
            ) from error

    def as_options(self) -> dict[str, Any]:
        """Return what `from_options` reads."""
        return asdict(self)

    @property
    def is_eagle3(self) -> bool:
        """Whether it is of the third design."""
        return self.variant == EAGLE_3


class EagleModule(nn.Module):
    """An EAGLE head.

    Args:
        design: How it is built.
        target: What it is for.
        shared: The target's tensors that it shares; they are not among its own parameters.
    """

    draft_ids: Tensor
    _embedding: Tensor
    _head: Tensor

    def __init__(self, design: EagleDesign, target: TargetShape, shared: TargetTensors) -> None:
        super().__init__()
        self.design = design
        sizes, width = design.sizes, design.sizes.hidden
        num_read = len(design.target_layers) * target.hidden_size
        self.fc = nn.Linear(
            num_read if design.is_eagle3 else width + num_read, width, bias=design.fc_bias
        )
        self.layer = HeadLayer(sizes, width * (1 + design.is_eagle3))
        self._add_norms(num_read)
        num_tokens = design.draft_vocab_size or target.vocab_size
        if design.draft_vocab_size:
            self.register_buffer("draft_ids", torch.arange(num_tokens))
        if design.has_embedding:
            self.embed_tokens = nn.Embedding(target.vocab_size, width)
        else:
            self.register_buffer("_embedding", shared.embedding.float(), persistent=False)
        if design.has_head:
            self.lm_head = nn.Linear(width, num_tokens, bias=False)
        else:
            self.register_buffer("_head", shared.head.float(), persistent=False)

    def _add_norms(self, num_read: int) -> None:
        design = self.design
        width, epsilon = design.sizes.hidden, design.sizes.epsilon
        if design.is_eagle3:  # in the layer, as the paper's code names them
            self.layer.input_layernorm = Norm(width, epsilon)
            self.layer.hidden_norm = Norm(width, epsilon)
        elif design.has_input_norm:
            self.layer.input_layernorm = Norm(width, epsilon)
        if design.has_embedding_norm:
            self.embedding_norm = Norm(width, epsilon)
        if design.has_fc_norm:
            self.fc_norm = Norm(num_read, epsilon)
        if design.has_output_norm:
            self.norm = Norm(width, epsilon)

    @property
    def embedding(self) -> Tensor:
        """The embedding of the target's tokens, [V, D]: its own or the target's."""
        return self.embed_tokens.weight if self.design.has_embedding else self._embedding

    @property
    def head(self) -> Tensor:
        """From normalized outputs to logits, [V or fewer, D]: its own or the target's."""
        return self.lm_head.weight if self.design.has_head else self._head

    def fuse(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """Return the states that rows read, [..., D].

        Args:
            hidden: The target's states after each of its layers that the head reads, [..., D of
                the target].
        """
        states = torch.cat([hidden[layer] for layer in self.design.target_layers], dim=-1)
        if not self.design.is_eagle3:
            return states
        fused: Tensor = self.fc(self.fc_norm(states) if self.design.has_fc_norm else states)
        return fused

    def read_embedding(self, embedding: Tensor) -> Tensor:
        """Return an embedding as rows read it, [V, D]: normalized, if the head normalizes it."""
        norm: Any = None
        if self.design.is_eagle3:
            norm = self.layer.input_layernorm
        elif self.design.has_embedding_norm:
            norm = self.embedding_norm
        return embedding if norm is None else norm(embedding)

    def run(self, embeddings: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layer; return its output, [..., R, D], which the next row may read as its state.

        Args:
            embeddings: Of the tokens, [..., R, D].
            states: Behind the token before each, [..., R, D].
            positions: Of the rows, [R].
            attend: Attention.
        """
        design, layer = self.design, cast(Any, self.layer)
        read = self.read_embedding(embeddings)
        if design.is_eagle3:
            normed = layer.hidden_norm(states)
            inputs = torch.cat((read, normed), dim=-1)
            residual = normed if design.norm_before_residual else states
        else:
            residual = self.fc(torch.cat((read, states), dim=-1))
            inputs = layer.input_layernorm(residual) if design.has_input_norm else residual
        output: Tensor = layer(inputs, residual, positions, attend)
        return output

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits over the tokens that the head can say, [..., V or fewer]."""
        outputs = self.norm(outputs) if self.design.has_output_norm else outputs
        return nn.functional.linear(outputs, self.head)

    def forward(
        self, token_ids: Tensor, hidden: Mapping[int, Tensor], num_steps: int = 1
    ) -> list[Tensor]:
        """Draft from every position of some texts at once; the tokens read are the texts' own.

        Args:
            token_ids: [B, T], T at least `num_steps` + 2.
            hidden: The target's states at these tokens by layer, [B, T, D of the target].
            num_steps: How far.

        Returns:
            The outputs of each step, [B, T - 2 - k, D] of step k. Its row i read the token at
            i + k + 1, and `logits` of it says the one after that.
        """
        num_rows = token_ids.shape[1] - 2
        states = self.fuse({layer: x[:, :num_rows] for layer, x in hidden.items()})
        attend, steps = UnrolledAttention(), []
        for step in range(num_steps):
            read_ids = token_ids[:, 1 + step : 1 + num_rows]
            embeddings, states = self.unrolled_inputs(step, read_ids, states[:, : num_rows - step])
            positions = torch.arange(step, num_rows, device=token_ids.device)
            states = self.run(embeddings, states, positions, attend)
            steps.append(states)
        return steps

    def unrolled_inputs(
        self, step: int, token_ids: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what the rows of a step of `forward` read: embeddings and states, [B, R, D].

        Args:
            step: From 0.
            token_ids: Of the text, at the rows' places, [B, R].
            states: Fused ones of the target at first, then the outputs of the step before.
        """
        return nn.functional.embedding(token_ids, self.embedding), states


def load_eagle(files: HeadFiles, target: TargetShape, shared: TargetTensors) -> EagleModule:
    """Build a head from its files.

    Raises:
        ModelError: Its options or tensors are not those of an EAGLE head.
    """
    module = EagleModule(EagleDesign.from_options(files.options), target, shared)
    files.fill(module)
    return module


def fused_layers(num_layers: int) -> tuple[int, ...]:
    """Return the layers of a target that an EAGLE-3 head reads: a low, a middle and a high one.

    They are those of the paper's code, 2, L // 2 and L - 3; of targets too small for that, the
    first, the middle and the last one.
    """
    if num_layers >= 8:
        return (2, num_layers // 2, num_layers - 3)
    return tuple(sorted({1, (num_layers + 1) // 2, num_layers}))


__all__ = [
    "EAGLE_1",
    "EAGLE_3",
    "EagleDesign",
    "EagleModule",
    "fused_layers",
    "load_eagle",
]
