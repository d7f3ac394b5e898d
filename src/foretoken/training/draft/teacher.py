"""The target as a teacher: its logits behind outputs that it sees again and again.

The pass of the target is most of a step's time, and in every epoch it is the same. What its head
maps to logits, a state of D numbers for each place, is remembered the first time: the logits
themselves would be hundreds of times as much. Each text is run by itself, so that its states do not
depend on which texts it happens to meet: a training that is resumed sees the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken.models.trainable import TrainableModel, head_logits, last_states
from foretoken.training.corpus import Example

MAX_BYTES = 2**30  # of states
_BYTES_PER_NUMBER = 4


class Teacher:
    """Tells what a target says behind the outputs of texts.

    Args:
        target: It stays as it is.
        examples: The texts.
        max_bytes: Of states; if those of all texts are more, none are remembered.
    """

    def __init__(
        self, target: TrainableModel, examples: Sequence[Example], max_bytes: int = MAX_BYTES
    ) -> None:
        self.target = target
        self._examples = examples
        self._states: dict[int, Tensor] = {}
        config: Any = target.config
        num_places = sum(len(text.output_ids) for text in examples)
        num_bytes = num_places * _BYTES_PER_NUMBER * int(config.hidden_size)
        self.remembers = num_bytes <= max_bytes and _has_plain_head(target, examples[0])

    @torch.no_grad()
    def logits(self, places: Sequence[int]) -> Tensor:
        """Return the target's logits behind all outputs of some texts, one text after another.

        Args:
            places: Of the texts.

        Returns:
            [N, V], a row for each output token.
        """
        if self.remembers:
            states = torch.cat([self._remembered(place) for place in places])
            return head_logits(self.target, states).float()
        return torch.cat([self._alone(place, last=False) for place in places]).float()

    def _remembered(self, place: int) -> Tensor:
        if place not in self._states:
            self._states[place] = self._alone(place, last=True)
        return self._states[place]

    def _alone(self, place: int, *, last: bool) -> Tensor:
        """Return the states, or else the logits, behind the outputs of one text."""
        text = self._examples[place]
        token_ids = torch.tensor([text.token_ids[:-1]], device=self.target.device)
        found = last_states(self.target, token_ids) if last else self.target.logits(token_ids)
        return found[0, len(text.prompt_ids) - 1 :]


@torch.no_grad()
def _has_plain_head(target: TrainableModel, text: Example) -> bool:
    """Whether a target's logits are its head's product with its last states, and nothing more."""
    token_ids = torch.tensor([text.token_ids], device=target.device)
    found = head_logits(target, last_states(target, token_ids))
    return torch.equal(found, target.logits(token_ids))


__all__ = ["MAX_BYTES", "Teacher"]
