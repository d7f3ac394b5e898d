"""Engines for every way to decode, all on one loaded model, with a watched planner each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from foretoken.bench.speed.settings import AUTO, LOOPSPEC, PLAIN, SHARED, SpeedSettings, Way
from foretoken.core.options import ComponentSpec
from foretoken.core.params import SamplingParams
from foretoken.drafters import prepare_drafter
from foretoken.drafters.base import Drafter, DrafterHost
from foretoken.drafters.in_flight import InFlightDrafter
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.loops import fixed_plan
from foretoken.engine.request import Request
from foretoken.errors import ModelError
from foretoken.models.adapter import LanguageModel
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.cost import CostCurve
from foretoken.planner.cost_measure import measure_cost
from foretoken.planner.cost_ticks import measure_ticks
from foretoken.planner.flight_adaptive import AdaptiveFlightPlanner
from foretoken.planner.in_flight import FixedFlightPlanner, FlightPlan, FlightPlanner, TickReport
from foretoken.planner.plan import Plan
from foretoken.verifiers import VERIFIERS

VERIFIER = "coupled"  # every way says what plain decoding says, at any temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt to continue, in every way alike.

    Args:
        prompt_ids: At least one.
        params: Its seed included.
    """

    prompt_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A way's path through all prompts, once.

    Args:
        output_ids: Of each prompt.
        decode_s: Of each batch, from the first token of its last prompt to the last token.
        num_ticks: Of each prompt; 0 by ordinary passes.
        reports: Of ticks, and of passes where a planner chose between the two.
    """

    output_ids: list[list[int]]
    decode_s: list[float]
    num_ticks: list[int]
    reports: list[TickReport]


class Watched(FlightPlanner):
    """Notes what a planner is told.

    Args:
        planner: Which says what it says.
    """

    def __init__(self, planner: FlightPlanner) -> None:
        self._planner = planner
        self.reports: list[TickReport] = []

    def plan(self, num_requests: int, num_keys: int) -> FlightPlan:
        """Return what the planner says."""
        return self._planner.plan(num_requests, num_keys)

    def observe(self, report: TickReport) -> None:
        """Note it and pass it on."""
        self.reports.append(report)
        self._planner.observe(report)


class Stand:
    """A loaded model.

    Args:
        settings: Of the run.
        name: Of the model, one of the settings'.

    Raises:
        ModelError: It cannot be loaded; or it is the shared one and shares no layers.
    """

    def __init__(self, settings: SpeedSettings, name: str) -> None:
        path = settings.models[name]
        self._settings = settings
        self.target: LanguageModel = load_model(path, dtype=settings.dtype, device=settings.device)
        self.tokenizer = Tokenizer.load(path)
        self.loops = 1 if self.target.info.loops is None else self.target.info.loops.loops
        if name == SHARED and self.loops < 2:
            raise ModelError(
                f"model {settings.names[name]!r} runs each of its layers once; bench speed is for "
                "models that run them in loops",
                hint="train one with: foretoken train looped",
            )
        self.ticks: CostCurve | None = None
        self.passes: CostCurve | None = None

    def measure_costs(self) -> None:
        """Measure the model's ticks and passes here and now, whatever is kept on disk."""
        self.ticks, self.passes = measure_ticks(self.target), measure_cost(self.target)

    def lane(self, way: Way, max_tokens: int) -> Lane:
        """Return an engine for a way.

        Args:
            way: Of this model.
            max_tokens: Longest prompt and output together.
        """
        settings, batch = self._settings, max(self._settings.batch_sizes)
        plan = Plan(drafters=("none",), verifier=VERIFIER, max_nodes=max(8, 2 * self.loops))
        num_tokens = batch * (max_tokens + plan.node_limit + 2 * BLOCK_SIZE)
        host = DrafterHost(
            target=self.target,
            tokenizer=self.tokenizer,
            device=settings.device,
            dtype=settings.dtype,
            max_requests=batch,
            kv_cache_tokens=num_tokens,
        )
        drafters = self._drafters(way, host)
        planner = self._planner(way, drafters)
        watched = None if planner is None else Watched(planner)
        engine = Engine(
            self.target,
            self.target.new_cache(num_tokens),
            drafters,
            VERIFIERS.load(VERIFIER)(),
            plan,
            flight_planner=watched,
            config=EngineConfig(max_requests=batch, prefix_caching=False),
        )
        return Lane(engine, watched)

    def _drafters(self, way: Way, host: DrafterHost) -> dict[str, Drafter]:
        if way.kind == PLAIN:
            return {}
        if way.kind == LOOPSPEC:
            spec = ComponentSpec("loopspec", dict(self._settings.loopspec or {}))
        else:
            check = self._settings.checks[0] if way.kind == AUTO else way.kind
            options: dict[str, Any] = {"check": check}
            if way.exit_loop:
                options["exit_loop"] = way.exit_loop
            spec = ComponentSpec("speed", options)
        return {spec.name: prepare_drafter(spec)(host)}

    def _planner(self, way: Way, drafters: Mapping[str, Drafter]) -> FlightPlanner | None:
        if way.kind == PLAIN:
            return None
        if way.kind == AUTO and self.ticks is not None and self.passes is not None:
            check = self._settings.checks[0]
            return AdaptiveFlightPlanner(self.ticks, self.passes, loops=self.loops, check=check)
        [drafter] = drafters.values()
        return FixedFlightPlanner(fixed_plan(cast(InFlightDrafter, drafter), self.loops))


class Lane:
    """One engine's way through the prompts.

    Args:
        engine: Used by nobody else.
        watched: Its planner; None if it has none.
    """

    def __init__(self, engine: Engine, watched: Watched | None) -> None:
        self._engine, self._watched = engine, watched

    def run(self, tasks: Sequence[Task], batch_size: int) -> Turn:
        """Continue all prompts, so many at once.

        Raises:
            RequestError: A request failed.
        """
        if self._watched is not None:
            self._watched.reports = []
        requests: list[Request] = []
        decode_s = []
        for start in range(0, len(tasks), batch_size):
            batch = [
                self._engine.add_request(task.prompt_ids, task.params)
                for task in tasks[start : start + batch_size]
            ]
            while self._engine.num_unfinished:
                self._engine.step()
            requests += batch
            decode_s.append(max(request.stats.decode_s for request in batch))
        self._engine.cache.check_integrity()
        for request in requests:
            if request.error is not None:
                raise request.error
        return Turn(
            output_ids=[request.output_ids for request in requests],
            decode_s=decode_s,
            num_ticks=[request.stats.num_ticks for request in requests],
            reports=[] if self._watched is None else self._watched.reports,
        )

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.close()


__all__ = ["Lane", "Stand", "Task", "Turn", "Watched"]
