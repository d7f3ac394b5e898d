"""One row of a call: its request, and its tokens as `generate` would hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from foretoken.engine.request import Request
from foretoken.models.generation import Criterion, refusal


class Streamer(Protocol):
    """transformers' streamers, such as TextStreamer."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, [1, T], then each token, [1]."""
        ...

    def end(self) -> None:
        """Learn that nothing comes any more."""
        ...


class Row:
    """Takes a row's tokens, asks the stopping criteria after each, and streams them.

    Args:
        request: The row's, not yet submitted.
        input_ids: Padding and prompt, [T].
        room: Most new tokens.
        criteria: Each maps (input_ids [1, T], None) to whether the row ends.
        streamer: Gets the prompt and every token, or None.
    """

    def __init__(
        self,
        request: Request,
        input_ids: Tensor,
        room: int,
        criteria: Sequence[Criterion],
        streamer: Streamer | None,
    ) -> None:
        self.request = request
        self.length = len(input_ids)
        self._tokens = torch.cat((input_ids, input_ids.new_zeros(room)))
        self._criteria = criteria
        self._streamer = streamer

    @property
    def token_ids(self) -> Tensor:
        """Padding, prompt and output so far, [T]."""
        return self._tokens[: self.length]

    def start(self) -> None:
        """Stream the prompt, as `generate` does."""
        if self._streamer is not None:
            self._streamer.put(self.token_ids[None])

    def take(self, token_ids: Sequence[int]) -> bool:
        """Take tokens up to the first that a criterion ends the row with; return if none does."""
        for token_id in token_ids:
            self._tokens[self.length] = token_id
            self.length += 1
            if self._streamer is not None:
                self._streamer.put(self._tokens[self.length - 1 : self.length])
            if any(self._is_end(criterion) for criterion in self._criteria):
                return False
        return True

    def finish(self) -> None:
        """Tell the streamer that nothing comes any more."""
        if self._streamer is not None:
            self._streamer.end()

    def _is_end(self, criterion: Criterion) -> bool:
        return bool(torch.as_tensor(criterion(self.token_ids[None], None)).all())


def split_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Return how many tokens of each row are its prompt; padding stands before it.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], nonzero for the prompt, or None if there is no padding.

    Raises:
        RequestError: Something behind the first token of a prompt is masked.
    """
    if attention_mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    is_prompt = attention_mask != 0
    lengths: list[int] = is_prompt.sum(dim=1).tolist()
    places = torch.arange(input_ids.shape[1])
    for row, length in zip(is_prompt, lengths, strict=True):
        if not torch.equal(row, places >= len(places) - length):
            raise refusal("attention_mask", "it masks something else than padding at the left")
    return lengths


def check_positions(position_ids: Tensor | None, lengths: Sequence[int]) -> None:
    """Check that positions are those that a prompt has by itself.

    Raises:
        RequestError: They are not.
    """
    if position_ids is None:
        return
    for row, length in zip(position_ids.cpu(), lengths, strict=True):
        if not torch.equal(row[len(row) - length :], torch.arange(length)):
            raise refusal("position_ids", "prompts are numbered from 0")


__all__ = ["Row", "Streamer", "check_positions", "split_padding"]
