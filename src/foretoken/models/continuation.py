"""What a model in training says itself: continuations of prompts, many at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretoken.models.trainable import TrainableModel


@torch.no_grad()
def continuations(
    model: TrainableModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """Return what a model says behind each prompt, up to and with the end of a text.

    Random numbers are those of torch's own generators. A model that is served speaks through the
    engine, many times faster; this is for one whose weights change at every step.

    Args:
        model: It may have a vocabulary of its own.
        prompts: The target's token ids, at least one each.
        max_new_tokens: Most tokens of each.
        temperature: 0 is greedy.

    Returns:
        The target's token ids, at least one for each prompt.
    """
    from transformers import GenerationConfig

    token_ids, is_token = _left_padded(prompts)
    own = model.vocabulary
    if own is not None:
        token_ids = own.t2d[token_ids]
    # Without these, a model's own generation config would cut its distribution.
    whole = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **whole,
        eos_token_id=getattr(model.config, "eos_token_id", None),
        pad_token_id=0,
    )
    was_training = model.module.training
    model.module.eval()
    written: Tensor = model.module.generate(  # type: ignore[operator]
        input_ids=token_ids.to(model.device),
        attention_mask=is_token.to(model.device),
        generation_config=config,
    )
    model.module.train(was_training)
    rows = [_until_end(row, config.eos_token_id) for row in written[:, token_ids.shape[1] :].cpu()]
    return [(row if own is None else own.d2t[row]).tolist() for row in rows]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    token_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    is_token = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        is_token[row, width - len(prompt) :] = 1
    return token_ids, is_token


def _until_end(row: Tensor, eos: int | list[int] | None) -> Tensor:
    """Return a row without what stands behind its end, which is padding."""
    ends = torch.isin(row, torch.tensor([] if eos is None else eos)).nonzero()
    return row[: int(ends[0]) + 1] if len(ends) else row


__all__ = ["continuations"]
