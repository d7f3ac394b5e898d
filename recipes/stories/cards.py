"""The model cards."""

from typing import Any

DATA = """\
## Data and licences

Trained on {train} children's stories ({characters:.1f} million characters) of
TinyStories (Eldan and Li 2023, arXiv:2305.07759),
licensed CDLA-Sharing-1.0, as found in four public GitHub repositories: gusjengis/toy-RNN
`40f1854`, mines-opt-ml/decoding-gpt `79274e3`, yuninxia/moe-routing-bench `bb9bb0b` (with their
capitals) and Arnoochka/Transformer-Parallelism `911b9e7` (capitals restored by rule). {held_out}
more stories, chosen by the hash of their opening, were held out of the training of both models
and of the tokenizer. Prompts for measurements, `openings.txt` beside the two models, are openings
of held-out stories.

No text of the data is in this folder; the weights are published under the license of the project
that contains them.
"""

USE = """\
## Use and limits

For demonstrations, tests and benchmarks of speculative decoding without a download. Begin with
the opening of a story; the tokenizer puts `<|bos|>` in front by itself, and a story ends in
`<|eos|>`. The models know nothing but short English children's stories of at most 512 tokens,
often lose their thread, and answer no questions. They inherit what the data has: repeated names,
stereotypes, stories written by a language model. They are not safe or suitable for any other use.
"""

TARGET = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# stories: the target

A small Llama that writes children's stories: the target of the embedded pair.

| | |
|---|---|
| parameters | {parameters:,} ({megabytes:.2f} MB in bfloat16) |
| layers, hidden size | {shape[num_hidden_layers]}, {shape[hidden_size]} |
| heads, key-value heads, head size | {shape[num_attention_heads]}, \
{shape[num_key_value_heads]}, {shape[head_dim]} |
| feed-forward size | {shape[intermediate_size]} |
| vocabulary | 2,048 byte-level BPE entries, input and output embedding tied |
| context | 512 tokens |

It is deep and narrow on purpose: at this size a pass costs what its layers cost to start, so a
draft of one layer is cheap beside it.

## Numbers

Bits per character on the held-out stories, the end of each story included in the bits, with these
bfloat16 weights computed in float32:

| held-out stories from | bits per character |
|---|---|
{bits}

"""

DRAFT = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# stories: the draft

A Llama of one layer, distilled from the target beside it: the draft of the embedded pair. It has
the target's tokenizer.

| | |
|---|---|
| parameters | {parameters:,} ({megabytes:.2f} MB in bfloat16) |
| layers, hidden size | {shape[num_hidden_layers]}, {shape[hidden_size]} |
| heads, key-value heads, head size | {shape[num_attention_heads]}, \
{shape[num_key_value_heads]}, {shape[head_dim]} |
| feed-forward size | {shape[intermediate_size]} |

## Training

Forward KL divergence from the target's distributions plus one minus the overlap of the two, on
{taught:,} tokens: training stories, and {sampled:,} tokens that the target wrote from openings of
training stories at temperatures 0 to 1.

## Numbers

On the target's own continuations (128 tokens) of the 64 held-out openings:

| | |
|---|---|
{numbers}

`greedy_top1` is how often the draft's most likely token is the target's; `overlap` is the sum of
min(p, q), the chance that a sampled draft is accepted. The tokens per step are of an ideal engine:
a chain of {depth} drafts, or a fixed tree of 8 nodes.

A one-token pass of the target takes {cost[ratio]} times as long as one of the draft (transformers,
float32, one row, {threads} threads).

"""


def target_card(record: dict[str, Any], weights: int) -> str:
    """The target's card from the run record."""
    bits = record["evaluate"]["bits_per_character"]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in bits.items())
    part = record["target"]
    head = TARGET.format(
        parameters=part["parameters"],
        megabytes=weights / 1e6,
        shape=part["shape"],
        bits=table,
    )
    return head + _data(record) + "\n" + USE


def draft_card(record: dict[str, Any], weights: int, depth: int) -> str:
    """The draft's card from the run record."""
    numbers = record["evaluate"]["pair"]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in numbers.items())
    part = record["draft"]
    head = DRAFT.format(
        parameters=part["parameters"],
        megabytes=weights / 1e6,
        shape=part["shape"],
        taught=part["teacher_tokens"],
        sampled=record["samples"]["tokens"],
        numbers=table,
        depth=depth,
        cost=record["evaluate"]["cost"],
        threads=record["machine"]["threads"],
    )
    return head + _data(record) + "\n" + USE


def _data(record: dict[str, Any]) -> str:
    train, held_out = record["split"]["train"], record["split"]["held_out"]
    return DATA.format(
        train=f"{train['stories']:,}",
        characters=train["characters"] / 1e6,
        held_out=held_out["stories"],
    )
