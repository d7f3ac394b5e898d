"""A target that says what it is told: its passes run as ever, then one logit per row is raised.

Small targets do not do what a workload is about: they neither repeat a text with edits on request
nor say what cannot be guessed. With a script for a prompt, the next token of the script becomes
the likeliest at every place whose whole past is the prompt and the script. Everywhere else, below
wrong draft tokens too, the model says what it says by itself. So passes, drafts, verification and
commits are real, and drafters see nothing of the script that a target of that opinion would not
show them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from foretoken.bench.clocks import NOTHING, Seconds
from foretoken.engine.scheduler import Work
from foretoken.engine.step import StepParts
from foretoken.models.adapter import ForwardOutput
from foretoken.models.batch import RaggedBatch, Segment

CERTAIN = 1e4  # far above any logit of a model, and finite in every type

Scripts = Mapping[tuple[int, ...], Sequence[int]]


@dataclass(slots=True)
class Prompter:
    """What a target's being told costs, which a target of that opinion would not need.

    Args:
        spent: Until now.
    """

    spent: Seconds = NOTHING


@contextmanager
def scripted(parts: StepParts, scripts: Scripts) -> Iterator[Prompter]:
    """Make an engine's target follow scripts until the context ends; an empty mapping does nothing.

    Args:
        parts: Of an engine that nobody else uses meanwhile.
        scripts: Prompt to output; requests with other prompts are left alone.
    """
    prompter = Prompter()
    if not scripts:
        yield prompter
        return
    scheduler, target = parts.scheduler, parts.target
    schedule, forward = scheduler.schedule, target.forward
    works: list[Work] = []

    def watched_schedule() -> list[Work]:
        works[:] = schedule()
        return list(works)

    def raised_forward(batch: RaggedBatch, rows: Sequence[int], **more: Any) -> ForwardOutput:
        output = forward(batch, rows, **more)
        start = Seconds.now()
        places, token_ids = _choices(works, batch, rows, scripts)
        with torch.inference_mode():  # which the logits of some models come from
            output.logits[places, token_ids] = CERTAIN
        prompter.spent = prompter.spent.plus(Seconds.now().since(start))
        return output

    with (
        _replaced(scheduler, "schedule", watched_schedule),
        _replaced(target, "forward", raised_forward),
    ):
        yield prompter


@contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let one object have another method; one that it had of its own comes back."""
    before = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _choices(
    works: Sequence[Work], batch: RaggedBatch, rows: Sequence[int], scripts: Scripts
) -> tuple[list[int], list[int]]:
    """Return which logits are raised: places among the rows asked for, and token ids."""
    place_of = {row: place for place, row in enumerate(rows)}
    places, token_ids = [], []
    for work, segment, start in zip(works, batch.segments, batch.starts, strict=False):
        script = scripts.get(tuple(work.request.prompt_ids), ())
        num_said = work.start - work.request.num_prompt_ids
        for node, number in _followers(segment, num_said, work.num_known, script):
            place = place_of.get(start + node)
            if place is not None:
                places.append(place)
                token_ids.append(script[number])
    return places, token_ids


def _followers(
    segment: Segment, num_said: int, num_known: int, script: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Yield the nodes on the script, each with the index in the script of what comes after it.

    Args:
        segment: The known tokens as a chain, then the draft's.
        num_said: Index in the script of the first node; negative within the prompt.
        num_known: How many nodes stand; those follow the script or are of the prompt.
        script: What is to be said.
    """
    following: dict[int, int] = {}  # node to the index of what comes after it
    for node, (token_id, parent) in enumerate(zip(segment.token_ids, segment.parents, strict=True)):
        if node < num_known:
            number = num_said + node
        elif parent in following and token_id == script[following[parent]]:
            number = following[parent]
        else:
            continue
        if number + 1 < len(script):
            following[node] = number + 1
            if number >= -1:
                yield node, number + 1


__all__ = ["CERTAIN", "scripted"]
