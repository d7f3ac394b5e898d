"""Cascade: several draft models grow one tree, and cheaper drafters save them passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.options import ComponentSpec, build_options
from foretoken.drafters import DRAFTERS
from foretoken.drafters.base import DraftContext, Drafter, DrafterHost, Follower, Taxonomy
from foretoken.drafters.cascade_stage import CascadeStage, StageOptions, joint_policy
from foretoken.drafters.composite import (
    CompositeDrafter,
    build_members,
    check_capable,
    check_members,
    numbered,
)
from foretoken.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from foretoken.drafters.growth import GrowingTree
from foretoken.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeOptions:
    """Options of `cascade`.

    Args:
        of: Draft models, such as `draft-model(path=BIG,max_depth=2)+draft-model(path=SMALL)`. Each
            drafts as many levels as its `max_depth` or `expansion` says, below those of the ones
            before it.
        guess: Drafters that guess what the draft models will draft, such as `suffix`.
        max_guess: Most tokens that are guessed for each pass of a draft model.
    """

    of: tuple[ComponentSpec, ...]
    guess: tuple[ComponentSpec, ...] = ()
    max_guess: int = 4

    def __post_init__(self) -> None:
        check_members("cascade:of", self.of)
        for spec in self.of:
            if DRAFTERS.load(spec.name) is not DraftModelDrafter:
                raise ConfigError(
                    f"cascade:of is for drafters draft-model; got {spec.name}",
                    hint="let retrieval continue a cascade: tail:of=cascade(...),then=suffix",
                )
        if self.guess:
            check_members("cascade:guess", self.guess)
            check_capable("cascade:guess", self.guess, Follower, "continue the drafts of others")
        if self.max_guess < 1:
            raise ConfigError(
                f"cascade:max_guess is at least 1; got {self.max_guess}", hint="leave out guess"
            )
        joint_policy(self.models)  # raises for models whose trees do not go together

    @property
    def models(self) -> tuple[DraftModelOptions, ...]:
        """Options of the draft models, the first to draft first."""
        return tuple(build_options(DraftModelOptions, spec) for spec in self.of)


class CascadeDrafter(CompositeDrafter):
    """Grows one tree per request, its first levels with the first draft model, and so on.

    Early positions decide over the later ones, so the larger model drafts these (horizontal
    cascade). Beside the rows whose logits are wanted, a pass runs what a cheap drafter guesses to
    come below them: levels whose nodes were all guessed need no pass (vertical cascade). A guess
    changes the number of passes and never the draft.

    Source: CS-Drafting, arXiv:2312.11462. There the guesses of the cheaper drafter may stay in the
    draft; here the draft is the one that the models alone would have made.
    """

    Options: ClassVar[type[Any]] = CascadeOptions
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        source="several drafters (cascade)",
        is_trained=True,
        termination="adaptive (static with expansion)",
        structure="tree",
        reference="CS-Drafting, arXiv:2312.11462",
    )
    draws: ClassVar[frozenset[SiblingDraw]] = frozenset(SiblingDraw)

    def __init__(
        self, stages: dict[str, CascadeStage], guessers: dict[str, Drafter], max_guess: int
    ) -> None:
        """Take stages that were built with the options of all, in their order."""
        super().__init__({**stages, **guessers})
        self._stages = list(stages.values())
        self._labels = [label for label, it in stages.items() for _ in range(it.num_levels)]
        self._levels = [it for it in self._stages for _ in range(it.num_levels)]
        self._guessers = [it for it in guessers.values() if isinstance(it, Follower)]
        self._max_guess = max_guess

    @classmethod
    def create(cls, options: CascadeOptions, host: DrafterHost) -> CascadeDrafter:
        """Load the draft models and build those that guess.

        Raises:
            ModelError: A model cannot be loaded, or its tokens are not the target's.
        """
        models = options.models
        # Guesses are staged beside the nodes of the trees.
        num_guessed = sum(it.depth_limit for it in models) * options.max_guess * host.max_requests
        roomy = replace(host, kv_cache_tokens=host.kv_cache_tokens + num_guessed)
        stages = [
            CascadeStage.create(StageOptions.of(models, index), roomy)
            for index in range(len(models))
        ]
        return cls(
            numbered((spec.name, it) for spec, it in zip(options.of, stages, strict=True)),
            build_members(options.guess, host),
            options.max_guess,
        )

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return one tree per context; a pass serves all that wait for the same model."""
        for stage in self._stages:
            contexts = stage.fitting(contexts, self._max_guess)
        contexts = [self._begin(context) for context in contexts]
        trees = [self._stages[0].plant(context) for context in contexts]
        growing = [pair for pair in zip(contexts, trees, strict=True) if pair[1].frontier]
        while growing:
            ready = [pair for pair in growing if self._stage(pair[1]).ask(*pair)]
            if not ready:
                self._run(growing)
                ready = growing
            rows = [row for context, tree in ready for row in self._stage(tree).rows(context, tree)]
            self._stages[0].grow(ready, torch.stack(rows))
            growing = [pair for pair in growing if pair[1].frontier]
        return [self._finish(context, tree) for context, tree in zip(contexts, trees, strict=True)]

    def _begin(self, context: DraftContext) -> DraftContext:
        """Let every model begin a step; return the context, as deep as all have positions for."""
        room = min(stage.begin(context) for stage in self._stages)
        budget = replace(context.budget, max_depth=max(0, min(context.budget.max_depth, room)))
        return replace(context, budget=budget)

    def _stage(self, tree: GrowingTree) -> CascadeStage:
        """Return the model whose logits the frontier of a tree waits for."""
        return self._levels[tree.depth]

    def _run(self, growing: Sequence[tuple[DraftContext, GrowingTree]]) -> None:
        """Run one pass of every model that a tree waits for."""
        for stage in self._stages:
            waiting = [pair for pair in growing if self._stage(pair[1]) is stage]
            if waiting:
                for context, tree in waiting:
                    self._guess(stage, context, tree)
                stage.run(waiting)

    def _guess(self, stage: CascadeStage, context: DraftContext, tree: GrowingTree) -> None:
        """Add to the rows of the next pass what may come below the likeliest frontier node."""
        # Rows are of use at the levels that are this model's, and not of the last one's children.
        last = len(self._levels) - 1 - self._levels[::-1].index(stage)
        num_levels = min(last, context.budget.max_depth - 1) - tree.depth
        if num_levels < 1:
            return
        budget = replace(context.budget, max_nodes=self._max_guess, max_depth=num_levels)
        node = max(tree.frontier, key=tree.totals.__getitem__)
        for guesser in self._guessers:
            guess = guesser.follow(replace(context, budget=budget), tree.paths[node])
            stage.add_guess(context, node, guess.tree)

    def _finish(self, context: DraftContext, tree: GrowingTree) -> Draft:
        """Return the draft; the model of a node's level is its source."""
        draft = tree.finish(self._labels[0], context.siblings)
        sources = ["", *(self._labels[depth - 1] for depth in draft.tree.depths[1:])]
        return replace(draft, source=tuple(sources))
