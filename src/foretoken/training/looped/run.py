"""A run from texts to a measured model, in a folder that it can be resumed in.

Its stages: *texts* are split and encoded, the model is *built*, a step is *timed*, it is *trained*
and *measured*. While it trains, the model as it is stands in the folder, measured on some of the
held-out texts. Killed at any moment, the same run goes on and ends with the same weights.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.engine.names import resolve_model
from foretoken.errors import ModelError
from foretoken.models.blank import blank_model
from foretoken.models.loading import load_config, local_directory
from foretoken.models.tokenizer import Tokenizer
from foretoken.models.trainable import (
    TrainableModel,
    compile_layers,
    load_trainable,
    save_trainable,
)
from foretoken.training.folder import RunFolder, fingerprint, write_json
from foretoken.training.gather import shown_name
from foretoken.training.loop import train
from foretoken.training.looped.card import MODEL, card
from foretoken.training.looped.documents import Split, TokenRows, encode_texts
from foretoken.training.looped.losses import exit_loss
from foretoken.training.looped.measure import depth_quality
from foretoken.training.looped.settings import LoopedSettings
from foretoken.training.stages import Stages
from foretoken.training.storage import writing

REPORT_FILE = "report.json"
REPORT_FORMAT = 1
CHECKPOINT_FILE = "model.checkpoint"
HISTORY_FILE = "history.jsonl"
STAGE = "training"
MAX_MEASURED = 64  # held-out texts that are measured while it trains
_NUM_PROBES = 6  # steps that are timed, the first of which does not count


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts as a model reads them.

    Args:
        split: The texts themselves.
        rows: Those to train on.
        held_out: Token ids of the others.
    """

    split: Split
    rows: TokenRows
    held_out: list[list[int]]

    def described(self) -> dict[str, int]:
        """Return the counts that a report names."""
        return {
            "num_texts": len(self.split.train),
            "num_tokens": self.rows.num_tokens,
            "num_held_out_texts": len(self.held_out),
            "num_held_out_characters": sum(map(len, self.split.held_out)),
        }


def run_looped(
    settings: LoopedSettings,
    split: Split,
    output: Path,
    *,
    device: str = "auto",
    on_progress: OnProgress = silent,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a decoder on texts; return the report, which is also written to the folder.

    Args:
        settings: What to make.
        split: Texts to train on, and others to measure on.
        output: A new folder, or that of a run with the same settings, which is resumed. The model
            is in its folder `model`.
        device: Where it is trained.
        on_progress: Told how far it is.
        provenance: What else the report is to say, such as the command.

    Raises:
        ConfigError: A setting is wrong, the folder is of another run or cannot be written, there
            are too few texts, or a loss is no finite number.
        ModelError: The model whose tokens it speaks cannot be loaded or has no tokenizer.
    """
    directory = local_directory(resolve_model(settings.model))
    shape = settings.shape(load_config(str(directory)))
    corpus = _encode(split, directory, settings)
    identity = {
        **asdict(settings),
        "model": shown_name(settings.model),
        "model_fingerprint": fingerprint(str(directory)),
        "texts_fingerprint": split.fingerprint(),
    }
    folder = RunFolder(output, identity)
    maker = LoopedMaker(settings, corpus, folder, on_progress)
    stages = Stages(output, on_progress)
    results: dict[str, dict[str, Any]] = {"texts": corpus.described()}

    def build() -> TrainableModel:
        like = load_trainable(directory, device=device)
        loops = settings.loop_shape if settings.kind == "shared" else None
        model = blank_model(like, shape, loops=loops, seed=settings.seed)
        if settings.copies_embedding:
            with torch.no_grad():
                model.embedding.copy_(like.embedding)
        if settings.compiles:
            compile_layers(model)
        return model

    results["build"] = {
        "num_parameters": build().num_parameters,
        "num_layers": shape.layers,
        "num_stored": shape.layers if settings.kind != "shared" else settings.loop_shape.num_stored,
        **{name: value for name, value in asdict(shape).items() if name not in ("layers", "vocab")},
    }
    results["pace"] = stages.run("pace", lambda: maker.pace(build()))
    results["train"] = stages.run("train", lambda: maker.train(build(), results))
    results["measure"] = stages.run("measure", partial(maker.measure, results, device))
    report = {
        "what": "foretoken train looped",
        "format": REPORT_FORMAT,
        **(provenance or {}),
        "settings": {**asdict(settings), "model": shown_name(settings.model)},
        **results,
        "history": maker.history(),
        "seconds": stages.seconds,
    }
    write_json(output / REPORT_FILE, report)
    return report


class LoopedMaker:
    """The stages behind the texts.

    Args:
        settings: What to make.
        corpus: The texts.
        folder: Of the run.
        on_progress: Told how far it is.
    """

    def __init__(
        self,
        settings: LoopedSettings,
        corpus: Corpus,
        folder: RunFolder,
        on_progress: OnProgress = silent,
    ) -> None:
        self._settings = settings
        self._corpus = corpus
        self._folder = folder
        self._on_progress = on_progress
        self._history = folder.path / HISTORY_FILE
        self._rows = corpus.rows

    def pace(self, model: TrainableModel) -> dict[str, Any]:
        """Find out how many steps there is time for; kept, because the weights depend on it."""
        settings = self._settings
        if settings.steps is not None:
            return {"num_steps": settings.steps}
        times_s: list[float] = []
        config = replace(settings.loop(_NUM_PROBES), num_warmup_steps=1)
        probe = copy.deepcopy(model)
        train(
            probe.module,
            self._rows.batch,
            partial(self._loss, probe),
            config,
            on_step=lambda _step, _loss: times_s.append(time.perf_counter()),
        )
        step_s = (times_s[-1] - times_s[0]) / (len(times_s) - 1)
        return {"num_steps": max(1, int(60 * settings.minutes / step_s)), "step_s": step_s}

    def train(
        self, model: TrainableModel, results: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Train a new model, or go on with the one in the checkpoint."""
        num_steps = results["pace"]["num_steps"]
        text = card(self._settings, results)
        checkpoint = self._folder.path / CHECKPOINT_FILE
        if checkpoint.exists():
            self._on_progress(Progress(stage=STAGE, done=0, total=num_steps, is_resumed=True))
        losses: list[float] = []
        num_left = 0

        def on_step(num_done: int, loss: float) -> None:
            nonlocal num_left
            losses.append(loss)
            detail = f"loss {loss:.3f}"
            if num_done % self._settings.measure_steps == 0 or num_done == num_steps:
                num_left = num_done
                mean = sum(losses) / len(losses)
                losses.clear()
                detail += self._leave(model, num_done, mean, text)
            self._on_progress(Progress(stage=STAGE, done=num_done, total=num_steps, detail=detail))

        every = train(
            model.module,
            self._rows.batch,
            partial(self._loss, model),
            self._settings.loop(num_steps),
            checkpoint=checkpoint,
            on_step=on_step,
        )
        if num_left != num_steps:  # it was killed behind the last checkpoint
            self._leave(model, num_steps, every[-1], text)
        tenth = math.ceil(len(every) / 10)
        return {
            "num_steps": len(every),
            "num_epochs": round(len(every) / self._rows.num_steps_per_epoch, 3),
            "first_loss": round(sum(every[:tenth]) / tenth, 4),
            "last_loss": round(sum(every[-tenth:]) / tenth, 4),
        }

    def measure(self, results: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Any]:
        """Measure the model as it is saved, on all held-out texts, and write that into its card."""
        path = self._folder.path / MODEL
        self._on_progress(Progress(stage="measuring", done=0, total=1))
        measured = self._quality(load_trainable(path, device=device), len(self._corpus.held_out))
        text = card(self._settings, {**results, "measure": measured})
        with writing("README.md"):
            (path / "README.md").write_text(text, encoding="utf-8")
        self._on_progress(Progress(stage="measuring", done=1, total=1))
        return measured

    def history(self) -> list[dict[str, Any]]:
        """Return what was measured while it trained; a step that was repeated, once."""
        lines = self._history.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return list({entry["step"]: entry for entry in entries}.values())

    def _leave(self, model: TrainableModel, step: int, loss: float, text: str) -> str:
        """Leave a model in the folder, with a line of what it knows; return that in words."""
        with torch.compiler.set_stance("force_eager"):  # texts have many lengths
            measured = self._quality(model, MAX_MEASURED)
        entry = {"step": step, "loss": round(loss, 4), **measured}
        with writing(HISTORY_FILE), self._history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._folder.build(MODEL, lambda folder: save_trainable(model, folder, text))
        bits, agreement = measured["bits_per_character"], measured["agreement"]
        return f", {bits[-1]:.3f} bits per character, agreement {agreement[0]:.3f}"

    def _quality(self, model: TrainableModel, num_texts: int) -> dict[str, Any]:
        texts, held_out = self._corpus.held_out[:num_texts], self._corpus.split.held_out
        num_characters = sum(map(len, held_out[:num_texts]))
        return depth_quality(model, texts, num_characters, model.context_limit or 512).described()

    def _loss(self, model: TrainableModel, rows: Tensor) -> Tensor:
        return exit_loss(model, rows.to(model.device), self._settings.weights)


def _encode(split: Split, directory: Path, settings: LoopedSettings) -> Corpus:
    """Return the texts as the tokenizer beside a model encodes them."""
    tokenizer = Tokenizer.load(str(directory))
    if tokenizer is None:
        raise ModelError(
            f"model {directory.name!r} has no tokenizer, so texts cannot be encoded",
            hint="name a model that has one with --model",
        )
    end = load_config(str(directory)).eos_token_id
    end_id = end[0] if isinstance(end, list) else end
    train, held_out = (
        encode_texts(texts, tokenizer, end_id) for texts in (split.train, split.held_out)
    )
    rows = TokenRows(train, settings.context, settings.batch_size, settings.seed)
    return Corpus(split, rows, held_out)


__all__ = ["Corpus", "LoopedMaker", "run_looped"]
