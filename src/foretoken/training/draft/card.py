"""The model card of a draft model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foretoken.training.draft.settings import DraftSettings
from foretoken.training.gather import shown_name
from foretoken.training.served import PLAIN

DRAFT = "draft"  # its name among the systems that are served

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [speculative-decoding]
---

# Draft model for {target}

Says quickly what {target} is likely to say, which then checks it: speculative decoding gives the
target's own tokens, in fewer of its passes. Made by `foretoken train draft` from {num_texts:,} of
the target's own outputs ({num_tokens:,} tokens); it is no model to talk to by itself.

| | |
|---|---|
| parameters | {num_parameters:,} |
| shape | {shape} |
| shape chosen by | {chosen_by} |
| weights began as | {method} |
| distilled with | {loss}, temperature {temperature:g}, {on_policy:.0%} on policy |
| steps, texts per step | {num_steps:,}, {batch_size} |
| on other texts: first choices shared, before and after | {before:.1%}, {after:.1%} |
{served}
```sh
foretoken generate --model {target} --drafter draft-model:path=DIR "..."
```
"""
SERVED = """\
| on other texts: tokens per step, forecast and served | {forecast:.2f}, {tokens_per_step:.2f} |
| tokens per second, plain and with this draft | {plain:.1f}, {tokens_per_s:.1f} |
| outputs other than plain decoding's | {num_different} |
"""
METHODS = {"prune": "the target's own, pruned", "scratch": "random numbers"}


def card(settings: DraftSettings, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a draft model's README.md.

    Args:
        settings: Of the run.
        results: Of its stages by name; without those of serving before it was served.
    """
    distilled, collected = results["distil"], results["collect"]
    return CARD.format(
        target=shown_name(settings.model),
        num_texts=collected["num_texts"],
        num_tokens=collected["num_tokens"],
        num_parameters=results["initialise"]["num_parameters"],
        shape=results["design"]["shape"],
        chosen_by=results["design"]["chosen_by"],
        method=METHODS[settings.method],
        loss=settings.loss,
        temperature=settings.temperature or 1.0,
        on_policy=settings.on_policy,
        num_steps=distilled["num_steps"],
        batch_size=distilled["batch_size"],
        before=distilled["held_out"]["before"]["agreement"],
        after=distilled["held_out"]["after"]["agreement"],
        served=_served(results) if "verify" in results else "",
    )


def _served(results: Mapping[str, Mapping[str, Any]]) -> str:
    own, plain = results["verify"][DRAFT], results["verify"][PLAIN]
    return SERVED.format(
        forecast=results["forecast"][DRAFT]["tokens_per_step"]["value"],
        tokens_per_step=own["tokens_per_step"],
        plain=plain["tokens_per_s"],
        tokens_per_s=own["tokens_per_s"],
        num_different=own["num_different"],
    )


__all__ = ["DRAFT", "card"]
