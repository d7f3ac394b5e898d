"""The model card of a trained head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foretoken.training.forecast import PLAIN
from foretoken.training.gather import Gathered, shown_name
from foretoken.training.heads.settings import HeadSettings

CARD = """\
---
tags: [speculative-decoding]
---

# {kind} head for {target}

Drafts what {target} will say, from the states of {target} itself. Trained by
`foretoken train head {kind}` on {num_texts:,} of the target's own outputs ({num_tokens:,} tokens).

| | |
|---|---|
| parameters trained | {num_parameters:,} |
| options | {options} |
| steps, texts per step | {num_steps:,}, {batch_size} |
| loss | {loss}, temperature {temperature:g} |
| loss on other texts, before and after | {before:.3f}, {after:.3f} |
{served}
```sh
foretoken generate --model {target} --drafter {kind}:path=DIR "..."
```
"""
SERVED = """\
| tokens per step, served on other texts | {tokens_per_step:.2f} |
| tokens per second, plain and with this head | {plain:.1f}, {tokens_per_s:.1f} |
"""


def card(
    settings: HeadSettings,
    gathered: Gathered,
    record: Mapping[str, Any],
    served: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Return the text of a head's README.md.

    Args:
        settings: Of the run.
        gathered: What it was trained on.
        record: What its training was.
        served: What serving it gave, as `compare_served` returns it; None before that.
    """
    options = ", ".join(f"{key}={value}" for key, value in settings.options.items())
    rows = ""
    if served is not None:
        own, plain = served[settings.kind], served[PLAIN]["tokens_per_s"]
        rows = SERVED.format(
            tokens_per_step=own["tokens_per_step"], tokens_per_s=own["tokens_per_s"], plain=plain
        )
    return CARD.format(
        kind=settings.kind,
        target=shown_name(settings.model),
        num_texts=len(gathered.examples),
        num_tokens=sum(len(text.output_ids) for text in gathered.examples),
        num_parameters=record["num_parameters"],
        options=options or "the kind's own",
        num_steps=record["num_steps"],
        batch_size=settings.batch_size,
        loss=settings.loss,
        temperature=settings.temperature or 1.0,
        before=record["held_out_loss"]["before"],
        after=record["held_out_loss"]["after"],
        served=rows,
    )


__all__ = ["card"]
