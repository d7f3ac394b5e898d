"""The stages of a run behind the collection: from the target's outputs to a verified draft."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.models.draft_shape import DraftShape
from foretoken.models.trainable import load_trainable, save_trainable
from foretoken.training.draft.card import DRAFT, card
from foretoken.training.draft.distil import STAGE, distil, fitting_batch, measure_pace
from foretoken.training.draft.initialise import initialise
from foretoken.training.draft.quality import quality
from foretoken.training.draft.settings import DraftMachine, DraftSettings
from foretoken.training.draft.study import run_study
from foretoken.training.folder import RunFolder
from foretoken.training.forecast import ForecastSettings, forecast
from foretoken.training.gather import Gathered
from foretoken.training.served import compare_served
from foretoken.training.stages import Stages
from foretoken.training.storage import write_atomically

CHECKPOINT_FILE = "draft.checkpoint"
INITIAL_FOLDER = "initial"
STUDY_FOLDER = "study"
CARD_FILE = "README.md"

Results = dict[str, dict[str, Any]]


class DraftMaker:
    """Makes a draft model out of what a target wrote, stage by stage.

    Args:
        settings: What to make.
        directory: Of the target.
        gathered: What the target wrote.
        folder: Receives the draft, in a folder of its own.
        machine: Where, and against what it is served.
        on_progress: Told how far it is.
    """

    def __init__(
        self,
        settings: DraftSettings,
        directory: Path,
        gathered: Gathered,
        folder: RunFolder,
        machine: DraftMachine,
        on_progress: OnProgress = silent,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._gathered = gathered
        self._folder = folder
        self._machine = machine
        self._on_progress = on_progress
        self._checkpoint = folder.path / CHECKPOINT_FILE
        self._initial = folder.path / INITIAL_FOLDER
        self._draft = folder.path / DRAFT

    def results(self, stages: Stages, shape: DraftShape | None) -> Results:
        """Go through the stages that are not finished and return what all of them gave.

        Args:
            stages: Those of the run; the collection is finished.
            shape: The draft's; None if the study is to choose.
        """
        results: Results = {"collect": self._gathered.described()}
        works: dict[str, Callable[[Results], dict[str, Any]]] = {
            "design": lambda _results: self._design(shape),
            "initialise": self._initialise,
            "pace": self._pace,
            "distil": self._distil,
            "forecast": self._forecast,
            "verify": self._verify,
            "export": self._export,
        }
        for name, work in works.items():
            results[name] = stages.run(name, partial(work, results))
        return results

    def _design(self, shape: DraftShape | None) -> dict[str, Any]:
        if shape is not None:
            return {"shape": str(shape), "chosen_by": "the user"}
        study = run_study(
            self._settings.model,
            self._gathered.examples,
            self._settings.study(self._machine.device),
            self._folder.path / STUDY_FOLDER,
            self._on_progress,
        )
        return {"shape": str(study.chosen), "chosen_by": "the shape study"}

    def _initialise(self, results: Results) -> dict[str, Any]:
        settings, device = self._settings, self._machine.device
        self._say("initialising", 0)
        target = load_trainable(self._directory, device=device)
        shape = DraftShape.parse(results["design"]["shape"])
        draft = initialise(target, shape, self._texts(), settings.method, settings.seed)
        self._folder.build(INITIAL_FOLDER, lambda folder: save_trainable(draft, folder, ""))
        self._say("initialising", 1)
        return {"method": settings.method, "num_parameters": draft.num_parameters}

    def _pace(self, _results: Results) -> dict[str, Any]:
        """Find out how many steps there is time for; kept, because the weights depend on it."""
        settings = self._settings
        if settings.steps is not None:
            return {"num_steps": settings.steps}
        self._say("timing a step", 0)
        device = self._machine.device
        pace = measure_pace(
            load_trainable(self._initial, device=device),
            load_trainable(self._directory, device=device),
            self._gathered.examples,
            settings.distillation(1),
        )
        self._say("timing a step", 1)
        return {"num_steps": pace.steps_within(60 * settings.minutes), **asdict(pace)}

    def _distil(self, results: Results) -> dict[str, Any]:
        device, examples = self._machine.device, self._gathered.examples
        config = self._settings.distillation(results["pace"]["num_steps"])
        target = load_trainable(self._directory, device=device)
        draft = load_trainable(self._initial, device=device)
        measured = partial(
            quality, draft, target, self._gathered.held_out, self._settings.temperature
        )
        before = measured()
        if self._checkpoint.exists():
            self._say(STAGE, 0, config.num_steps, is_resumed=True)
        losses = distil(
            draft,
            target,
            examples,
            config,
            checkpoint=self._checkpoint,
            on_progress=self._on_progress,
        )
        tenth = math.ceil(len(losses) / 10)
        result = {
            "num_steps": len(losses),
            "batch_size": fitting_batch(config, target, examples),
            "first_loss": sum(losses[:tenth]) / tenth,
            "last_loss": sum(losses[-tenth:]) / tenth,
            "held_out": {"before": before, "after": measured()},
        }
        text = card(self._settings, {**results, "distil": result})
        self._folder.build(DRAFT, lambda folder: save_trainable(draft, folder, text))
        return result

    def _forecast(self, _results: Results) -> dict[str, Any]:
        forecasts = forecast(
            self._settings.model,
            self._drafters(),
            self._gathered.held_out,
            self._gathered.held_out_params,
            ForecastSettings(
                max_nodes=self._machine.max_nodes,
                device=self._machine.device,
                seed=self._settings.seed,
            ),
            on_progress=self._on_progress,
        )
        return {name: it.as_dict() for name, it in forecasts.items()}

    def _verify(self, _results: Results) -> dict[str, Any]:
        machine = {"device": self._machine.device, "max_nodes": self._machine.max_nodes}
        return compare_served(
            self._settings.model,
            self._drafters(),
            self._gathered.held_out,
            self._gathered.held_out_params,
            machine=machine,
            seed=self._settings.seed,
            on_progress=self._on_progress,
        )

    def _export(self, results: Results) -> dict[str, Any]:
        text = card(self._settings, results)
        write_atomically(
            self._draft / CARD_FILE, lambda path: path.write_text(text, encoding="utf-8")
        )
        self._checkpoint.unlink(missing_ok=True)
        shutil.rmtree(self._initial, ignore_errors=True)
        return {"folder": DRAFT}

    def _drafters(self) -> dict[str, str]:
        return {DRAFT: f"draft-model:path={self._draft}", **self._machine.against}

    def _texts(self) -> list[list[int]]:
        return [list(text.token_ids) for text in self._gathered.examples]

    def _say(self, stage: str, done: int, total: int = 1, *, is_resumed: bool = False) -> None:
        self._on_progress(Progress(stage=stage, done=done, total=total, is_resumed=is_resumed))


__all__ = ["DraftMaker"]
