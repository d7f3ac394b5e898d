"""Foretoken itself as a system under test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from foretoken import __version__
from foretoken.bench.clocks import Seconds
from foretoken.bench.instrument import timed_phases
from foretoken.bench.memory import memory, reset_peak_memory
from foretoken.bench.peers.base import PeerOutput
from foretoken.bench.script import scripted
from foretoken.bench.systems import HostInfo, Task, Turn, joined, units
from foretoken.core.params import SamplingParams
from foretoken.engine.engine import Engine
from foretoken.engine.llm import LLM
from foretoken.engine.request import Request
from foretoken.models.adapter import LanguageModel
from foretoken.models.quiet import silence_libraries

KV_SLACK_TOKENS = 512  # room for trees, unfilled blocks and the like, per request


@dataclass(frozen=True, slots=True, kw_only=True)
class ForetokenSpec:
    """One setting of Foretoken.

    Args:
        model: Directory, hub id or embedded name.
        drafters: Specs; ("none",) for none.
        max_nodes: Most draft tokens per request and step.
        dtype: As the user gave it.
        device: As the user gave it.
        threads: CPU threads.
        max_batch: Most requests at once.
        max_tokens: Longest prompt and output together.
        adaptive: Whether the engine chooses among the drafters, step by step, by measured times.
        times_phases: Whether to say where the time goes; that takes microseconds of every step.
    """

    model: str
    drafters: tuple[str, ...]
    max_nodes: int
    dtype: str
    device: str
    threads: int
    max_batch: int
    max_tokens: int
    adaptive: bool = False
    times_phases: bool = True


class ForetokenHost:
    """Foretoken itself, with the time of its parts taken from outside.

    Args:
        spec: What to load.
        target: The model of the spec if it is loaded; several hosts may share it.
    """

    def __init__(self, spec: ForetokenSpec, target: LanguageModel | None = None) -> None:
        silence_libraries()
        # The cache is as large as the work needs, not as the memory allows: several systems
        # share the machine, and the memory that each takes is a result.
        tokens = spec.max_batch * (spec.max_tokens + spec.max_nodes + KV_SLACK_TOKENS)
        self._times_phases = spec.times_phases
        self._llm = LLM(
            spec.model if target is None else target,
            drafters=spec.drafters,
            max_nodes=spec.max_nodes,
            adaptive=spec.adaptive,
            dtype=spec.dtype,
            device=spec.device,
            threads=spec.threads,
            max_requests=spec.max_batch,
            kv_cache_tokens=tokens,
            prefix_caching=False,  # turns repeat their prompts, and each is to read them
        )
        info = self._llm.info
        self.info = HostInfo(
            version=f"foretoken {__version__}",
            dtype=str(info.dtype).removeprefix("torch."),
            context_limit=info.context_limit,
            num_parameters=info.num_parameters,
            vocab_size=info.vocab_size,
            exactness=self._llm.engine.exactness.value,
        )

    def run(self, tasks: Sequence[Task], *, batch_size: int, speculative: bool) -> Turn:
        """Continue all tasks."""
        reset_peak_memory()
        timed = timed_phases(self._llm) if self._times_phases else nullcontext()
        with timed as phases:
            turns = [
                turn
                for unit in units(tasks, batch_size)
                for turn in self.run_in_parts(unit, num_parts=1, speculative=speculative)
            ]
        return replace(joined(turns), phases=phases, memory=memory())

    def run_in_parts(
        self, tasks: Sequence[Task], *, num_parts: int, speculative: bool
    ) -> Iterator[Turn]:
        """Continue tasks, all at once, and yield a turn for every part of their tokens.

        Others may work between two parts: neither their time nor what they do counts. A part has
        no step if the one before has made its tokens, too.
        """
        engine, drafters = self._llm.engine, None if speculative else ()
        scripts = {task.prompt_ids: task.script for task in tasks if task.script}
        num_wanted, num_made, wall_s = sum(task.max_new_tokens for task in tasks), 0, 0.0
        requests: list[Request] = []
        try:
            for part in range(1, num_parts + 1):
                is_last = part == num_parts
                # Outside of what is timed by parts: a real target would not do this work.
                with scripted(engine.parts, scripts) as prompter:
                    start = Seconds.now()
                    if part == 1:
                        for task in tasks:
                            requests.append(_submitted(engine, task, drafters))
                    while engine.num_unfinished:
                        if not is_last and num_made * num_parts >= part * num_wanted:
                            break
                        num_made += sum(len(it.token_ids) for it in engine.step())
                    took = Seconds.now().since(start).since(prompter.spent)
                wall_s += took.wall_s
                outputs = [_as_output(request, wall_s) for request in requests] if is_last else []
                yield Turn(outputs=outputs, unit_s=[took.wall_s], cpu_s=took.cpu_s)
        finally:
            for request in requests:
                engine.abort(request.request_id)

    def close(self) -> None:
        """Forget the model; its memory goes with the last reference."""
        del self._llm


def _submitted(engine: Engine, task: Task, drafters: Sequence[str] | None) -> Request:
    request = engine.new_request(task.prompt_ids, _params(task), drafters=drafters)
    request.streams_text = False
    engine.submit(request)
    return request


def _params(task: Task) -> SamplingParams:
    return SamplingParams(
        temperature=task.temperature,
        seed=task.seed,
        max_new_tokens=task.max_new_tokens,
        ignore_eos=True,
    )


def _as_output(request: Request, seconds: float) -> PeerOutput:
    stats = request.stats
    return PeerOutput(
        token_ids=list(request.output_ids),
        seconds=seconds,
        prefill_s=stats.prefill_s,
        num_steps=stats.num_steps,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted=stats.num_accepted,
    )


__all__ = ["ForetokenHost", "ForetokenSpec"]
