"""The work of `foretoken tune`, stage by stage; what is finished stands if it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from foretoken.bench.tune.lab import Lab, Run
from foretoken.bench.tune.predict import Calibration, Prediction, observe, predict, prompt_seconds
from foretoken.bench.tune.settings import (
    AUTO,
    PLAIN_SETUP,
    Candidate,
    Setup,
    TuneSettings,
)
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.errors import ConfigError
from foretoken.models.adapter import ModelInfo
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_measure import measure_cost

COST_BUDGET_S = 6.0  # for one model's curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A drafter at one size.

    Args:
        setup: The way to decode.
        run: What its steps were; replayed, or live where a record is not enough.
        prediction: What it should take.
    """

    setup: Setup
    run: Run
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class Live:
    """What runs live of a drafter before the rounds.

    Args:
        candidate: Which.
        is_replayable: Whether a record of outputs tells what it does at other sizes.
        sizes: Those that run.
        runs: One for each of them, when it is done.
    """

    candidate: Candidate
    is_replayable: bool
    sizes: tuple[int, ...]
    runs: list[Run] = field(default_factory=list)

    @property
    def setups(self) -> list[Setup]:
        """One for each size."""
        return [self.candidate.setup(num) for num in self.sizes]


@dataclass(slots=True, kw_only=True)
class CandidateResult:
    """What is known of a drafter at all sizes.

    Args:
        candidate: Which.
        calibration: How its live times compare with its replay; None if all sizes ran live.
        num_changed: Live outputs with other tokens than plain decoding's.
        sizes: Ascending.
    """

    candidate: Candidate
    calibration: Calibration | None = None
    num_changed: int = 0
    sizes: list[Size]

    @property
    def best(self) -> Size:
        """The size that should be fastest."""
        return max(self.sizes, key=lambda size: size.prediction.tokens_per_s)


@dataclass(slots=True, kw_only=True)
class Measured:
    """A way to decode that took part in the rounds.

    Args:
        setup: Which.
        prediction: What it should take; None where nothing predicts it.
        rounds: One run per round that is complete.
    """

    setup: Setup
    prediction: Prediction | None
    rounds: list[Run] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class TuneResult:
    """All that is known so far; None and empty for what is still to come.

    Args:
        settings: As asked for.
        target: Facts about the target.
        num_prompts: Prompts that fit.
        curve: Cost of the target's passes.
        draft_curves: The same of the models that drafters run, by drafter.
        plain: Plain decoding, live.
        plain_prediction: What it should take.
        candidates: Drafters, as far as they are done.
        measured: Ways to decode that are measured; none before the rounds.
        num_rounds: Rounds that are complete.
    """

    settings: TuneSettings
    target: ModelInfo | None = None
    num_prompts: int = 0
    curve: CostCurve | None = None
    draft_curves: dict[str, CostCurve] = field(default_factory=dict)
    plain: Run | None = None
    plain_prediction: Prediction | None = None
    candidates: list[CandidateResult] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    num_rounds: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are there."""
        return self.num_rounds == self.settings.rounds

    @property
    def chosen(self) -> Setup | None:
        """The way to decode that should be fastest, plain decoding included."""
        if self.plain_prediction is None:
            return None
        sizes = [size for it in self.candidates for size in it.sizes]
        rates = {PLAIN_SETUP: self.plain_prediction.tokens_per_s}
        rates.update({size.setup: size.prediction.tokens_per_s for size in sizes})
        return max(rates, key=rates.__getitem__)


class Tuner:
    """Runs the stages and keeps what they gave.

    Args:
        settings: What to compare.

    Attributes:
        result: What is known so far.
    """

    def __init__(self, settings: TuneSettings) -> None:
        if not settings.max_nodes or min(settings.max_nodes) < 1:
            raise ConfigError(
                f"sizes to compare are integers >= 1; got {settings.max_nodes}",
                hint="change --max-nodes",
            )
        self.result = TuneResult(settings=settings)

    def run(self, report: OnProgress = silent) -> TuneResult:
        """Run all stages and return the result.

        Args:
            report: Told of every piece of work before it starts.

        Raises:
            ConfigError: A drafter cannot be built, or no prompt fits.
            ModelError: A model cannot be loaded.
        """
        result, settings = self.result, self.result.settings
        report(Progress(done=0, total=1, stage="loading the model"))
        lab = Lab(settings)
        result.target, result.num_prompts = lab.target.info, len(lab.prompts)
        setups = [it.setup(settings.max_nodes[0]) for it in settings.candidates]
        for setup in (*setups, self._auto):  # what cannot be built is found before the work
            lab.check(setup)
        self._measure_costs(lab, report)
        for live in self._record(lab, report):
            if live.is_replayable:
                self._replay(lab, live, report)
            else:
                self._take_live(live)
        self._measure(lab, report)
        return result

    def _measure_costs(self, lab: Lab, report: OnProgress) -> None:
        """Measure the cost curves of the target and of the drafters' models.

        Anew, and not from the cache: this is where the machine as it is now is asked for.
        """
        result = self.result

        measure = partial(measure_cost, budget_s=COST_BUDGET_S, on_progress=report)

        result.curve = measure(lab.target)
        for candidate in result.settings.candidates:
            with lab.draft_models(candidate.setup(1)) as models:
                for model in models:
                    result.draft_curves[candidate.name] = measure(model)

    def _record(self, lab: Lab, report: OnProgress) -> list[Live]:
        """Decode plainly and with every drafter at one size, or at all that no replay tells.

        All of it happens in turns, so that the times are those of one state of the machine.
        """
        result, sizes = self.result, self.result.settings.max_nodes
        middle = (sizes[len(sizes) // 2],)
        lives = [
            Live(candidate, is_replayable, middle if is_replayable else sizes)
            for candidate in result.settings.candidates
            for is_replayable in [lab.can_replay(candidate.setup(middle[0]))]
        ]
        setups = [PLAIN_SETUP, *(setup for live in lives for setup in live.setups)]
        report(Progress(done=0, total=1, stage="recording outputs", detail="warm-up"))
        lab.warm_up(setups)
        ticks = _Ticks(report, "recording outputs", len(setups) * lab.num_units)
        plain, *runs = lab.run(setups, on_turn=ticks.tick)
        result.plain, result.plain_prediction = plain, observe(plain)
        rest = iter(runs)
        return [replace(live, runs=[next(rest) for _ in live.setups]) for live in lives]

    def _replay(self, lab: Lab, live: Live, report: OnProgress) -> None:
        """Find out by replay what a drafter would make at every size."""
        result, pass_ms, plain = self.result, self._pass_ms(), self._plain
        recordings, prompt_s = lab.recordings(plain), prompt_seconds(plain)
        setups = [live.candidate.setup(num) for num in result.settings.max_nodes]
        ticks = _Ticks(report, f"replaying {live.candidate.name}", len(setups) * lab.num_units)
        played = dict(zip(setups, lab.replay(setups, recordings, on_turn=ticks.tick), strict=True))
        [run], [middle] = live.runs, live.setups
        calibration = Calibration.of(run, played[middle], pass_ms)
        sizes = [
            Size(
                setup=setup,
                run=it,
                prediction=predict(it, pass_ms, calibration, prompt_s=prompt_s),
            )
            for setup, it in played.items()
        ]
        result.candidates.append(
            CandidateResult(
                candidate=live.candidate,
                calibration=calibration,
                num_changed=_num_changed(run, plain),
                sizes=sizes,
            )
        )

    def _take_live(self, live: Live) -> None:
        """Expect what was seen of a drafter that ran live at every size."""
        self.result.candidates.append(
            CandidateResult(
                candidate=live.candidate,
                num_changed=max(_num_changed(run, self._plain) for run in live.runs),
                sizes=[
                    Size(setup=setup, run=run, prediction=observe(run))
                    for setup, run in zip(live.setups, live.runs, strict=True)
                ],
            )
        )

    def _measure(self, lab: Lab, report: OnProgress) -> None:
        """Measure plain decoding, each drafter at its best size and auto, in rounds that rotate."""
        result, num_rounds = self.result, self.result.settings.rounds
        result.measured = [Measured(setup=PLAIN_SETUP, prediction=result.plain_prediction)]
        for best in (candidate.best for candidate in result.candidates):
            result.measured.append(Measured(setup=best.setup, prediction=best.prediction))
        result.measured.append(Measured(setup=self._auto, prediction=None))
        setups = [it.setup for it in result.measured]
        lab.warm_up(setups)
        ticks = _Ticks(report, "measuring", num_rounds * len(setups) * lab.num_units)
        for number in range(num_rounds):
            where = f"round {number + 1} of {num_rounds}"
            runs = lab.run(
                setups,
                first=number,
                on_turn=lambda name, where=where: ticks.tick(f"{where}: {name}"),  # type: ignore[misc]
            )
            for it, run in zip(result.measured, runs, strict=True):  # whole rounds only
                it.rounds.append(run)
            result.num_rounds += 1
        ticks.finish()

    @property
    def _auto(self) -> Setup:
        return Setup(name=AUTO, plan=self.result.settings.auto)

    @property
    def _plain(self) -> Run:
        if self.result.plain is None:
            raise ConfigError("nothing is recorded yet", hint="record plain decoding first")
        return self.result.plain

    def _pass_ms(self) -> Callable[[int, int, int], float]:
        if self.result.curve is None:
            raise ConfigError("no cost curve is measured yet", hint="measure the passes first")
        return self.result.curve.pass_ms


class _Ticks:
    """Counts the pieces of a stage."""

    def __init__(self, report: OnProgress, stage: str, total: int) -> None:
        self._report, self._stage, self._total = report, stage, total
        self._done = 0

    def tick(self, detail: str) -> None:
        """Say what is done next."""
        self._report(Progress(done=self._done, total=self._total, stage=self._stage, detail=detail))
        self._done += 1

    def finish(self) -> None:
        """Say that all is done."""
        self._report(Progress(done=self._total, total=self._total, stage=self._stage))


def _num_changed(run: Run, plain: Run) -> int:
    """Return how many outputs differ; with coupled verification and bitwise exactness none."""
    pairs = zip(run.output_ids, plain.output_ids, strict=True)
    return sum(ours != theirs for ours, theirs in pairs)


__all__ = ["CandidateResult", "Measured", "Size", "TuneResult", "Tuner"]
