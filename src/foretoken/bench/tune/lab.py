"""Runs ways to decode on one loaded target: live, or replayed from what it said once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch

from foretoken.bench.systems import units
from foretoken.bench.tune.settings import Setup, TunePrompt, TuneSettings
from foretoken.core.params import SamplingParams
from foretoken.engine.build import EngineBuilder
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.names import resolve_model
from foretoken.engine.replay import Recording, Replay, is_replayable, replay
from foretoken.engine.request import Request
from foretoken.engine.stats import RequestStats
from foretoken.engine.step_log import DraftRecord, StepLog, StepRecord
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.grammar import GrammarCompiler
from foretoken.models.loading import load_model
from foretoken.models.tokenizer import Tokenizer

KV_SLACK_TOKENS = 256  # room for trees, unfilled blocks and the like, per request
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way through all prompts.

    Args:
        steps: What every step did.
        stats: One per prompt.
        output_ids: One per prompt.
        unit_s: Seconds of each batch of prompts; none if it was replayed.
    """

    steps: list[StepRecord]
    stats: list[RequestStats]
    output_ids: list[list[int]]
    unit_s: list[float]

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return sum(stats.num_tokens for stats in self.stats)

    @property
    def num_steps(self) -> int:
        """Steps of each prompt, summed."""
        return sum(stats.num_steps for stats in self.stats)

    @property
    def tokens_per_step(self) -> float:
        """TAR over all prompts."""
        return self.num_tokens / self.num_steps

    @property
    def mean_tokens_per_step(self) -> float:
        """TAR of each prompt, averaged, so that long outputs count no more than short ones."""
        return sum(stats.tokens_per_step for stats in self.stats) / len(self.stats)

    @property
    def nodes_per_step(self) -> float:
        """Draft tokens that a request has scored per step."""
        return sum(stats.num_draft_tokens for stats in self.stats) / self.num_steps

    @property
    def drafts(self) -> list[DraftRecord]:
        """Every draft of every request."""
        return [draft for step in self.steps for draft in step.drafts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt that fits the model.

    Args:
        prompt_ids: At least one.
        params: How it is continued, its seed included.
        seed: The same.
    """

    prompt_ids: list[int]
    params: SamplingParams
    seed: int


class Lab:
    """A target, the prompts it is asked to continue, and fresh drafters for every run.

    Fresh, because a drafter that keeps outputs would know them all from the run before.

    Args:
        settings: What to load and to continue.

    Raises:
        ConfigError: No prompt fits the model's context, or a prompt is a text without tokenizer.
        ModelError: The model cannot be loaded.
    """

    def __init__(self, settings: TuneSettings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        path = resolve_model(settings.model)
        self.target = load_model(path, dtype=settings.dtype, device=settings.device)
        self.tokenizer = Tokenizer.load(path)
        self.prompts = self._fitting()
        info = self.target.info
        self._compile = GrammarCompiler(self.tokenizer, info.vocab_size, info.eos_ids).compile
        self._config = EngineConfig(max_requests=settings.batch_size, prefix_caching=False)
        self._kv_tokens = self._needed_tokens()

    def run(
        self,
        setups: Sequence[Setup],
        *,
        first: int = 0,
        on_turn: Callable[[str], None] = lambda _: None,
    ) -> list[Run]:
        """Continue all prompts in every one of some ways; return a run for each.

        The ways take turns with every batch of prompts, so that a machine that gets slower for a
        while is slower for all of them.

        Args:
            setups: The ways.
            first: Which way begins; the next one begins the next batch.
            on_turn: Called with the name of a way before it continues a batch.
        """
        return self._run(setups, units(self.prompts, self.settings.batch_size), first, on_turn)

    def warm_up(self, setups: Sequence[Setup]) -> None:
        """Continue one batch by a few tokens, so that nothing new is paid for when timed."""
        some = [_shortened(task) for task in self.prompts[: self.settings.batch_size]]
        self._run(setups, [some], 0, lambda _: None)

    @property
    def num_units(self) -> int:
        """Batches of prompts."""
        return len(units(self.prompts, self.settings.batch_size))

    def _run(
        self,
        setups: Sequence[Setup],
        batches: Sequence[Sequence[Task]],
        first: int,
        on_turn: Callable[[str], None],
    ) -> list[Run]:
        with ExitStack() as stack:
            lanes = [_Lane(stack.enter_context(self._engine(setup))) for setup in setups]
            for number, batch in enumerate(batches):
                for place in range(len(lanes)):
                    index = (first + number + place) % len(lanes)
                    on_turn(setups[index].name)
                    lanes[index].run(batch)
        return [lane.finish() for lane in lanes]

    def recordings(self, run: Run) -> list[Recording]:
        """Return a run's outputs as recordings."""
        return [
            Recording(prompt_ids=it.prompt_ids, output_ids=ids, params=it.params, seed=it.seed)
            for it, ids in zip(self.prompts, run.output_ids, strict=True)
        ]

    def check(self, setup: Setup) -> None:
        """Build a setup once, to find what is wrong with it."""
        with self._engine(setup):
            pass

    @contextmanager
    def draft_models(self, setup: Setup) -> Iterator[list[LanguageModel]]:
        """Yield the language models that a setup's drafters run, as far as they show them."""
        with self._engine(setup) as engine:
            drafters = engine.drafters.values()
            parts = [part for drafter in drafters for part in vars(drafter).values()]
            models = [part for part in parts if isinstance(part, LanguageModel)]
            yield [model for model in models if model is not self.target]

    def can_replay(self, setup: Setup) -> bool:
        """Return whether a record of outputs, read by the target, tells what it would draft."""
        with self._engine(setup) as engine:
            needs = [drafter.needs for drafter in engine.drafters.values()]
            return all(is_replayable(it, has_target=True) for it in needs)

    def replay(
        self,
        setups: Sequence[Setup],
        recordings: Sequence[Recording],
        *,
        on_turn: Callable[[str], None] = lambda _: None,
    ) -> list[Run]:
        """Return what some ways to decode would do for recordings, without decoding them.

        They take turns as in `run`, so that their times can be compared with each other.
        """
        played: list[list[Replay]] = [[] for _ in setups]
        with ExitStack() as stack:
            engines = [stack.enter_context(self._engine(setup)) for setup in setups]
            for unit in units(recordings, self.settings.batch_size):
                for setup, engine, done in zip(setups, engines, played, strict=True):
                    on_turn(setup.name)
                    done.append(
                        replay(
                            self.target.info,
                            engine.drafters,
                            unit,
                            max_nodes=setup.plan.node_limit,
                            target=self.target,
                            decode=self.tokenizer.decode if self.tokenizer else None,
                            compile_grammar=self._compile,
                            config=self._config,
                        )
                    )
        return [
            Run(
                steps=list(chain.from_iterable(it.steps for it in done)),
                stats=list(chain.from_iterable(it.stats for it in done)),
                output_ids=[list(it.output_ids) for it in recordings],
                unit_s=[],
            )
            for done in played
        ]

    @contextmanager
    def _engine(self, setup: Setup) -> Iterator[Engine]:
        """Build a setup with fresh drafters, and close it at the end."""
        builder = EngineBuilder(self.settings.model, setup.plan, self._config, self._kv_tokens)
        engine = builder.build(
            self.target, self.tokenizer, device=self.settings.device, dtype=self.settings.dtype
        )
        try:
            yield engine
        finally:
            engine.close()

    def _fitting(self) -> list[Task]:
        """Return the prompts as token ids, with seeds; those that do not fit are left out."""
        limit = self.target.info.context_limit
        fitting = []
        for number, item in enumerate(self.settings.prompts):
            token_ids = self._encode(item)
            if token_ids and len(token_ids) < limit:
                seed = self.settings.seed + number if item.params.seed is None else item.params.seed
                params = replace(item.params, seed=seed)
                fitting.append(Task(prompt_ids=token_ids, params=params, seed=seed))
        if not fitting:
            raise ConfigError(
                f"no prompt of {self.settings.source} fits the model's context of {limit} tokens",
                hint="shorten the prompts or choose another model",
            )
        return fitting

    def _encode(self, item: TunePrompt) -> list[int]:
        if not isinstance(item.prompt, str):
            return list(item.prompt)
        if self.tokenizer is None:
            raise ConfigError(
                f"{item.place}: the prompt is a text, but the model has no tokenizer",
                hint="give a .jsonl file with prompt_ids",
            )
        return self.tokenizer.encode(item.prompt)

    def _needed_tokens(self) -> int:
        longest = max(len(it.prompt_ids) + it.params.max_new_tokens for it in self.prompts)
        sizes = (*self.settings.max_nodes, self.settings.auto.node_limit)
        per_request = min(longest, self.target.info.context_limit) + max(sizes)
        return self.settings.batch_size * (per_request + BLOCK_SIZE + KV_SLACK_TOKENS)


class _Lane:
    """One engine's way through the batches.

    Args:
        engine: Used by nobody else.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._log = StepLog(engine.parts.planner)
        engine.parts = replace(engine.parts, planner=self._log)
        self._requests: list[Request] = []
        self._unit_s: list[float] = []

    def run(self, batch: Sequence[Task]) -> None:
        """Continue a batch of prompts."""
        start_s = time.perf_counter()
        self._requests += [self._engine.add_request(it.prompt_ids, it.params) for it in batch]
        while self._engine.num_unfinished:
            self._engine.step()
        self._unit_s.append(time.perf_counter() - start_s)

    def finish(self) -> Run:
        """Return what was done.

        Raises:
            RequestError: A request failed.
        """
        for request in self._requests:
            if request.error is not None:
                raise request.error
        return Run(
            steps=self._log.steps,
            stats=[request.stats for request in self._requests],
            output_ids=[request.output_ids for request in self._requests],
            unit_s=self._unit_s,
        )


def _shortened(task: Task) -> Task:
    num_tokens = min(WARM_UP_TOKENS, task.params.max_new_tokens)
    return replace(task, params=replace(task.params, max_new_tokens=num_tokens))


__all__ = ["Lab", "Run", "Task"]
