"""How well a model knows texts that it was not trained on, at every depth it may be left at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from foretoken.models.trainable import TrainableModel
from foretoken.training.looped.losses import logits_by_depth

MAX_ROWS = 16  # of a pass


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text, as much as a model reads at once.

    Args:
        token_ids: With the one behind the last that is predicted.
        first: The first place whose token counts; those before it counted in an earlier window.
    """

    token_ids: list[int]
    first: int


@dataclass(frozen=True, slots=True)
class DepthQuality:
    """How well texts are known at each depth, the last one being the model's own.

    Args:
        bits_per_character: Of all texts together, their ends included.
        agreement: Share of places where the likeliest token is the last depth's: how often an
            early guess is right.
        num_tokens: Predicted.
    """

    bits_per_character: list[float]
    agreement: list[float]
    num_tokens: int

    def described(self) -> dict[str, object]:
        """Return the numbers as a report has them."""
        return {
            "bits_per_character": [round(it, 4) for it in self.bits_per_character],
            "agreement": [round(it, 4) for it in self.agreement],
            "num_tokens": self.num_tokens,
        }


@torch.no_grad()
def depth_quality(
    model: TrainableModel, texts: Sequence[Sequence[int]], num_characters: int, context: int
) -> DepthQuality:
    """Measure a model on texts; what is longer than the context sees half a context of its past.

    Args:
        model: Looped, or plain and then with one depth; it may be in training, and stays so.
        texts: Token ids, each with the tokens that begin and end it.
        num_characters: Of the texts together.
        context: Tokens of a window.
    """
    was_training = model.module.training
    model.module.eval()
    nats, same, num_tokens = torch.zeros(()), torch.zeros(()), 0
    for rows, is_asked in _batches(windows(texts, context), model.device):
        targets = rows[:, 1:][is_asked]
        logits = [it[is_asked].float() for it in logits_by_depth(model, rows[:, :-1])]
        losses = [functional.cross_entropy(it, targets, reduction="sum") for it in logits]
        choices = torch.stack([it.argmax(dim=-1) for it in logits])
        nats = nats + torch.stack(losses).double().cpu()
        same = same + (choices == choices[-1]).sum(dim=-1).cpu()
        num_tokens += len(targets)
    model.module.train(was_training)
    bits = nats / math.log(2)
    return DepthQuality((bits / num_characters).tolist(), (same / num_tokens).tolist(), num_tokens)


def windows(texts: Sequence[Sequence[int]], context: int) -> list[Window]:
    """Return windows in which every token but the first of each text counts once.

    Args:
        texts: Token ids.
        context: Most tokens that predict one.
    """
    found = []
    for text in texts:
        start, first = 0, 0
        while start + first + 1 < len(text):
            ids = list(text[start : start + context + 1])
            found.append(Window(ids, first))
            done = start + len(ids) - 1  # the next place to count
            start = done - context // 2
            first = done - start
    return found


def _batches(parts: Sequence[Window], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows side by side, filled with 0 at the right, and which of their places count."""
    ordered = sorted(parts, key=lambda part: len(part.token_ids))
    for begin in range(0, len(ordered), MAX_ROWS):
        batch = ordered[begin : begin + MAX_ROWS]
        width = max(len(part.token_ids) for part in batch)
        rows = torch.zeros(len(batch), width, dtype=torch.long)
        is_asked = torch.zeros(len(batch), width - 1, dtype=torch.bool)
        for row, part in enumerate(batch):
            rows[row, : len(part.token_ids)] = torch.tensor(part.token_ids)
            is_asked[row, part.first : len(part.token_ids) - 1] = True
        yield rows.to(device), is_asked.to(device)


__all__ = ["DepthQuality", "depth_quality", "windows"]
