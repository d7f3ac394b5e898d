"""What heads are trained on: texts with the target's states and logits, in padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from foretoken.training.corpus import Example
from foretoken.training.heads.states import LOGITS, States, layer_name


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """Texts with what the target computed of them; all of one device, padded at the right.

    Layers are numbered as transformers numbers `hidden_states`: 0 is the embedding, i the output
    of layer i, and the last one is normalized. Where `is_token` is false everything is zero.

    Args:
        token_ids: Prompts and outputs, [B, T] int64.
        is_token: Which of them are no padding, [B, T] bool.
        is_output: Which of them the target wrote, [B, T] bool. Only predictions of these count.
        hidden: For each layer that the kind asks for, the states at the tokens, [B, T, D] float32.
        logits: The target's logits behind every token, [B, T, V] float32: row t is what it says of
            token t + 1.
    """

    token_ids: Tensor
    is_token: Tensor
    is_output: Tensor
    hidden: Mapping[int, Tensor]
    logits: Tensor


class HeadData:
    """Makes batches of recorded texts.

    Args:
        texts: Prompts with the target's outputs.
        states: The target's states at them; with logits, or with the states after the last layer.
        layers: Whose states a batch is to have.
        last_layer: The layer that the target's head comes after.
        head: The head, from that layer's states to logits, [V, D]; None where logits are among
            the states.
        device: Where batches go.
    """

    def __init__(
        self,
        texts: Sequence[Example],
        states: States,
        layers: Sequence[int],
        *,
        last_layer: int,
        head: Tensor | None,
        device: torch.device,
    ) -> None:
        self._texts = texts
        self._states = states
        self._layers = layers
        self._head = None if head is None else head.to(device, torch.float32)
        self._device = device
        self._last_name = layer_name(last_layer)

    def __len__(self) -> int:
        return len(self._texts)

    def batch(self, places: Sequence[int]) -> HeadBatch:
        """Return the texts at these places."""
        states, device = self._states.read(places), self._device
        token_ids = [torch.tensor(self._texts[place].token_ids) for place in places]
        num_prompt = torch.tensor([len(self._texts[place].prompt_ids) for place in places])
        num_tokens = torch.tensor([len(ids) for ids in token_ids])

        def padded(name: str) -> Tensor:
            rows = [text_states[name] for text_states in states]
            return pad_sequence(rows, batch_first=True).to(device, torch.float32)

        positions = torch.arange(int(num_tokens.max()))
        is_token = positions < num_tokens.unsqueeze(1)
        return HeadBatch(
            token_ids=pad_sequence(token_ids, batch_first=True).to(device),
            is_token=is_token.to(device),
            is_output=(is_token & (positions >= num_prompt.unsqueeze(1))).to(device),
            hidden={layer: padded(layer_name(layer)) for layer in self._layers},
            logits=padded(LOGITS)
            if self._head is None
            else functional.linear(padded(self._last_name), self._head),
        )


__all__ = ["HeadBatch", "HeadData"]
