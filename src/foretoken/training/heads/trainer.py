"""The middle of a run: from gathered texts to a head that is saved."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.engine.names import resolve_model
from foretoken.models.adapter import LanguageModel, ModelInfo
from foretoken.models.heads.target import TargetShape, target_tensors
from foretoken.training.folder import RunFolder, write_json
from foretoken.training.gather import Gathered, shown_name
from foretoken.training.heads.card import card
from foretoken.training.heads.data import HeadBatch, HeadData
from foretoken.training.heads.kinds import KINDS
from foretoken.training.heads.prepare import StateBounds, StateSource, state_source
from foretoken.training.heads.settings import HeadMachine, HeadSettings
from foretoken.training.loop import BucketedBatches, train

HEAD_FOLDER = "head"
RECORD_FILE = "training_record.json"
CHECKPOINT_FILE = "head.checkpoint"
STATES_FOLDER = "states"
STAGE = "training the head"


class HeadTrainer:
    """Trains a head for a target on its texts; one that is there already is not trained again.

    Args:
        settings: What to train, and how.
        module: The head, not trained yet; see `new_head`.
        target: The model that it is for.
        gathered: What the target wrote.
        folder: Receives the head, in a folder of its own.
        machine: Within which bounds.
        on_progress: Told about every step.
    """

    def __init__(
        self,
        settings: HeadSettings,
        module: nn.Module,
        target: LanguageModel,
        gathered: Gathered,
        folder: RunFolder,
        machine: HeadMachine,
        on_progress: OnProgress = silent,
    ) -> None:
        self._settings = settings
        self._module = module
        self._target = target
        self._gathered = gathered
        self._folder = folder
        self._machine = machine
        self._on_progress = on_progress
        self._kind = KINDS.load(settings.kind)
        self._loop = settings.loop(len(gathered.examples))

    @property
    def head_path(self) -> Path:
        """Where the head is."""
        return self._folder.path / HEAD_FOLDER

    def record(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Train and save the head, if it is not there, and return what its training was.

        Args:
            seconds: Receives the time of each stage.

        Raises:
            ConfigError: Loss or states are no finite numbers, or the folder cannot be written.
        """
        if (self.head_path / RECORD_FILE).exists():
            num_steps = self._loop.num_steps
            self._on_progress(
                Progress(stage=STAGE, done=num_steps, total=num_steps, is_resumed=True)
            )
        else:
            self._make(seconds)
        (self._folder.path / CHECKPOINT_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._folder.path / STATES_FOLDER, ignore_errors=True)
        found: dict[str, Any] = json.loads(
            (self.head_path / RECORD_FILE).read_text(encoding="utf-8")
        )
        return found

    def _make(self, seconds: dict[str, float]) -> None:
        settings, target = self._settings, self._target
        with measured(seconds, "states"):
            source = state_source(
                target,
                self._kind.hidden_layers(target.info.num_layers, settings.options),
                target_tensors(resolve_model(settings.model)).head,
                self._gathered.examples[0],
                dtype=settings.states_dtype,
                device=target.info.device,
            )
            data, states = source.held(self._gathered.examples, self._bounds(), self._on_progress)
        weights = self._module.parameters()
        record = {
            "num_parameters": sum(it.numel() for it in weights if it.requires_grad),
            "states": states,
            **self._train(data, source, seconds),
        }
        self._folder.build(HEAD_FOLDER, lambda folder: self._save(folder, record))

    def _bounds(self) -> StateBounds:
        num_used = self._loop.num_steps * self._settings.batch_size
        return StateBounds(
            folder=self._folder.path / STATES_FOLDER,
            max_bytes=self._machine.max_disk_bytes,
            num_uses=num_used / len(self._gathered.examples),
        )

    def _train(
        self, data: HeadData, source: StateSource, seconds: dict[str, float]
    ) -> dict[str, Any]:
        """Train, and return how the loss fell."""
        settings, loop, module = self._settings, self._loop, self._module
        divergence = settings.divergence()
        lengths = [len(text.token_ids) for text in self._gathered.examples]
        batches = BucketedBatches(lengths, settings.batch_size, settings.seed)
        checkpoint = self._folder.path / CHECKPOINT_FILE
        if checkpoint.exists():
            self._on_progress(Progress(stage=STAGE, done=0, total=loop.num_steps, is_resumed=True))

        def batch_at(step: int) -> HeadBatch:
            return data.batch(batches.indices(step))

        def on_step(num_done: int, loss: float) -> None:
            self._on_progress(
                Progress(
                    stage=STAGE, done=num_done, total=loop.num_steps, detail=f"loss {loss:.3f}"
                )
            )

        held_out = source.computed(self._gathered.held_out)
        with measured(seconds, "train"):
            before = self._mean_loss(held_out)
            losses = train(
                module,
                batch_at,
                lambda batch: self._kind.loss(module, batch, divergence),
                loop,
                checkpoint=checkpoint,
                on_step=on_step,
            )
            after = self._mean_loss(held_out)
        tenth = math.ceil(len(losses) / 10)
        return {
            "num_steps": len(losses),
            "first_loss": round(sum(losses[:tenth]) / tenth, 4),
            "last_loss": round(sum(losses[-tenth:]) / tenth, 4),
            "held_out_loss": {"before": round(before, 4), "after": round(after, 4)},
        }

    @torch.no_grad()
    def _mean_loss(self, data: HeadData) -> float:
        """Return the loss over texts that were not trained on."""
        self._module.eval()
        divergence, size = self._settings.divergence(), self._settings.batch_size
        batches = [range(len(data))[start : start + size] for start in range(0, len(data), size)]
        losses = [
            self._kind.loss(self._module, data.batch(it), divergence).item() for it in batches
        ]
        weighted = (loss * len(batch) for loss, batch in zip(losses, batches, strict=True))
        return sum(weighted) / len(data)

    def _save(self, folder: Path, record: dict[str, Any]) -> None:
        text = card(self._settings, self._gathered, record)
        shape = _shape(self._settings, self._target.info)
        self._kind.save(self._module, shape, folder, text)
        write_json(folder / RECORD_FILE, record)


def new_head(settings: HeadSettings, info: ModelInfo) -> nn.Module:
    """Return a head that is not trained yet, on the target's device.

    Args:
        settings: Its kind, the kind's options, and the seed of what is random in it.
        info: Of the target.

    Raises:
        ConfigError: An option of the kind does not exist or is not allowed.
        ModelError: The kind cannot be made for the target.
    """
    tensors = target_tensors(resolve_model(settings.model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        build = KINDS.load(settings.kind).build
        module = build(_shape(settings, info), tensors, settings.options)
    return module.to(info.device)


@contextmanager
def measured(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long a stage takes."""
    start_s = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start_s, 1)


def _shape(settings: HeadSettings, info: ModelInfo) -> TargetShape:
    return replace(TargetShape.of(info), name=shown_name(settings.model))


__all__ = ["HeadTrainer", "measured", "new_head"]
