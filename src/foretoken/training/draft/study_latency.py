"""How long drafts of a shape take, measured on models without training, through what serves.

A draft's time depends on its sizes and not on what its weights say, so candidates need no training
to be timed. Each drafts a chain of the longest lookahead behind recorded prompts, step by step
beside the real target, so that it finds the processor's caches as it will when it serves. Rounds go
through all candidates in an order that rotates: a machine that is slower for a while is slower for
all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from foretoken.core.params import SamplingParams
from foretoken.engine.build import EngineBuilder
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.engine.step_log import StepLog
from foretoken.models.adapter import LanguageModel
from foretoken.models.cache import BLOCK_SIZE
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.plan import Plan

WARM_UP_STEPS = 3  # the prompt's, and some in which memory is touched first


@dataclass(frozen=True, slots=True)
class StepMs:
    """Median times of the steps of one round, in milliseconds.

    Args:
        draft: A whole draft; 0 without a draft model.
        target: The target's pass over the draft and its root.
        other: The rest.
    """

    draft: float
    target: float
    other: float


class StepTimer:
    """Times steps of a loaded target with draft models from directories, or without one.

    Args:
        target: The target.
        directory: Its own.
        prompt_ids: What is continued.
        lookahead: Draft tokens of a chain.
        num_steps: Steps that are timed, of each call.
        device: Where the draft models run.
    """

    def __init__(
        self,
        target: LanguageModel,
        directory: Path,
        prompt_ids: Sequence[int],
        *,
        lookahead: int,
        num_steps: int,
        device: str,
    ) -> None:
        self._target, self._directory = target, directory
        self._tokenizer = Tokenizer.load(str(directory))
        self._lookahead, self._num_steps, self._device = lookahead, num_steps, device
        # A draft without training is hardly ever right, but if it were, steps would not run out.
        num_tokens = (num_steps + WARM_UP_STEPS) * (lookahead + 1)
        room = target.info.context_limit - num_tokens
        self._prompt_ids = list(prompt_ids)[-max(1, room) :]
        self._params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)

    @property
    def num_keys(self) -> int:
        """Positions that the target looks back on in the middle of the steps, about."""
        return len(self._prompt_ids) + self._num_steps // 2

    def time(self, draft: Path | None) -> StepMs:
        """Return the times of steps with a draft model; None for plain decoding."""
        with self._engine(draft) as engine:
            log = StepLog(engine.parts.planner)
            engine.parts = replace(engine.parts, planner=log)
            engine.add_request(self._prompt_ids, self._params)
            for _ in range(WARM_UP_STEPS + self._num_steps):
                engine.step()
        steps = log.steps[WARM_UP_STEPS:]
        return StepMs(
            draft=1000 * median(step.draft_s for step in steps),
            target=1000 * median(step.times.pass_s for step in steps),
            other=1000 * median(step.other_s for step in steps),
        )

    @contextmanager
    def _engine(self, draft: Path | None) -> Iterator[Engine]:
        chain = "-".join(["1"] * self._lookahead)
        spec = f"draft-model:path={draft},expansion={chain},max_depth={self._lookahead}"
        plan = Plan(
            drafters=("none" if draft is None else spec,),
            max_nodes=0 if draft is None else self._lookahead,
            adaptive=False,
        )
        config = EngineConfig(max_requests=1, prefix_caching=False)
        num_tokens = len(self._prompt_ids) + self._params.max_new_tokens + BLOCK_SIZE
        builder = EngineBuilder(
            str(self._directory), plan, config, num_tokens + self._lookahead + 1
        )
        engine = builder.build(self._target, self._tokenizer, device=self._device, dtype="auto")
        try:
            yield engine
        finally:
            engine.close()


__all__ = ["StepMs", "StepTimer"]
