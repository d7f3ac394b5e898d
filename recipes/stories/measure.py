"""Bits per character, agreement of draft and target, time of a pass."""

import math

import torch
from corpus import Story
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM


def pad(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of different length as one tensor, filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


@torch.no_grad()
def story_nats(
    model: LlamaForCausalLM, encoded: list[list[int]], context: int, batch: int = 16
) -> list[float]:
    """The nats of every story's tokens after BOS, EOS included.

    A story longer than the context continues in a second window that sees half a context of
    what came before.
    """
    model.eval()
    nats = [0.0] * len(encoded)
    windows = []
    for index, ids in enumerate(encoded):
        windows.append((index, ids[: context + 1], 1))
        done = context + 1
        while done < len(ids):
            begin = done - context // 2
            windows.append((index, ids[begin : begin + context + 1], done - begin))
            done = begin + context + 1
    windows.sort(key=lambda window: len(window[1]))
    for at in range(0, len(windows), batch):
        part = windows[at : at + batch]
        rows = pad([ids for _, ids, _ in part], 0)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        losses = functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        for row, (index, ids, first) in enumerate(part):
            nats[index] += losses[row, first - 1 : len(ids) - 1].double().sum().item()
    return nats


def bits_per_character(
    model: LlamaForCausalLM, stories: list[Story], encoded: list[list[int]], context: int
) -> dict[str, float]:
    """Bits per character of the stories of each file and of all; EOS counts in the bits only."""
    nats = story_nats(model, encoded, context)
    result = {}
    for source in [*sorted({story.source for story in stories}), "all"]:
        chosen = [i for i, story in enumerate(stories) if source in (story.source, "all")]
        characters = sum(len(stories[i].text) for i in chosen)
        bits = sum(nats[i] for i in chosen) / math.log(2)
        result[source] = round(bits / characters, 4)
    return result
