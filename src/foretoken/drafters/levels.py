"""One level of draft trees: candidates from a drafter's logits, ranked by the race or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from foretoken.core.draft import SiblingDraw
from foretoken.core.drawing import draw_iid, draw_without_replacement
from foretoken.core.ranking import best_tokens
from foretoken.core.sampling import Frontier, best_guesses
from foretoken.drafters.base import DraftContext
from foretoken.drafters.growth import DrawnTree, GrowingTree

# How far target and draft disagree, as the temperature of the race between candidates; see
# docs/decisions for the measurement.
RACE_TEMPERATURE = 0.5

SAMPLERS = {
    SiblingDraw.IID: draw_iid,
    SiblingDraw.WITHOUT_REPLACEMENT: draw_without_replacement,
}

Growing = tuple[DraftContext, GrowingTree]


def add_level(
    growing: Sequence[Growing],
    logits: Tensor,  # [F, V]
    generator_of: Callable[[DraftContext], np.random.Generator],
) -> None:
    """Add a level to every tree: all that race in one go, the others one by one.

    Args:
        growing: Trees with a frontier.
        logits: A row for every node of their frontiers, tree by tree.
        generator_of: Returns the generator of a context's samples, the same for all levels.
    """
    racing: list[tuple[DraftContext, GrowingTree, slice]] = []
    start = 0
    for context, tree in growing:
        rows = slice(start, start + len(tree.frontier))
        start = rows.stop
        if isinstance(tree, DrawnTree):
            _draw(context, tree, logits[rows], generator_of(context))
        elif context.siblings is SiblingDraw.COUPLED or context.sampler.is_greedy:
            racing.append((context, tree, rows))
        else:
            _rank(context, tree, logits[rows])
    if not racing:
        return
    if len(racing) < len(growing):
        logits = torch.cat([logits[rows] for _, _, rows in racing])
    _race([(context, tree) for context, tree, _ in racing], logits)


def frontier_paths(tree: GrowingTree) -> list[tuple[int, ...]]:
    """Return the draft tokens from below the root to each node of the frontier."""
    return [tree.paths[node] for node in tree.frontier]


def _race(growing: Sequence[Growing], logits: Tensor) -> None:
    """Add the best children of each frontier node by the race, best first."""
    width = max(tree.num_children for _, tree in growing)
    frontiers = [
        Frontier(context.sampler, context.token_ids, frontier_paths(tree))
        for context, tree in growing
    ]
    token_ids, logprobs = best_guesses(logits, frontiers, width, RACE_TEMPERATURE)
    start = 0
    for _, tree in growing:
        stop, num_children = start + len(tree.frontier), tree.num_children
        if num_children < width:
            for row in range(start, stop):
                del token_ids[row][num_children:], logprobs[row][num_children:]
        tree.grow(token_ids[start:stop], logprobs[start:stop])
        start = stop


def _draw(
    context: DraftContext, tree: DrawnTree, logits: Tensor, generator: np.random.Generator
) -> None:
    """Sample the children of each frontier node from the drafter's own distribution."""
    draw = SAMPLERS[context.siblings]
    drawn = []
    for row, node, count in zip(logits, tree.frontier, tree.num_draws, strict=True):
        path = tree.paths[node]
        probs = context.sampler.draft_distribution(row, context.token_ids, path)
        # All zeros where the controls leave nothing to draw.
        drawn.append((draw(probs, count, generator) if probs.any() else [], probs))
    tree.grow_drawn(drawn)


def _rank(context: DraftContext, tree: GrowingTree, logits: Tensor) -> None:
    """Take the likeliest children of each frontier node: no noise, for rules with their own."""
    scores = context.sampler.scores(logits, context.token_ids, frontier_paths(tree))
    tree.grow(*best_tokens(scores, tree.num_children))
