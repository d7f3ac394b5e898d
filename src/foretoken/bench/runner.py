"""Paired rounds: every system does the same work, in turn, in an order that rotates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from foretoken.bench.foretoken_host import ForetokenHost, ForetokenSpec
from foretoken.bench.machine import BandwidthProbe
from foretoken.bench.peers import PEERS
from foretoken.bench.peers.base import PEER_DTYPES, PeerSpec
from foretoken.bench.settings import BenchSettings, RoundSettings
from foretoken.bench.systems import (
    Host,
    HostBuilder,
    HostInfo,
    PeerHost,
    Task,
    Turn,
)
from foretoken.bench.worker import WorkerHost
from foretoken.bench.workloads import WorkloadPrompt
from foretoken.core.options import ComponentSpec
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.errors import ConfigError, RequestError
from foretoken.models.tokenizer import Tokenizer

PLAIN = "foretoken plain"
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class System:
    """One line of the results.

    Args:
        name: Unique.
        plain: Name of the same system without speculation; its own if it is that.
        host: What runs it.
        is_peer: Whether it is another system than Foretoken.
    """

    name: str
    plain: str
    host: Host
    is_peer: bool

    @property
    def speculative(self) -> bool:
        """Whether it drafts."""
        return self.name != self.plain


@dataclass(frozen=True, slots=True)
class Cell:
    """The rounds of one temperature and batch size.

    Args:
        temperature: Of sampling.
        batch_size: Prompts at once.
        systems: Those that took part.
        left_out: Those that could not, with the reason.
        rounds: For each round, the turn of each system by name.
        bandwidth: For each round, bytes per second that the machine could read; empty if the
            systems do not run on its processor.
    """

    temperature: float
    batch_size: int
    systems: list[System]
    left_out: dict[str, str]
    rounds: list[dict[str, Turn]]
    bandwidth: list[float]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All that a run gave.

    Args:
        settings: As asked for.
        prompts: Those that fit the model's context, in order; tasks follow them.
        num_skipped: Prompts that did not.
        systems: All of them.
        cells: One per temperature and batch size.
    """

    settings: BenchSettings
    prompts: list[WorkloadPrompt]
    num_skipped: int
    systems: list[System]
    cells: list[Cell]


def run_bench(settings: BenchSettings, report: OnProgress = silent) -> BenchResult:
    """Load every system and measure it.

    Args:
        settings: What to measure.
        report: Called before each turn, and once more when all is done.

    Raises:
        ConfigError: A setting is not allowed, or no prompt fits the model.
        ModelError: A model cannot be loaded.
        ForetokenError: A system failed.
    """
    peer_classes = {name: PEERS.load(name) for name in settings.peers}  # typing errors first
    tokenizer = Tokenizer.load(settings.model)
    prompt_ids = [_encode(tokenizer, item) for item in settings.workload.prompts]
    torch.set_num_threads(settings.threads)
    with ExitStack() as stack:
        load = partial(_load_host, stack, settings, report)
        longest = max(map(len, prompt_ids)) + settings.max_new_tokens
        systems: list[System] = []
        for name, spec in foretoken_specs(settings, longest):
            label = f"foretoken {name}"
            host = load(label, partial(ForetokenHost, spec))
            if not systems:
                systems.append(System(PLAIN, PLAIN, host, is_peer=False))
            if spec.drafters != ("none",):
                systems.append(System(label, PLAIN, host, is_peer=False))
        info = systems[0].host.info
        tasks, kept = _tasks(settings, prompt_ids, info)
        for name, peer_class in peer_classes.items():
            host = load(name, partial(PeerHost, peer_class, _peer_spec(settings, info)))
            plain = f"{name} plain"
            systems.append(System(plain, plain, host, is_peer=True))
            if settings.draft is not None:
                systems.append(System(f"{name} draft", plain, host, is_peer=True))
        cells = _run_cells(settings, tasks, systems, report)
    prompts = [settings.workload.prompts[index] for index in kept]
    num_skipped = len(settings.workload.prompts) - len(kept)
    return BenchResult(settings, prompts, num_skipped, systems, cells)


def foretoken_specs(
    settings: RoundSettings, max_tokens: int
) -> Iterator[tuple[str, ForetokenSpec]]:
    """Yield a name and a spec per setting; one without drafter if there is none.

    Args:
        settings: Of the run.
        max_tokens: Longest prompt and output together.
    """
    drafters = settings.drafters or ("none",)
    names = [ComponentSpec.parse(drafter).name for drafter in drafters]
    for number, (name, drafter) in enumerate(zip(names, drafters, strict=True)):
        for max_nodes in settings.max_nodes if name != "none" else settings.max_nodes[:1]:
            label = name
            if earlier := names[:number].count(name):
                label += f"#{earlier + 1}"
            if len(settings.max_nodes) > 1:
                label += f" ≤{max_nodes}"
            yield (
                label,
                ForetokenSpec(
                    model=settings.model,
                    drafters=(drafter,),
                    max_nodes=max_nodes,
                    dtype=settings.dtype,
                    device=settings.device,
                    threads=settings.threads,
                    max_batch=max(settings.batch_sizes),
                    max_tokens=max_tokens,
                ),
            )


def _load_host(
    stack: ExitStack, settings: BenchSettings, report: OnProgress, label: str, build: HostBuilder
) -> Host:
    """Load a system, in a process of its own unless the settings say otherwise."""
    report(Progress(done=0, total=1, detail=f"loading {label}"))
    host = build() if settings.in_process else WorkerHost(label, build)
    stack.callback(host.close)
    return host


def _peer_spec(settings: BenchSettings, info: HostInfo) -> PeerSpec:
    if info.dtype not in PEER_DTYPES:
        raise ConfigError(
            f"peers run {' or '.join(PEER_DTYPES)}; the model runs in {info.dtype}",
            hint="give --dtype float32 or --dtype bfloat16",
        )
    model = Path(settings.model).expanduser()
    if not model.is_dir():
        raise ConfigError(
            f"peers load a local directory; got model {settings.model!r}",
            hint="download the model and give its directory",
        )
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    return PeerSpec(
        model=model,
        draft=settings.draft,
        dtype=info.dtype,
        threads=settings.threads,
        num_draft_tokens=settings.num_draft_tokens,
        work_dir=settings.work_dir,
    )


def _encode(tokenizer: Tokenizer | None, item: WorkloadPrompt) -> tuple[int, ...]:
    if not isinstance(item.prompt, str):
        return item.prompt
    if tokenizer is None:
        raise ConfigError(
            f"{item.place}: the prompt is a text, but the model has no tokenizer",
            hint="use a .jsonl workload with prompt_ids",
        )
    return tuple(tokenizer.encode(item.prompt))


def _tasks(
    settings: BenchSettings, prompt_ids: Sequence[tuple[int, ...]], info: HostInfo
) -> tuple[list[Task], list[int]]:
    """Return the greedy tasks of prompts that fit the context, and their places."""
    tasks, kept = [], []
    for index, (token_ids, item) in enumerate(
        zip(prompt_ids, settings.workload.prompts, strict=True)
    ):
        room = (info.context_limit or len(token_ids) + settings.max_new_tokens) - len(token_ids)
        limit = item.max_new_tokens or settings.max_new_tokens
        num_tokens = min(settings.max_new_tokens, limit, room)
        if num_tokens < 1 or not token_ids:
            continue
        kept.append(index)
        tasks.append(
            Task(
                prompt_ids=token_ids,
                max_new_tokens=num_tokens,
                temperature=0.0,
                seed=settings.seed + index,
            )
        )
    if not tasks:
        raise ConfigError(
            f"no prompt of workload {settings.workload.name} fits the model's context of "
            f"{info.context_limit} tokens",
            hint="choose another workload or model",
        )
    return tasks, kept


def _run_cells(
    settings: BenchSettings, tasks: Sequence[Task], systems: Sequence[System], report: OnProgress
) -> list[Cell]:
    cells = [
        _new_cell(temperature, batch_size, systems)
        for temperature in settings.temperatures
        for batch_size in settings.batch_sizes
    ]
    done = 0
    with _bandwidth(settings) as measure:
        for cell in cells:
            work = [replace(task, temperature=cell.temperature) for task in tasks]
            where = f"temperature {cell.temperature:g}, batch {cell.batch_size}"
            planned = _num_turns(cells, settings)
            report(Progress(done=done, total=planned, detail=f"{where}: warm-up"))
            _warm_up(cell, work)
            total = _num_turns(cells, settings)
            for number in range(settings.rounds):
                cell.bandwidth.extend(measure())
                turns = {}
                for system in rotated(cell.systems, number):
                    doing = f"{where}, round {number + 1} of {settings.rounds}: {system.name}"
                    report(Progress(done=done, total=total, detail=doing))
                    turns[system.name] = system.host.run(
                        work, batch_size=cell.batch_size, speculative=system.speculative
                    )
                    done += 1
                cell.rounds.append(turns)
    report(Progress(done=done, total=done, detail="done"))
    return cells


def _new_cell(temperature: float, batch_size: int, systems: Sequence[System]) -> Cell:
    """Return a cell of the systems that can run so many prompts at once."""
    able = [it for it in systems if it.host.info.max_batch in (None, batch_size)]
    left_out = {it.name: "runs one prompt at a time" for it in systems if it not in able}
    return Cell(temperature, batch_size, able, left_out, [], [])


def _num_turns(cells: Sequence[Cell], settings: BenchSettings) -> int:
    return sum(len(cell.systems) for cell in cells) * settings.rounds


def rotated(systems: Sequence[System], number: int) -> list[System]:
    """Return the order of round `number`: each system is as often early as late."""
    start = number % len(systems)
    return [*systems[start:], *systems[:start]]


def _warm_up(cell: Cell, work: Sequence[Task]) -> None:
    """Let every system do a little of the work, so that none pays for what is new.

    Peers that say that they cannot do this work are left out of the cell.
    """
    some = [
        replace(task, max_new_tokens=min(WARM_UP_TOKENS, task.max_new_tokens))
        for task in work[: cell.batch_size]
    ]
    for system in list(cell.systems):
        if system.plain in cell.left_out:  # there is nothing to compare it with
            cell.left_out[system.name] = cell.left_out[system.plain]
            cell.systems.remove(system)
            continue
        try:
            system.host.run(some, batch_size=cell.batch_size, speculative=system.speculative)
        except RequestError as error:
            if not system.is_peer:
                raise
            cell.left_out[system.name] = str(error)
            cell.systems.remove(system)


@contextmanager
def _bandwidth(settings: BenchSettings) -> Iterator[Callable[[], list[float]]]:
    """Yield what measures the machine's read bandwidth; nothing where it does not matter."""
    if settings.device not in ("auto", "cpu") or torch.cuda.is_available():
        yield list
        return
    probe = BandwidthProbe(settings.threads)
    try:
        yield lambda: [probe.measure()]
    finally:
        probe.close()


__all__ = [
    "PLAIN",
    "BenchResult",
    "Cell",
    "System",
    "foretoken_specs",
    "rotated",
    "run_bench",
]
