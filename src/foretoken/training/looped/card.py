"""The model card of a decoder that a run trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foretoken.training.gather import shown_name
from foretoken.training.looped.settings import LoopedSettings

MODEL = "model"  # its folder

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{tags}---

# {title}

{what} Trained by
`foretoken train looped`.

| | |
|---|---|
| parameters | {num_parameters:,} |
| layers that run, layers that are stored | {num_layers}, {num_stored} |
| prelude, group, loops, coda | {loops} |
| channels, feed-forward channels | {hidden}, {intermediate} |
| query heads, key and value heads, channels of a head | {heads}, {kv_heads}, {head_dim} |
| tokens | those of {model} |
| weights began as | random numbers{embedding} |
| trained on | {num_texts:,} texts, {num_tokens:,} tokens |
| steps, tokens per step | {num_steps:,}, {step_tokens:,} |
| optimizer, highest rate | {optimizer}, {learning_rate:g} |
| weights of the losses by depth | {weights} |
{held_out}"""
HELD_OUT = """\

On {num_texts:,} other texts ({num_tokens:,} tokens, their ends included), with the weights as they
are in this folder:

| loops | bits per character | likeliest token is the last loop's |
|---|---|---|
{rows}
"""
USE = """\

Its loops share their weights, so that tokens at different depths of the model can be run in one
pass: speculation inside the target itself.

```sh
foretoken generate --model DIR --drafter speed "..."
```
"""
TITLES = {
    "shared": "Looped Llama",
    "shallow": "Shallow Llama",
    "deep": "Deep Llama",
}
WHAT = {
    "shared": "A Llama whose group of layers runs several times with the same weights.",
    "shallow": "A plain Llama with as many layers as a looped one stores, to compare it with.",
    "deep": "A plain Llama with as many layers as a looped one runs, to compare it with.",
}


def card(settings: LoopedSettings, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a model's README.md.

    Args:
        settings: Of the run.
        results: Of its stages by name; without measurements before it was measured.
    """
    texts, built, is_shared = results["texts"], results["build"], settings.kind == "shared"
    weights = ", ".join(f"{weight:.3g}" for weight in settings.weights)
    loops = settings.loop_shape
    text = CARD.format(
        tags="tags: [speculative-decoding]\n" if is_shared else "",
        title=TITLES[settings.kind],
        what=WHAT[settings.kind],
        model=shown_name(settings.model),
        embedding=", the embedding as that model's" if settings.copies_embedding else "",
        loops=f"{loops.prelude}, {loops.group}, {loops.loops}, {loops.coda}" if is_shared else "-",
        num_texts=texts["num_texts"],
        num_tokens=texts["num_tokens"],
        num_steps=results["pace"]["num_steps"],
        step_tokens=settings.batch_size * settings.context,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        weights=weights,
        held_out=_held_out(texts, results["measure"]) if "measure" in results else "",
        **built,
    )
    return text + (USE if is_shared else "")


def _held_out(texts: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    rows: Sequence[tuple[float, float]] = list(
        zip(measured["bits_per_character"], measured["agreement"], strict=True)
    )
    return HELD_OUT.format(
        num_texts=texts["num_held_out_texts"],
        num_tokens=measured["num_tokens"],
        rows="\n".join(
            f"| {depth} | {bits:.3f} | {share:.1%} |"
            for depth, (bits, share) in enumerate(rows, start=1)
        ),
    )


__all__ = ["MODEL", "card"]
