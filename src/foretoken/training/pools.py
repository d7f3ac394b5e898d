"""What pools of draft models gain on texts that none of them was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.core.verdict import Exactness
from foretoken.engine.llm import LLM
from foretoken.errors import ForetokenError
from foretoken.models.trainable import load_trainable
from foretoken.training.boost import choice_ranks, window_hits
from foretoken.training.corpus import Example

NUM_RESAMPLES = 2000
STAGE = "measuring"
TREE_WIDTH = 4  # most children of a node in a single model's tree

Counts = NDArray[np.int64]  # [2, prompts]: how many, and of how many


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """What a pool reaches on held-out texts; every field counts per text, how many of how many.

    Args:
        covered_windows: Windows that a model of the pool continues like the target.
        first_choices: Output tokens that are the first choice of a model of the pool.
        tokens_per_step: Output tokens of serving with the pool's chains merged, of its steps.
    """

    covered_windows: Counts
    first_choices: Counts
    tokens_per_step: Counts

    def shares(self) -> dict[str, float]:
        """Return the ratio over all texts by the field's name."""
        return {item.name: round(ratio(getattr(self, item.name)), 4) for item in fields(self)}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What pools are measured on.

    Args:
        examples: Prompts with the target's outputs.
        params: With which they were sampled.
        window: Tokens of a window, and draft tokens of a chain.
    """

    examples: Sequence[Example]
    params: Sequence[SamplingParams]
    window: int


class PoolMeter:
    """Measures pools of models from size 1 to all of them.

    Args:
        model: The target.
        held_out: What on.
        machine: `device` of the models, and `threads`.
        on_progress: Told about every pool that is served.
    """

    def __init__(
        self,
        model: str,
        held_out: HeldOut,
        machine: Mapping[str, Any],
        on_progress: OnProgress = silent,
    ) -> None:
        self._model = model
        self._held_out = held_out
        self._machine = dict(machine)
        self._on_progress = on_progress

    def measure(self, paths: Sequence[Path], sizes: Sequence[int], what: str) -> list[PoolCounts]:
        """Return the counts of the pool's first models, for each of the sizes.

        Args:
            paths: Directories of the models, in order.
            sizes: How many of them.
            what: The pool's name in progress reports.

        Raises:
            ForetokenError: Serving gave other tokens than the corpus has.
        """
        ranks = [self._ranks(path) for path in paths]
        llm = LLM(
            self._model,
            drafters=[self._spec(path) for path in paths],
            max_nodes=self._held_out.window * len(paths),
            **self._machine,
        )
        labels = list(llm.engine.drafters)
        counts = []
        for size in sizes:
            stage = f"{STAGE} {what} of {size}" if len(sizes) > 1 else f"{STAGE} {what}"
            self._on_progress(Progress(stage=stage, done=0, total=1))
            served = self._serve(llm, labels[:size])
            counts.append(self._counts(ranks[:size], served))
            self._on_progress(Progress(stage=stage, done=1, total=1))
        return counts

    def best_choices(self, path: Path, num_choices: int) -> float:
        """Return the share of output tokens among a single model's `num_choices` first choices."""
        ranks = torch.cat(self._ranks(path))
        return round((ranks < num_choices).double().mean().item(), 4)

    def tree(self, path: Path, num_chains: int) -> Counts:
        """Return output tokens and steps of serving with a single model's tree.

        Args:
            path: The model's directory.
            num_chains: The tree has as many nodes as that many chains, and their depth.
        """
        depth = self._held_out.window
        num_nodes = depth * num_chains
        options = f"max_depth={depth},width={TREE_WIDTH},min_gain=0,max_nodes={num_nodes}"
        llm = LLM(
            self._model,
            drafters=f"draft-model:path={path},{options}",
            max_nodes=num_nodes,
            **self._machine,
        )
        return self._serve(llm, list(llm.engine.drafters))

    def _ranks(self, path: Path) -> list[Tensor]:
        model = load_trainable(path, device=self._machine.get("device", "auto"))
        return choice_ranks(model, self._held_out.examples)

    def _spec(self, path: Path) -> str:
        chain = "-".join(["1"] * self._held_out.window)
        return f"draft-model:path={path},expansion={chain}"

    def _counts(self, ranks: Sequence[Sequence[Tensor]], served: Counts) -> PoolCounts:
        tokens, windows = [], []
        for text in zip(*ranks, strict=True):
            hits = torch.stack([rank == 0 for rank in text])
            covered = torch.stack([window_hits(hit, self._held_out.window) for hit in hits])
            tokens.append(_marked(hits.any(dim=0)))
            windows.append(_marked(covered.any(dim=0)))
        return PoolCounts(np.array(windows).T, np.array(tokens).T, served)

    def _serve(self, llm: LLM, labels: Sequence[str]) -> Counts:
        """Return output tokens and steps of every held-out prompt."""
        examples = self._held_out.examples
        prompts = [list(example.prompt_ids) for example in examples]
        outputs = llm.generate(prompts, self._held_out.params, drafters=labels)
        is_bitwise = llm.engine.exactness is Exactness.BITWISE
        for example, output in zip(examples, outputs, strict=True):
            if tuple(output.token_ids) != example.output_ids and is_bitwise:
                raise ForetokenError(
                    "serving with the trained models gave other tokens than the corpus holds",
                    hint="report this; if the target has changed, collect into a new folder",
                )
        return np.array([[output.stats.num_tokens, output.stats.num_steps] for output in outputs]).T


def difference(one: Counts, other: Counts, seed: int = 0) -> dict[str, Any]:
    """Return how much larger one ratio is, with a 95 % interval over the held-out texts.

    The interval is a bootstrap: texts are resampled, both sides together, percentile method. It
    tells how far these texts scatter; it says nothing of other seeds or corpora.

    Args:
        one: Counts per text.
        other: Of the same texts.
        seed: Of the resamples.
    """
    generator = np.random.default_rng(seed)
    places = generator.integers(0, one.shape[1], size=(NUM_RESAMPLES, one.shape[1]))
    resampled = [ratio(one[:, rows]) - ratio(other[:, rows]) for rows in places]
    low, high = np.percentile(resampled, (2.5, 97.5))
    return {
        "value": round(ratio(one) - ratio(other), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
    }


def ratio(counts: Counts) -> float:
    """Return the ratio over all texts: of totals, not the mean of ratios."""
    count, total = counts.sum(axis=1)
    return float(count / total)


def _marked(marks: Tensor) -> tuple[int, int]:
    return int(marks.sum()), len(marks)


__all__ = ["HeldOut", "PoolCounts", "PoolMeter", "difference", "ratio"]
