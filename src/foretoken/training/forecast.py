"""Forecast: what drafters will reach when they serve, from texts that the target has written.

Tokens per step are counted by replay, exactly, without decoding anything again. The time of a step
is put together from its parts: the drafter's own time in the replay, the target's pass by its
measured cost curve, and the rest. Both are flattered: in a replay everything stays in the
processor's caches, and the machine may be slower or faster by now than when the curve was measured.
So the first few texts are also served, plainly and with every drafter in turn, and each part is
scaled by the median ratio of what it took to what it was expected to take.

Source of the parts: "Decoding Speculative Decoding", arXiv:2402.01528, S = TAR * t_t / step time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.engine.step_log import acceptance_by_depth
from foretoken.errors import ConfigError
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_measure import measure_cost
from foretoken.training.corpus import Example
from foretoken.training.forecast_bench import Bench, ForecastSettings, Run, recordings

PLAIN = "plain"
NUM_RESAMPLES = 2000
PARTS = ("prompt", "target", "draft", "other")  # of the time that a text takes
STAGE = "forecasting"

Parts = NDArray[np.float64]
"""Seconds of each of `PARTS`, [4] of a text or [texts, 4]."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval: what other texts like these would give (bootstrap).

    Args:
        value: For these texts.
        low: 2.5 % of resamples are lower.
        high: 2.5 % are higher.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a drafter will reach on some texts, served one at a time.

    Args:
        num_tokens: Output tokens of all texts.
        num_steps: Passes of the target that give them; exact if the target's arithmetic is.
        tokens_per_step: TAR, the target's own tokens included.
        tokens_per_s: Prompts included.
        step_ms: Mean time per step of each of `PARTS`.
        acceptances: Share of levels that hold the target's token once they are reached, by depth.
        is_replayed: Whether it was replayed; else all texts were served, as no replay tells what
            the drafter would do.
    """

    num_tokens: int
    num_steps: int
    tokens_per_step: Estimate
    tokens_per_s: Estimate
    step_ms: dict[str, float]
    acceptances: list[float]
    is_replayed: bool

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def forecast(
    model: str,
    drafters: Mapping[str, str],
    texts: Sequence[Example],
    params: Sequence[SamplingParams],
    settings: ForecastSettings | None = None,
    *,
    on_progress: OnProgress = silent,
) -> dict[str, Forecast]:
    """Return what drafters will reach, and plain decoding for comparison.

    Texts come one at a time, without the prefix cache. A drafter that learns from outputs learns
    from those before it.

    Args:
        model: The target.
        drafters: Specs by the names that they are to have here; "plain" is decoding without.
        texts: Prompts with the target's outputs.
        params: With which each was sampled, seeds included.
        settings: How they will serve.
        on_progress: Told about every text that is served and every drafter that is replayed.

    Raises:
        ConfigError: A drafter cannot be built, or there are no texts.
        ForetokenError: Serving gave other tokens, though the target's arithmetic is bitwise.
    """
    settings = settings or ForecastSettings()
    if not texts or PLAIN in drafters:
        raise ConfigError(
            f"a forecast needs at least one text, and drafters of other names than {PLAIN!r}; got "
            f"{len(texts)} texts and {', '.join(drafters) or 'no drafters'}",
            hint="give texts, and rename the drafter",
        )
    bench = Bench(model, drafters, recordings(texts, params), settings)
    try:
        specs = {PLAIN: "none", **drafters}
        is_replayed = {name: name == PLAIN or bench.can_replay(name) for name in specs}
        num_live = min(settings.num_live + 1 if settings.num_live else 0, len(texts))
        served = bench.serve(
            {name: num_live if is_replayed[name] else len(texts) for name in specs}, on_progress
        )
        curve = measure_cost(bench.target, on_progress=on_progress)
        forecasts = {}
        for place, (name, spec) in enumerate(specs.items()):
            on_progress(Progress(stage=STAGE, done=place, total=len(specs), detail=name))
            if is_replayed[name]:
                sample = _Sample.of_replay(bench.replay(spec), served[name], curve)
            else:
                sample = _Sample.of_served(served[name])
            generator = np.random.default_rng(settings.seed)
            forecasts[name] = _forecast(sample, is_replayed[name], generator)
    finally:
        bench.close()
    on_progress(Progress(stage=STAGE, done=len(specs), total=len(specs)))
    return forecasts


def _expected(run: Run, curve: CostCurve) -> Parts:
    """Return what a replayed text takes by the cost curve and the replay's own times."""
    passes = [0.0, 0.0]
    for step in run.steps:
        pass_ms = curve.pass_ms(step.num_rows, step.num_keys, step.num_requests)
        passes[not step.has_prompt] += 0.001 * pass_ms
    return np.array([*passes, *_around(run)])


def _observed(run: Run) -> Parts:
    """Return what a served text took."""
    passes = [0.0, 0.0]
    for step in run.steps:
        passes[not step.has_prompt] += step.times.pass_s
    draft_s, other_s = _around(run)
    outside_s = max(0.0, run.total_s - sum(step.times.total_s for step in run.steps))
    return np.array([*passes, draft_s, other_s + outside_s])


def _around(run: Run) -> tuple[float, float]:
    return sum(step.draft_s for step in run.steps), sum(step.other_s for step in run.steps)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Texts with their expected times, and what some of them really took.

    Args:
        runs: Of each text.
        expected: What they should take, [texts, 4] seconds.
        observed: What some of them took, [n, 4] seconds.
        reference: What these should have taken, [n, 4] seconds.
    """

    runs: Sequence[Run]
    expected: Parts
    observed: Parts
    reference: Parts

    @classmethod
    def of_replay(cls, runs: Sequence[Run], served: Sequence[Run], curve: CostCurve) -> _Sample:
        """Take what was served of the first texts, all but the first one, as what texts take."""
        timed = slice(1 if len(served) > 1 else 0, len(served))
        expected = np.stack([_expected(run, curve) for run in runs])
        observed = [_observed(run) for run in served[timed]]
        return cls(
            runs, expected, np.reshape(observed, (len(observed), len(PARTS))), expected[timed]
        )

    @classmethod
    def of_served(cls, runs: Sequence[Run]) -> _Sample:
        """Expect again what was seen."""
        nothing = np.zeros((0, len(PARTS)))
        return cls(runs, np.stack([_observed(run) for run in runs]), nothing, nothing)

    @property
    def ratios(self) -> Parts:
        """What served texts took of what they should have taken, [n, 4]; 1 for nothing of both."""
        ones = np.ones_like(self.observed)
        return np.divide(self.observed, self.reference, out=ones, where=self.reference > 0)


def _forecast(sample: _Sample, is_replayed: bool, generator: np.random.Generator) -> Forecast:
    num_tokens = np.array([run.num_tokens for run in sample.runs])
    num_steps = np.array([run.num_steps for run in sample.runs])
    weights = _draws(generator, len(num_tokens))
    part_s = sample.expected.sum(axis=0) * _median(sample.ratios)
    drawn_s = ((weights @ sample.expected) * _drawn_medians(sample.ratios, generator)).sum(axis=1)
    tokens, steps = weights @ num_tokens, weights @ num_steps
    part_ms = 1000 * part_s / num_steps.sum()
    by_depth = acceptance_by_depth(
        draft for run in sample.runs for step in run.steps for draft in step.drafts
    )
    return Forecast(
        num_tokens=int(num_tokens.sum()),
        num_steps=int(num_steps.sum()),
        tokens_per_step=_estimate(num_tokens.sum() / num_steps.sum(), tokens / steps),
        tokens_per_s=_estimate(num_tokens.sum() / part_s.sum(), tokens / drawn_s),
        step_ms=dict(zip(PARTS, part_ms.tolist(), strict=True)),
        acceptances=[tally.rate for tally in by_depth.values()],
        is_replayed=is_replayed,
    )


def _draws(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Return how often each of some items is drawn in each resample, [resamples, count]."""
    shares = np.full(count, 1 / count)
    return generator.multinomial(count, shares, size=NUM_RESAMPLES).astype(np.float64)


def _median(ratios: Parts) -> Parts:
    """Return the median of each part, [4], which a text that was disturbed does not move."""
    return np.median(ratios, axis=0) if len(ratios) else np.ones(len(PARTS))


def _drawn_medians(ratios: Parts, generator: np.random.Generator) -> Parts:
    """Return the medians of resampled ratios, [resamples, 4]."""
    if not len(ratios):
        return np.ones((NUM_RESAMPLES, len(PARTS)))
    places = generator.integers(len(ratios), size=(NUM_RESAMPLES, len(ratios)))
    medians: Parts = np.median(ratios[places], axis=1)
    return medians


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(float(value), float(low), float(high))


__all__ = ["PARTS", "PLAIN", "Estimate", "Forecast", "ForecastSettings", "forecast"]
