"""What a forecast is made from: texts replayed, and a few of them served."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from foretoken.core.draft import Draft
from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress
from foretoken.core.verdict import Exactness, Verdict
from foretoken.engine.build import EngineBuilder
from foretoken.engine.engine import EngineConfig
from foretoken.engine.llm import LLM
from foretoken.engine.replay import Recording, is_replayable, replay
from foretoken.engine.step_log import StepLog, StepRecord
from foretoken.errors import ForetokenError
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.grammar import GrammarCompiler
from foretoken.planner.base import Share, StepTimes
from foretoken.planner.plan import Plan
from foretoken.training.corpus import Example

STAGE = "serving a few texts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastSettings:
    """How drafters will serve, and how closely their times are looked at.

    Args:
        max_nodes: Most draft tokens per step.
        num_live: Texts that are also served for their times, after one more to warm up; 0 for
            none, so that times are those of replay and curve as they are.
        device: As of `LLM`.
        dtype: As of `LLM`.
        seed: Of the intervals' resamples.
    """

    max_nodes: int = 8
    num_live: int = 6
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0


def recordings(texts: Sequence[Example], params: Sequence[SamplingParams]) -> list[Recording]:
    """Return texts as a replay takes them."""
    return [
        Recording(
            prompt_ids=text.prompt_ids, output_ids=text.output_ids, params=it, seed=it.seed or 0
        )
        for text, it in zip(texts, params, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Run:
    """One text, served or replayed.

    Args:
        steps: That it took.
        total_s: What it took, if it was served.
    """

    steps: list[StepRecord]
    total_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return sum(step.num_tokens for step in self.steps)

    @property
    def num_steps(self) -> int:
        """Passes of the target that gave tokens."""
        return sum(bool(step.drafts) for step in self.steps)


class Bench:
    """A loaded target with all drafters, and fresh drafters around the same target for replays.

    Args:
        model: The target.
        specs: Drafters by their names.
        recordings: What is replayed and served.
        settings: How.

    Attributes:
        target: The loaded target.
        labels: The drafters' labels in the engine that serves, by their names.
    """

    def __init__(
        self,
        model: str,
        specs: Mapping[str, str],
        recordings: Sequence[Recording],
        settings: ForecastSettings,
    ) -> None:
        self._model, self._recordings, self._settings = model, recordings, settings
        self._llm = LLM(
            model,
            drafters=list(specs.values()) or "none",
            max_nodes=settings.max_nodes,
            prefix_caching=False,
            device=settings.device,
            dtype=settings.dtype,
        )
        self._log = _TimedLog(self._llm.engine.parts.planner)
        self._llm.engine.parts = replace(self._llm.engine.parts, planner=self._log)
        self.target = self._llm.engine.parts.target
        self.labels = dict(zip(specs, self._llm.engine.drafters, strict=False))

    def close(self) -> None:
        """Let go of the drafters."""
        self._llm.close()

    def can_replay(self, name: str) -> bool:
        """Return whether a replay tells what a drafter would do."""
        return is_replayable(self._llm.engine.drafters[self.labels[name]].needs, has_target=True)

    def replay(self, spec: str) -> list[Run]:
        """Replay all texts with a drafter that has seen none of them; return a run of each."""
        info, tokenizer = self.target.info, self._llm.tokenizer
        config = EngineConfig(max_requests=1, prefix_caching=False)
        plan = Plan(drafters=(spec,), max_nodes=self._settings.max_nodes, adaptive=False)
        longest = max(len(it.prompt_ids) + it.params.max_new_tokens for it in self._recordings)
        num_tokens = min(longest, info.context_limit) + plan.node_limit + BLOCK_SIZE
        engine = EngineBuilder(self._model, plan, config, num_tokens).build(
            self.target, tokenizer, device=self._settings.device, dtype=self._settings.dtype
        )
        try:
            played = replay(
                info,
                engine.drafters,
                self._recordings,
                max_nodes=plan.node_limit,
                target=self.target,
                decode=tokenizer.decode if tokenizer else None,
                compile_grammar=GrammarCompiler(tokenizer, info.vocab_size, info.eos_ids).compile,
                config=config,
            )
        finally:
            engine.close()
        return [Run(steps) for steps in _by_request(played.steps)]

    def serve(self, num_texts: Mapping[str, int], on_progress: OnProgress) -> dict[str, list[Run]]:
        """Serve the first texts with every drafter in turn; the turns rotate."""
        runs: dict[str, list[Run]] = {name: [] for name in num_texts}
        num_places = max(num_texts.values())
        for place, recording in enumerate(self._recordings[:num_places]):
            on_progress(Progress(stage=STAGE, done=place, total=num_places))
            names = [name for name, count in num_texts.items() if place < count]
            for name in rotated(names, place):
                runs[name].append(self._serve(self.labels.get(name, "none"), recording))
        on_progress(Progress(stage=STAGE, done=num_places, total=num_places))
        return runs

    def _serve(self, label: str, recording: Recording) -> Run:
        log = self._log
        log.steps, log.own_s = [], 0.0
        start_s = time.perf_counter()
        [output] = self._llm.generate(
            [list(recording.prompt_ids)],
            replace(recording.params, seed=recording.seed),
            drafters=label,
        )
        total_s = time.perf_counter() - start_s - log.own_s
        is_bitwise = self._llm.engine.exactness is Exactness.BITWISE
        if is_bitwise and list(output.token_ids) != list(recording.output_ids):
            raise ForetokenError(
                f"serving with {label} gave other tokens than were recorded",
                hint="report this; if the target has changed, record its outputs anew",
            )
        return Run(log.steps, total_s)


class _TimedLog(StepLog):
    """A log that knows what it takes itself."""

    own_s = 0.0

    def observe(
        self,
        shares: Sequence[Share],
        scored: Sequence[Draft],
        verdicts: Sequence[Verdict | None],
        times: StepTimes,
    ) -> None:
        start_s = time.perf_counter()
        super().observe(shares, scored, verdicts, times)
        self.own_s += time.perf_counter() - start_s


def _by_request(steps: Sequence[StepRecord]) -> list[list[StepRecord]]:
    """Return the steps of each request, of requests that ran one after the other."""
    groups: dict[str, list[StepRecord]] = {}
    chunks: list[StepRecord] = []  # of the prompt of the request that comes next
    for step in steps:
        chunks.append(step)
        if step.drafts:
            groups.setdefault(step.drafts[0].request_id, []).extend(chunks)
            chunks = []
    return list(groups.values())


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Return the names in an order that begins elsewhere every turn."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


__all__ = ["Bench", "ForecastSettings", "Run", "recordings", "rotated"]
