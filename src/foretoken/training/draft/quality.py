"""How well a draft model knows its target, on texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretoken.models.trainable import TrainableModel
from foretoken.training.corpus import Example
from foretoken.training.draft.distil import DistilBatch

MAX_TEXTS = 8  # of a pass


@torch.no_grad()
def quality(
    student: TrainableModel,
    target: TrainableModel,
    texts: Sequence[Example],
    temperature: float,
) -> dict[str, float]:
    """Return two means over the output tokens.

    Args:
        student: It may have fewer tokens than the target.
        target: On the same device.
        texts: At least one.
        temperature: 0 counts as 1.

    Returns:
        `agreement`, the share of places where both have the same first choice: what a greedy chain
        accepts behind the target's own text; and `overlap`, sum_x min(p, q): what a sampled one
        accepts there (Leviathan et al., arXiv:2211.17192, Corollary 3.6).
    """
    same, overlap = [], []
    for start in range(0, len(texts), MAX_TEXTS):
        batch = DistilBatch.of(texts[start : start + MAX_TEXTS], student.device)
        target_logits = target.logits(batch.token_ids)[batch.is_asked].float()
        draft_logits = _over_all(student, batch, target_logits)
        same.append(draft_logits.argmax(dim=-1) == target_logits.argmax(dim=-1))
        probs = [
            (it / (temperature or 1.0)).softmax(dim=-1) for it in (draft_logits, target_logits)
        ]
        overlap.append(torch.minimum(*probs).sum(dim=-1))
    return {
        "agreement": torch.cat(same).double().mean().item(),
        "overlap": torch.cat(overlap).double().mean().item(),
    }


def _over_all(student: TrainableModel, batch: DistilBatch, like: Tensor) -> Tensor:
    """Return the draft's logits with a column for each of the target's tokens."""
    logits = student.logits(batch.token_ids)[batch.is_asked].float()
    if student.vocabulary is None:
        return logits
    every = torch.full_like(like, -torch.inf)
    return every.index_copy_(1, student.vocabulary.d2t.to(logits.device), logits)


__all__ = ["quality"]
