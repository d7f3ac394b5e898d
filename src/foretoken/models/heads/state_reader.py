"""What heads have in common that run a layer over the target's states and their own outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from foretoken.models.adapter import ForwardOutput, LanguageModel
from foretoken.models.batch import RaggedBatch


class StateReader(LanguageModel):
    """A model whose rows read a state beside their token.

    Attributes:
        info: Of its own layers.
        target_layers: Layers of the target whose states it reads.
    """

    target_layers: tuple[int, ...]

    def forward(
        self, batch: RaggedBatch, rows: Sequence[int], *, hidden_layers: Sequence[int] = ()
    ) -> ForwardOutput:
        """Refuse: rows read states beside their tokens.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a head reads states of the target beside the tokens; call score")

    def fuse(self, hidden: Mapping[int, Tensor]) -> Tensor:
        """Return what rows read of the target's states, [n, D].

        Args:
            hidden: States of the layers `target_layers`, [n, D of the target] each.
        """
        raise NotImplementedError

    def score(self, batch: RaggedBatch, rows: Sequence[int], states: Tensor) -> ForwardOutput:
        """Run the rows of a batch.

        Args:
            batch: Row by row the token after the state that the row reads.
            rows: Those whose logits are wanted.
            states: What each row reads, [R, D]: fused states of the target, or its own outputs.

        Returns:
            Logits of all the target's tokens, and its output at every row as the hidden states of
            layer 1.
        """
        raise NotImplementedError
