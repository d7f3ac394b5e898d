"""What `foretoken bench specinfer` measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, count, takewhile
from typing import Any

from foretoken.bench.workloads import Workload
from foretoken.core.draft import SiblingDraw

COUPLED, MSS, NAIVE, REJECTION = "coupled", "mss", "naive", "rejection"
PAPER_RULES = (REJECTION, NAIVE, MSS, COUPLED)
PAPER_DEPTH = 8


class Tree(StrEnum):
    """How a draft tree gets its shape. All of one width may hold equally many nodes."""

    STATIC = "static"  # the paper's expansion <1,1,w,1,1,1,1,1>
    FULL = "full"  # <w,w,...>, as many levels as fit
    BEST_FIRST = "best-first"  # grown by probability, no deeper than the static one
    BEST_FIRST_DEEP = "best-first, any depth"  # likewise, a path may take the whole budget


GROWN = (Tree.BEST_FIRST, Tree.BEST_FIRST_DEEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecInferSettings:
    """What is measured; everything but times of day and the machine's load follows from it.

    Args:
        model: Directory or hub id of the target.
        model_name: What reports call it.
        draft: Directory or hub id of the draft model.
        draft_name: What reports call it.
        workload: Prompts.
        max_new_tokens: Made per output; the end of a sequence is ignored.
        num_seeds: Outputs per prompt at temperature 1.
        seed: Of the first output; then seed + 1, ...
        max_width: Widths 1 to this are measured; >= 2.
        verifiers: Rules beside the paper's and Foretoken's, at temperature 1.
        dtype: As of `LLM`.
        device: As of `LLM`.
        threads: CPU threads.
    """

    model: str
    model_name: str
    draft: str
    draft_name: str
    workload: Workload
    max_new_tokens: int
    num_seeds: int
    seed: int
    max_width: int
    verifiers: tuple[str, ...]
    dtype: str
    device: str
    threads: int

    @property
    def widths(self) -> range:
        """Widths that are measured."""
        return range(1, self.max_width + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One cell of the tables of tokens per step.

    Args:
        tree: Its shape.
        verifier: Name of the acceptance rule.
        draw: How siblings are drawn when sampling; None leaves it to the rule.
        width: Of the expansion; fixes how many nodes a tree may have.
        temperature: 0 is greedy.
    """

    tree: Tree
    verifier: str
    draw: SiblingDraw | None = None
    width: int
    temperature: float

    @property
    def max_nodes(self) -> int:
        """Nodes of the static tree, 2 + 6 w; other trees may have as many."""
        return 2 + (PAPER_DEPTH - 2) * self.width

    @property
    def shape(self) -> dict[str, Any]:
        """Options of `draft-model` that make the tree.

        Best-first trees get no `min_gain`: all trees of a width are to use the same budget.
        """
        if self.tree is Tree.STATIC:
            return {"expansion": (1, 1, self.width, *(1,) * (PAPER_DEPTH - 3))}
        if self.tree is Tree.FULL:
            return {"expansion": (self.width,) * self._full_depth}
        depth = PAPER_DEPTH if self.tree is Tree.BEST_FIRST else self.max_nodes
        return {"max_depth": depth, "min_gain": 0.0}

    @property
    def _full_depth(self) -> int:
        sizes = accumulate(self.width**level for level in count(1))
        return sum(1 for _ in takewhile(lambda size: size <= self.max_nodes, sizes))


def systems(settings: SpecInferSettings, chain_rules: frozenset[str]) -> Iterator[System]:
    """Yield every cell in the order of the tables.

    With temperature 0 every lossless rule keeps the same tokens, so one of them stands for all.
    The paper gives naive sampling the i.i.d. draws of MSS; the likeliest tokens, which it would
    rather have, stand beside them at the largest width. Full trees show what rules make of
    siblings at every level; the static ones have them at one.

    Args:
        settings: What is measured.
        chain_rules: Those verifiers that take chains only, which is width 1.
    """

    def cells(
        tree: Tree, rule: str, draw: SiblingDraw | None = None, *, temperature: float = 1.0
    ) -> Iterator[System]:
        for width in settings.widths[: 1 if rule in chain_rules else None]:
            yield System(tree=tree, verifier=rule, draw=draw, width=width, temperature=temperature)

    for tree in (Tree.STATIC, *GROWN):
        yield from cells(tree, COUPLED, temperature=0.0)
    yield from cells(Tree.STATIC, REJECTION, SiblingDraw.IID)
    yield from cells(Tree.STATIC, NAIVE, SiblingDraw.IID)
    *_, widest = cells(Tree.STATIC, NAIVE, SiblingDraw.DETERMINISTIC)
    yield widest
    yield from cells(Tree.STATIC, MSS, SiblingDraw.IID)
    for rule in settings.verifiers:
        if rule not in PAPER_RULES:
            yield from cells(Tree.STATIC, rule)
    yield from cells(Tree.STATIC, COUPLED)
    yield from cells(Tree.FULL, MSS, SiblingDraw.IID)
    for tree in (Tree.FULL, *GROWN):
        yield from cells(tree, COUPLED)


__all__ = ["COUPLED", "GROWN", "MSS", "NAIVE", "SpecInferSettings", "System", "Tree", "systems"]
