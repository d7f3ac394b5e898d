"""The shape study: which draft model would be fastest for a target on this machine.

Candidate shapes are timed without training, a few are trained briefly for their acceptance, and
the analytic model of speculative decoding tells what each is worth at its best lookahead. Source:
"Decoding Speculative Decoding", arXiv:2402.01528.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.engine.names import resolve_model
from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.loading import load_model, local_directory
from foretoken.models.trainable import load_trainable, save_trainable
from foretoken.planner.analysis import Lookahead, best_lookahead
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_measure import measure_cost
from foretoken.training.corpus import Example, held_out_places, without_overlap
from foretoken.training.draft.distil import distil
from foretoken.training.draft.initialise import choose_vocabulary, initialise
from foretoken.training.draft.study_acceptance import Point, fit_acceptance, hits, spread_out
from foretoken.training.draft.study_findings import findings
from foretoken.training.draft.study_latency import StepMs, StepTimer
from foretoken.training.draft.study_record import Candidate, Spread, StudyReport, StudySettings
from foretoken.training.draft.study_report import write_report
from foretoken.training.draft.study_shapes import candidate_shapes
from foretoken.training.folder import RunFolder, fingerprint
from foretoken.training.gather import shown_name
from foretoken.training.stages import Stages

MIN_TEXTS = 4
TIMING, TRAINING = "timing shapes", "training shapes"


def run_study(
    target: str | Path,
    examples: Sequence[Example],
    settings: StudySettings,
    folder: Path,
    on_progress: OnProgress = silent,
) -> StudyReport:
    """Compare shapes of draft models for a target; return the report, also written to the folder.

    Every timing and every training is kept when it is finished, so that a study that was stopped
    goes on where it stood.

    Args:
        target: A directory, hub id, or the name of an embedded pair.
        examples: Prompts with the target's outputs; some are held out.
        settings: What to compare.
        folder: A new folder, or that of a study with the same settings, which is resumed.
        on_progress: Told about every timing and every step of training.

    Raises:
        ConfigError: There are too few texts, the folder is of another run or cannot be written,
            or a loss is no finite number.
        ModelError: The target cannot be loaded.
        UnsupportedModelError: It is of a family that no draft can be cut from.
    """
    if len(examples) < MIN_TEXTS:
        raise ConfigError(
            f"a shape study needs at least {MIN_TEXTS} texts of the target; got {len(examples)}",
            hint="collect more outputs",
        )
    directory = local_directory(resolve_model(str(target)))
    identity = _identity(str(target), directory, examples, settings)
    study = _Study(directory, examples, settings, RunFolder(folder, identity), on_progress)
    report = study.report(shown_name(str(target)))
    write_report(report, folder)
    return report


class _Study:
    """One study, whose steps find what they have done before."""

    def __init__(
        self,
        directory: Path,
        examples: Sequence[Example],
        settings: StudySettings,
        folder: RunFolder,
        on_progress: OnProgress,
    ) -> None:
        self._directory, self._settings, self._folder = directory, settings, folder
        self._on_progress = on_progress
        self._stages = Stages(folder.path)
        self._target = load_trainable(directory, device=settings.device)
        places = held_out_places(len(examples), min(settings.num_held_out, len(examples) // 4))
        self._held_out = [examples[place] for place in places]
        others = [text for place, text in enumerate(examples) if place not in places]
        self._examples, _ = without_overlap(others, self._held_out)
        if not self._examples:
            raise ConfigError(
                "no text is left to train on: all are the same as held-out ones",
                hint="collect outputs of more prompts",
            )
        self._texts = [list(text.token_ids) for text in self._examples]
        self._shapes = self._chosen_shapes()

    def report(self, name: str) -> StudyReport:
        """Time, train and judge."""
        settings = self._settings
        times, curve, num_keys = self._time()
        points = [self._point(shape) for shape in self._shapes]
        trained = self._train(points)
        fit = fit_acceptance([trained[place][0] for place in trained])
        plain = middle(times.pop(None))
        scale = plain.target / curve.pass_ms(1, num_keys)
        verify_ms = [
            scale * curve.pass_ms(num_drafted + 1, num_keys) + plain.other
            for num_drafted in range(settings.lookahead + 1)
        ]
        candidates = []
        for place, shape in enumerate(self._shapes):
            point, cross_entropy = trained.get(place, (points[place], None))
            candidates.append(
                judge(
                    shape,
                    times[str(shape)],
                    list(point.acceptances) or fit.acceptances(point),
                    cross_entropy,
                    verify_ms,
                    plain,
                    self._target.config,
                )
            )
        return StudyReport(
            target=name,
            target_parameters=self._target.num_parameters,
            lookahead=settings.lookahead,
            plain_ms=plain.target + plain.other,
            verify_ms=verify_ms,
            candidates=candidates,
            fit=asdict(fit),
            findings=findings(candidates),
            settings=asdict(settings),
        )

    def _chosen_shapes(self) -> list[DraftShape]:
        settings, config = self._settings, self._target.config
        if settings.shapes:
            like = DraftShape.of(config)
            return [DraftShape.parse(text, like) for text in settings.shapes]
        is_pruned = settings.method == "prune"
        return candidate_shapes(config, settings.depths, settings.vocab_shares, is_pruned=is_pruned)

    # -- latency -----------------------------------------------------------------------------

    def _time(self) -> tuple[dict[str | None, list[StepMs]], CostCurve, int]:
        """Return the step times of every shape by round, those of plain decoding under None."""
        settings, stages = self._settings, self._stages
        target = load_model(str(self._directory), device=settings.device)
        text = sorted(self._held_out, key=lambda it: len(it.token_ids))[len(self._held_out) // 2]
        timer = StepTimer(
            target,
            self._directory,
            text.token_ids[: -(len(text.output_ids) // 2) or None],
            lookahead=settings.lookahead,
            num_steps=settings.timed_steps,
            device=settings.device,
        )
        curve = stages.run("cost curve", lambda: measure_cost(target).to_dict())
        names = [None, *map(str, self._shapes)]
        times: dict[str | None, list[StepMs]] = {name: [] for name in names}
        total = settings.rounds * len(names)
        for turn in range(total):
            number, place = divmod(turn, len(names))
            name = names[(place + number) % len(names)]
            self._on_progress(
                Progress(stage=TIMING, done=turn, total=total, detail=name or "no draft")
            )
            result = stages.run(f"round {number + 1}: {name}", partial(self._time_one, timer, name))
            times[name].append(StepMs(**result))
        self._on_progress(Progress(stage=TIMING, done=total, total=total))
        shutil.rmtree(self._folder.path / "blank", ignore_errors=True)
        return times, CostCurve.from_dict(curve), timer.num_keys

    def _time_one(self, timer: StepTimer, name: str | None) -> dict[str, float]:
        return asdict(timer.time(self._blank(name)))

    def _blank(self, name: str | None) -> Path | None:
        """Return the directory of an untrained model of a shape, written when it is first asked."""
        if name is None:
            return None
        place = [str(shape) for shape in self._shapes].index(name)
        path = self._folder.path / "blank" / str(place)
        if not path.exists():
            shape, seed = self._shapes[place], self._settings.seed
            model = initialise(self._target, shape, self._texts, "scratch", seed)
            self._folder.build(f"blank/{place}", lambda folder: save_trainable(model, folder, ""))
        return path

    # -- acceptance --------------------------------------------------------------------------

    def _point(self, shape: DraftShape) -> Point:
        """Return a shape's sizes, and how much of the held-out texts it can say."""
        whole = DraftShape.parse(str(shape).partition(",vocab=")[0])
        coverage = 1.0
        if shape.vocab is not None:
            kept = set(choose_vocabulary(self._target, shape.vocab, self._texts).d2t.tolist())
            said = [token_id for text in self._held_out for token_id in text.output_ids]
            coverage = sum(token_id in kept for token_id in said) / len(said)
        num_parameters = whole.num_parameters(self._target.config)
        return Point(num_parameters, shape.layers, coverage)

    def _train(self, points: Sequence[Point]) -> dict[int, tuple[Point, float]]:
        """Train some shapes; return by place what they accept, and their cross-entropy."""
        trained = {}
        places = spread_out(points, self._settings.num_trained)
        for number, place in enumerate(places, start=1):
            work = partial(self._train_one, place, f"{TRAINING}, {number} of {len(places)}")
            result = self._stages.run(f"train: {self._shapes[place]}", work)
            point = points[place]
            trained[place] = (
                Point(point.num_parameters, point.layers, 1.0, tuple(result["acceptances"])),
                result["cross_entropy"],
            )
        return trained

    def _train_one(self, place: int, stage: str) -> dict[str, Any]:
        settings, target, shape = self._settings, self._target, self._shapes[place]
        student = initialise(target, shape, self._texts, settings.method, settings.seed)
        checkpoint = self._folder.path / f"candidate-{place}.checkpoint"

        def report(progress: Progress) -> None:
            self._on_progress(
                Progress(
                    stage=stage,
                    done=progress.done,
                    total=progress.total,
                    detail=f"{shape}, {progress.detail}",
                )
            )

        losses = distil(
            student,
            target,
            self._examples,
            settings.distillation(),
            checkpoint=checkpoint,
            on_progress=report,
        )
        found = hits(student, target, self._held_out, settings.temperature)
        checkpoint.unlink(missing_ok=True)
        return {
            "acceptances": found.by_depth(settings.lookahead),
            "cross_entropy": found.cross_entropy,
            "last_loss": losses[-1],
        }


def judge(
    shape: DraftShape,
    rounds: Sequence[StepMs],
    acceptances: Sequence[float],
    cross_entropy: float | None,
    verify_ms: Sequence[float],
    plain: StepMs,
    config: Any,
) -> Candidate:
    """Return what a shape is worth at its best lookahead.

    Args:
        shape: Whose draft was timed.
        rounds: Its step times, each with a draft of the longest lookahead.
        acceptances: Conditional, at each depth up to the longest lookahead.
        cross_entropy: As `Candidate` has it.
        verify_ms: A step with 0, 1, ... draft tokens, without drafting.
        plain: Times of plain decoding's steps.
        config: The target's.
    """
    times = [it.draft for it in rounds]
    draft_ms = Spread(low=min(times), median=median(times), high=max(times))
    overhead_ms = max(0.0, middle(rounds).other - plain.other)

    def at(ms: float) -> Lookahead:
        return best_lookahead(
            acceptances,
            draft_ms=ms / len(acceptances),
            verify_ms=lambda num_rows: verify_ms[num_rows - 1],
            overhead_ms=overhead_ms,
        )

    best = at(draft_ms.median)
    return Candidate(
        shape=str(shape),
        layers=shape.layers,
        hidden=shape.hidden,
        vocab=shape.vocab or config.vocab_size,
        num_parameters=shape.num_parameters(config),
        draft_ms=draft_ms,
        overhead_ms=overhead_ms,
        acceptances=list(acceptances),
        cross_entropy=cross_entropy,
        num_draft_tokens=best.num_draft_tokens,
        tokens_per_step=best.tokens_per_step,
        speed_up=best.speed_up,
        slowest=at(draft_ms.high).speed_up,
        fastest=at(draft_ms.low).speed_up,
    )


def middle(rounds: Sequence[StepMs]) -> StepMs:
    """Return the medians over rounds of each part."""
    return StepMs(
        draft=median(it.draft for it in rounds),
        target=median(it.target for it in rounds),
        other=median(it.other for it in rounds),
    )


def _identity(
    target: str, directory: Path, examples: Sequence[Example], settings: StudySettings
) -> dict[str, Any]:
    """Return all that a study depends on, as JSON gives it back."""
    texts = json.dumps([[text.prompt_ids, text.output_ids] for text in examples])
    values = {
        **asdict(settings),
        "model": shown_name(target),
        "model_fingerprint": fingerprint(str(directory)),
        "texts_fingerprint": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }
    identity: dict[str, Any] = json.loads(json.dumps(values))
    return identity


__all__ = ["StudyReport", "StudySettings", "judge", "run_study"]
