"""Boost-tuning: a pool of draft models, each trained on what those before it cannot say.

SpecInfer (arXiv:2305.09781, section 3) converts a corpus into prompts, lets the target continue
each, and fine-tunes the pool one model at a time, to the full: model j on the pairs of prompt and
continuation that are left, after which all prompts are dropped whose continuation the model says
exactly like the target. It is adaptive boosting without labels: the target's output is the label.

What is dropped here is a *window*: W tokens of the target's output, with everything before them
as their prompt. That is the paper's prompt and continuation, with a continuation as long as a
draft; an output holds one for every W tokens. Whole outputs of 128 tokens are hardly ever said
exactly, so that nothing would be dropped and every model would be trained alike, and a draft is
never asked for more than a few tokens. A window is *covered* by a model whose greedy continuation
of the window's prefix is the window. A greedy continuation equals W given tokens exactly if each of
them is the model's first choice behind the target's own text, so one pass over a text decides all
its windows.

Model j is trained on whole texts, with the loss on the tokens of windows that are left: those of a
window that is covered stay as context. Texts with no window left are not trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.errors import ConfigError
from foretoken.models.trainable import TrainableModel, load_trainable, save_trainable
from foretoken.training.corpus import Example
from foretoken.training.folder import RunFolder, write_json
from foretoken.training.loop import LoopConfig, ShuffledBatches, train

RECORD_FILE = "training_record.json"
IGNORED = -100  # a label that the loss leaves out
SCORING_LOGITS = 2**26  # of one scoring pass, unless a single text has more

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

Draft model {number} of a pool for speculative decoding, trained by `foretoken train boost`
(boost-tuning, SpecInfer, arXiv:2305.09781) on outputs of its target, {target}.

| | |
|---|---|
| parameters | {num_parameters:,} |
| started from | {start} |
| trained on | {num_left:,} of {num_windows:,} windows of {window} tokens |
| steps, texts per step | {num_steps:,}, {batch_size} |
| loss of the first and the last tenth of the steps | {first_loss:.3f}, {last_loss:.3f} |

Use it with the others of its pool, whose drafts are merged:

```sh
foretoken generate --model {target} {drafters} "..."
```
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How a pool is trained.

    Args:
        size: Models.
        window: Tokens of a window.
        num_steps: Steps of every model; all have the same budget.
        batch_size: Texts per step.
        learning_rate: The highest.
        seed: Model j shuffles by `seed + j`.
    """

    size: int
    window: int
    num_steps: int
    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Member:
    """A trained model of a pool.

    Args:
        path: Its directory.
        record: What it was trained on and how, as its `training_record.json` says.
    """

    path: Path
    record: dict[str, Any]


class PoolTrainer:
    """Trains pools on one corpus; members that are there already are not trained again.

    Args:
        examples: Prompts with the target's outputs.
        config: How.
        start: Directory of the model that every member starts from.
        folder: Receives a folder for every member.
        target: The target's name, for the model cards.
        device: Where to train.
        on_progress: Told about every step.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: PoolConfig,
        start: Path,
        folder: RunFolder,
        *,
        target: str,
        device: str = "auto",
        on_progress: OnProgress = silent,
    ) -> None:
        self._examples = list(examples)
        self._config = config
        self._start = start
        self._folder = folder
        self._target = target
        self._device = device
        self._on_progress = on_progress

    def boosted(self) -> list[Member]:
        """Train the pool by boosting; it ends early if no window is left to train on."""
        left = all_windows(self._examples, self._config.window)
        members: list[Member] = []
        for number in range(1, self._config.size + 1):
            if not any(bool(windows.any()) for windows in left):
                break
            members.append(self._member(f"draft-{number}", number, left))
            if number < self._config.size:
                left = self.drop_covered(left, members[-1].path)
        return members

    def control(self, boosted: Sequence[Member]) -> list[Member]:
        """Train as many models on all windows, in other orders, with the same budget each.

        Args:
            boosted: The boosted pool. Its first member is the control's first one as well: before
                it nothing was dropped.
        """
        left = all_windows(self._examples, self._config.window)
        numbers = range(2, len(boosted) + 1)
        return [boosted[0], *(self._member(f"control/draft-{n}", n, left) for n in numbers)]

    def drop_covered(self, left: Sequence[Tensor], path: Path) -> list[Tensor]:
        """Return the windows that are left when those are dropped that a model covers."""
        model = load_trainable(path, device=self._device)
        hits = first_choices(model, self._examples)
        covered = [window_hits(hit, self._config.window) for hit in hits]
        return [windows & ~done for windows, done in zip(left, covered, strict=True)]

    def _member(self, name: str, number: int, left: Sequence[Tensor]) -> Member:
        path = self._folder.path / name
        if not (path / RECORD_FILE).exists():
            self._train(name, number, left)
        else:
            num_steps = self._config.num_steps
            self._on_progress(
                Progress(stage=f"training {name}", done=num_steps, total=num_steps, is_resumed=True)
            )
        return Member(path, json.loads((path / RECORD_FILE).read_text(encoding="utf-8")))

    def _train(self, name: str, number: int, left: Sequence[Tensor]) -> None:
        config, stage = self._config, f"training {name}"
        chosen = [i for i, windows in enumerate(left) if bool(windows.any())]
        model = load_trainable(self._start, device=self._device)
        checkpoint = self._folder.path / f"{name.replace('/', '-')}.checkpoint"
        if checkpoint.exists():
            self._on_progress(
                Progress(stage=stage, done=0, total=config.num_steps, is_resumed=True)
            )
        batches = ShuffledBatches(len(chosen), config.batch_size, config.seed + number)

        def batch_at(step: int) -> tuple[Tensor, Tensor]:
            places = [chosen[index] for index in batches.indices(step)]
            return labelled_batch(
                [self._examples[place] for place in places],
                [left[place] for place in places],
                config.window,
                model.device,
            )

        def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
            token_ids, labels = batch
            logits = model.logits(token_ids).float()
            return functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
            )

        def on_step(num_done: int, loss: float) -> None:
            self._on_progress(
                Progress(
                    stage=stage,
                    done=num_done,
                    total=config.num_steps,
                    detail=f"loss {loss:.3f}",
                )
            )

        loop = LoopConfig(
            num_steps=config.num_steps,
            learning_rate=config.learning_rate,
            num_warmup_steps=max(1, min(20, config.num_steps // 10)),
            seed=config.seed + number,
        )
        losses = train(
            model.module, batch_at, loss_of, loop, checkpoint=checkpoint, on_step=on_step
        )
        record = self._record(number, left, len(chosen), losses)
        self._folder.build(name, lambda folder: self._export(model, folder, name, record))
        checkpoint.unlink(missing_ok=True)

    def _record(
        self, number: int, left: Sequence[Tensor], num_texts: int, losses: Sequence[float]
    ) -> dict[str, Any]:
        tenth = math.ceil(len(losses) / 10)
        return {
            "number": number,
            "num_windows": sum(len(windows) for windows in left),
            "num_windows_left": sum(int(windows.sum()) for windows in left),
            "num_texts": num_texts,
            "num_steps": len(losses),
            "first_loss": round(sum(losses[:tenth]) / tenth, 4),
            "last_loss": round(sum(losses[-tenth:]) / tenth, 4),
        }

    def _export(
        self, model: TrainableModel, folder: Path, name: str, record: dict[str, Any]
    ) -> None:
        config = self._config
        parent = Path(name).parent
        names = [parent / f"draft-{number}" for number in range(1, config.size + 1)]
        card = CARD.format(
            name=f"{Path(name).name} of a pool of {config.size}",
            number=record["number"],
            target=self._target,
            num_parameters=model.num_parameters,
            start=self._start.name,
            num_left=record["num_windows_left"],
            num_windows=record["num_windows"],
            window=config.window,
            num_steps=config.num_steps,
            batch_size=config.batch_size,
            first_loss=record["first_loss"],
            last_loss=record["last_loss"],
            drafters=" ".join(f"--drafter draft-model:path={path}" for path in names),
        )
        save_trainable(model, folder, card)
        write_json(folder / RECORD_FILE, record)


def all_windows(examples: Sequence[Example], window: int) -> list[Tensor]:
    """Return for every text a mark for every window; an output's last one may be shorter."""
    return [
        torch.ones(math.ceil(len(example.output_ids) / window), dtype=torch.bool)
        for example in examples
    ]


def window_hits(hits: Tensor, window: int) -> Tensor:
    """Return which windows have all their tokens marked.

    Args:
        hits: A mark for every output token.
        window: Tokens of a window.
    """
    num_missing = -len(hits) % window
    return functional.pad(hits, (0, num_missing), value=True).view(-1, window).all(dim=1)


def labelled_batch(
    examples: Sequence[Example], left: Sequence[Tensor], window: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, [B, T]; labels are ignored outside the windows that are left.

    Args:
        examples: The texts.
        left: For every text, which of its windows are left.
        window: Tokens of a window.
        device: Where the batch goes.
    """
    width = max(len(example.token_ids) for example in examples) - 1
    token_ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED)
    for row, (example, windows) in enumerate(zip(examples, left, strict=True)):
        ids = torch.tensor(example.token_ids)
        token_ids[row, : len(ids) - 1] = ids[:-1]
        is_left = windows.repeat_interleave(window)[: len(example.output_ids)]
        start = len(example.prompt_ids) - 1
        wanted = torch.where(is_left, ids[start + 1 :], IGNORED)
        labels[row, start : len(ids) - 1] = wanted
    return token_ids.to(device), labels.to(device)


@torch.no_grad()
def choice_ranks(model: TrainableModel, examples: Sequence[Example]) -> list[Tensor]:
    """Return for every output token how many tokens the model prefers to it; 0: its first choice.

    Ties go to the lowest id, as in greedy decoding.
    """
    ranks: list[Tensor] = [torch.empty(0)] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].token_ids))
    longest = max(len(example.token_ids) for example in examples)
    num_rows = max(1, min(16, SCORING_LOGITS // (longest * model.vocab_size)))
    for start in range(0, len(order), num_rows):
        places = order[start : start + num_rows]
        width = max(len(examples[place].token_ids) for place in places)
        token_ids = torch.zeros(len(places), width, dtype=torch.long)
        for row, place in enumerate(places):
            token_ids[row, : len(examples[place].token_ids)] = torch.tensor(
                examples[place].token_ids
            )
        logits = model.logits(token_ids.to(model.device)).float().cpu()
        for row, place in enumerate(places):
            example = examples[place]
            first, last = len(example.prompt_ids) - 1, len(example.token_ids) - 1
            ranks[place] = _ranks(logits[row, first:last], torch.tensor(example.output_ids))
    return ranks


def first_choices(model: TrainableModel, examples: Sequence[Example]) -> list[Tensor]:
    """Return for every output token whether it is the model's first choice at its place."""
    return [ranks == 0 for ranks in choice_ranks(model, examples)]


def check_fit(model: TrainableModel, num_tokens: int) -> None:
    """Check that a model can be trained on texts of this many tokens.

    Raises:
        ConfigError: They are longer than the model's context.
    """
    if num_tokens > model.context_limit:
        raise ConfigError(
            f"prompt and output may have {num_tokens} tokens; the model to train takes "
            f"{model.context_limit}",
            hint="lower --max-new-tokens or leave long prompts out",
        )


def _ranks(logits: Tensor, token_ids: Tensor) -> Tensor:
    own = logits.gather(1, token_ids.unsqueeze(1))
    is_before = torch.arange(logits.shape[1]) < token_ids.unsqueeze(1)
    return ((logits > own) | ((logits == own) & is_before)).sum(dim=1)


__all__ = [
    "Member",
    "PoolConfig",
    "PoolTrainer",
    "all_windows",
    "check_fit",
    "choice_ranks",
    "first_choices",
    "labelled_batch",
    "window_hits",
]
