"""Runs the engine once per cell, and replays the target's own output through both models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from foretoken.bench.specinfer.settings import COUPLED, SpecInferSettings, System, systems
from foretoken.bench.specinfer.success_rate import MAX_GUESSES, Continuation, Replay
from foretoken.bench.workloads import WorkloadPrompt
from foretoken.core.draft import SiblingDraw
from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.drafters.base import Drafter, DrafterHost
from foretoken.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.fit import agree_on_draws
from foretoken.engine.request import Request
from foretoken.errors import ConfigError
from foretoken.models.adapter import ModelInfo
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer, check_same_vocabulary
from foretoken.planner.plan import Plan
from foretoken.verifiers import VERIFIERS
from foretoken.verifiers.base import Verifier

TEMPERATURES = (0.0, 1.0)
MAX_REQUESTS = 16
KV_SLACK_TOKENS = 512  # room for trees, unfilled blocks and the like, per request
DRAFTER = "draft-model"


@dataclass(slots=True)
class Counts:
    """What a system did for one prompt, all its outputs together.

    Args:
        num_tokens: Tokens emitted.
        num_steps: Passes of the target.
        num_draft_tokens: Nodes scored, roots not counted.
        num_accepted: Draft tokens emitted.
        num_changed: Outputs with other tokens than plain decoding's.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    num_changed: int = 0

    def add(self, request: Request, plain: Request) -> None:
        """Count one output."""
        stats = request.stats
        self.num_tokens += stats.num_tokens
        self.num_steps += stats.num_steps
        self.num_draft_tokens += stats.num_draft_tokens
        self.num_accepted += stats.num_accepted
        self.num_changed += request.output_ids != plain.output_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One cell's counts.

    Args:
        system: What ran.
        draw: How siblings were drawn.
        counts: One per prompt.
    """

    system: System
    draw: SiblingDraw
    counts: list[Counts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Success:
    """How often guesses held the target's token, at one temperature.

    Args:
        temperature: Of the target's output.
        sums: Way to guess to sums over positions, one row per prompt, [U, K].
        num_positions: Positions per prompt, [U].
    """

    temperature: float
    sums: dict[str, NDArray[np.float64]]
    num_positions: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecInferResult:
    """All that a run gave.

    Args:
        settings: As asked for.
        target: Facts about the target.
        draft: Facts about the draft model.
        num_prompts: Prompts that were continued, U.
        num_skipped: Prompts that do not fit the models' context.
        success: One per temperature.
        cells: In the order of the tables.
    """

    settings: SpecInferSettings
    target: ModelInfo
    draft: ModelInfo
    num_prompts: int
    num_skipped: int
    success: list[Success]
    cells: list[CellResult]


def run_specinfer(settings: SpecInferSettings, report: OnProgress = silent) -> SpecInferResult:
    """Measure all tables.

    Args:
        settings: What to measure.
        report: Called when an output is done.

    Raises:
        ConfigError: A rule and the draft model's trees do not go together, or no prompt fits.
        ModelError: A model cannot be loaded, or the two do not share their tokens.
        UnknownNameError: There is no such verifier.
    """
    cells = _cells(settings)
    for cell in cells:  # what does not go together is found before anything is loaded
        agree_on_draws(cell.verifier, _rule(cell), {DRAFTER: DraftModelDrafter})
    report(Progress(done=0, total=1, detail="loading the models"))
    torch.set_num_threads(settings.threads)
    work = _Work(settings)
    num_plain = sum(len(work.seeds(temperature)) for temperature in TEMPERATURES)
    total = 2 * num_plain + sum(len(work.seeds(cell.temperature)) for cell in cells)
    ticks = _Ticks(report, total)
    plain = {temperature: work.run_plain(temperature, ticks) for temperature in TEMPERATURES}
    success = [work.success(temperature, plain[temperature], ticks) for temperature in plain]
    results = [work.run_cell(cell, plain[cell.temperature], ticks) for cell in cells]
    ticks.finish()
    return SpecInferResult(
        settings=settings,
        target=work.target.info,
        draft=work.draft.info,
        num_prompts=len(work.prompts),
        num_skipped=len(settings.workload.prompts) - len(work.prompts),
        success=success,
        cells=results,
    )


class _Work:
    """The models, and the outputs that every system is asked for."""

    def __init__(self, settings: SpecInferSettings) -> None:
        self.settings = settings
        self.target = load_model(settings.model, dtype=settings.dtype, device=settings.device)
        self.draft = load_model(settings.draft, dtype=settings.dtype, device=settings.device)
        self.tokenizer = Tokenizer.load(settings.model)
        check_same_vocabulary(
            self.target, self.tokenizer, self.draft, Tokenizer.load(settings.draft)
        )
        self.prompts = self._fitting_prompts()
        self._longest = max(len(prompt.token_ids) + prompt.num_wanted for prompt in self.prompts)

    def seeds(self, temperature: float) -> range:
        """Return one seed per output; output i continues prompt i modulo their number."""
        rounds = self.settings.num_seeds if temperature else 1
        return range(self.settings.seed, self.settings.seed + rounds * len(self.prompts))

    def run_plain(self, temperature: float, ticks: _Ticks) -> list[Request]:
        """Return the target's own outputs."""
        rule = VERIFIERS.load(COUPLED)()
        return self._run(Plan(max_nodes=0), rule, {}, temperature, ticks.doing("plain decoding"))

    def success(self, temperature: float, plain: Sequence[Request], ticks: _Ticks) -> Success:
        """Return how often the draft's guesses hold the next token of the target's outputs."""
        ticks = ticks.doing("success rate")
        replay = Replay(self.target, self.draft, self._longest)
        sums: dict[str, NDArray[np.float64]] = {}
        num_positions = np.zeros(len(self.prompts))
        for number, request in enumerate(plain):
            continuation = Continuation(
                prompt_ids=request.prompt_ids,
                output_ids=request.output_ids,
                temperature=temperature,
                seed=request.seed,
            )
            index = number % len(self.prompts)
            num_positions[index] += len(request.output_ids)
            for way, total in replay.success(continuation).items():
                rows = sums.setdefault(way, np.zeros((len(self.prompts), MAX_GUESSES)))
                rows[index] += total
            ticks.tick()
        return Success(temperature=temperature, sums=sums, num_positions=num_positions)

    def run_cell(self, cell: System, plain: Sequence[Request], ticks: _Ticks) -> CellResult:
        """Return what one system needs for the outputs."""
        rule = _rule(cell)()
        drafter = self._drafter(cell)
        plan = Plan(verifier=cell.verifier, max_nodes=cell.max_nodes)
        requests = self._run(
            plan, rule, {DRAFTER: drafter}, cell.temperature, ticks.doing(_heading(cell))
        )
        counts = [Counts() for _ in self.prompts]
        for number, (request, truth) in enumerate(zip(requests, plain, strict=True)):
            counts[number % len(counts)].add(request, truth)
        draw = agree_on_draws(cell.verifier, rule, {DRAFTER: drafter})[DRAFTER]
        if cell.temperature == 0:
            draw = SiblingDraw.DETERMINISTIC
        return CellResult(system=cell, draw=draw, counts=counts)

    def _run(
        self,
        plan: Plan,
        rule: Verifier,
        drafters: dict[str, Drafter],
        temperature: float,
        ticks: _Ticks,
    ) -> list[Request]:
        engine = Engine(
            self.target,
            self.target.new_cache(self._kv_tokens(plan.node_limit)),
            drafters,
            rule,
            plan,
            config=EngineConfig(max_requests=MAX_REQUESTS),
        )
        requests = []
        for number, seed in enumerate(self.seeds(temperature)):
            prompt = self.prompts[number % len(self.prompts)]
            params = SamplingParams(
                temperature=temperature,
                seed=seed,
                max_new_tokens=prompt.num_wanted,
                ignore_eos=True,
            )
            requests.append(engine.add_request(prompt.token_ids, params))
        while engine.num_unfinished:
            for emission in engine.step():
                if emission.finish_reason is not None:
                    ticks.tick()
        for request in requests:
            if request.error is not None:
                raise request.error
        return requests

    def _drafter(self, cell: System) -> Drafter:
        """Build the drafter around the model that is loaded already."""
        host = DrafterHost(
            target=self.target,
            tokenizer=self.tokenizer,
            device=self.settings.device,
            dtype=self.settings.dtype,
            max_requests=MAX_REQUESTS,
            kv_cache_tokens=self._kv_tokens(cell.max_nodes),
        )
        draft_options = DraftModelOptions(path=self.settings.draft, **cell.shape)
        return DraftModelDrafter(self.draft, draft_options, host)

    def _kv_tokens(self, max_nodes: int) -> int:
        return MAX_REQUESTS * (self._longest + max_nodes + KV_SLACK_TOKENS)

    def _fitting_prompts(self) -> list[_Prompt]:
        """Return the prompts that leave room for whole outputs in both contexts."""
        settings = self.settings
        limit = min(self.target.info.context_limit, self.draft.info.context_limit)
        prompts = [
            _Prompt(
                _encode(self.tokenizer, item),
                min(settings.max_new_tokens, item.max_new_tokens or settings.max_new_tokens),
            )
            for item in settings.workload.prompts
        ]
        kept = [it for it in prompts if 0 < len(it.token_ids) <= limit - it.num_wanted]
        if not kept:
            raise ConfigError(
                f"no prompt of workload {settings.workload.name} leaves room for "
                f"{settings.max_new_tokens} tokens in a context of {limit}",
                hint="lower --max-new-tokens, or choose another workload",
            )
        return kept


class _Prompt(NamedTuple):
    """A prompt, and how many tokens are to follow."""

    token_ids: list[int]
    num_wanted: int


class _Ticks:
    """Counts outputs and reports them."""

    def __init__(self, report: OnProgress, total: int) -> None:
        self._report = report
        self._done, self._total = 0, total
        self._doing = ""

    def doing(self, what: str) -> _Ticks:
        """Say what comes now."""
        self._doing = what
        self._report(Progress(done=self._done, total=self._total, detail=what))
        return self

    def tick(self) -> None:
        """Count an output."""
        self._done += 1
        self._report(Progress(done=self._done, total=self._total, detail=self._doing))

    def finish(self) -> None:
        """Say that nothing comes any more."""
        self._report(Progress(done=self._total, total=self._total, detail="done"))


def _cells(settings: SpecInferSettings) -> list[System]:
    named = {cell.verifier for cell in systems(settings, frozenset())}
    chains = {rule for rule in named if VERIFIERS.load(rule).max_width == 1}
    return list(systems(settings, frozenset(chains)))


def _rule(cell: System) -> type[Verifier]:
    """Return the verifier's class, which takes siblings of one draw only if the cell says so."""
    rule: type[Verifier] = VERIFIERS.load(cell.verifier)
    if cell.draw is None:
        return rule
    narrowed: type[Verifier] = type(rule.__name__, (rule,), {"draws": (cell.draw,)})
    return narrowed


def _encode(tokenizer: Tokenizer | None, item: WorkloadPrompt) -> list[int]:
    if not isinstance(item.prompt, str):
        return list(item.prompt)
    if tokenizer is None:
        raise ConfigError(
            f"{item.place}: the prompt is a text, but the model has no tokenizer",
            hint="use a .jsonl workload with prompt_ids",
        )
    return tokenizer.encode(item.prompt)


def _heading(cell: System) -> str:
    mode = "greedy" if cell.temperature == 0 else "sampled"
    return f"{mode}, {cell.tree} tree of width {cell.width}, {cell.verifier}"


__all__ = ["CellResult", "Counts", "SpecInferResult", "Success", "run_specinfer"]
