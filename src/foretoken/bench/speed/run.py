"""Measures every way to decode in paired rounds, and writes down what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from foretoken.bench.resume import new_record
from foretoken.bench.speed.cell import Rounds, as_entry
from foretoken.bench.speed.lanes import Lane, Stand, Task
from foretoken.bench.speed.picture import picture
from foretoken.bench.speed.settings import SHARED, SpeedSettings, Way
from foretoken.bench.statistics import rounded
from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.errors import ConfigError

WHAT = "foretoken bench speed"
FORMAT = 1
WARM_UP_TOKENS = 16
POLICY = (
    "Rounds are paired: in each, every way continues the same prompts by the same number of tokens "
    "in turn, in an order that rotates; ratios are formed within a round. All ways of a model "
    "share its weights and one process. Times are those from the first token, which comes from "
    "the prompt's pass, to the last. Intervals: bootstrap of the median over rounds and prompts, "
    "95 %, percentile method. Ticks per token are counted from one token's first tick to the "
    "next one's, so that the last token's way to the end does not count; predicted speed-ups "
    "include it. They are made of the agreement (lazy) or the settling depths (eager) that were "
    "seen in these rounds, of the mean time of these ticks, and of plain decoding's time per "
    "token. Every token is compared with plain decoding's."
)


def run_speed(
    settings: SpeedSettings, command: Sequence[str], report: OnProgress = silent
) -> dict[str, Any]:
    """Load the models, measure all ways in every cell, and return the record.

    Args:
        settings: What to measure.
        command: The command line's words.
        report: Is told how far it is.

    Raises:
        ConfigError: No prompt fits a model's context.
        ModelError: A model cannot be loaded, or shares no layers.
        RequestError: A request failed.
    """
    torch.set_num_threads(settings.threads)
    record = new_record(
        WHAT,
        number=FORMAT,
        policy=POLICY,
        settings=settings.as_json(),
        threads=settings.threads,
        command=command,
    )
    stands = {}
    for name in settings.models:
        report(Progress(done=0, total=1, detail=f"loading {settings.names[name]}"))
        stands[name] = Stand(settings, name)
    shared = stands[SHARED]
    report(Progress(done=0, total=1, detail="measuring ticks and passes"))
    shared.measure_costs()
    record["models"] = {name: _facts(stand, settings, name) for name, stand in stands.items()}
    record["costs"] = _costs(shared)
    tasks = _tasks(settings, stands)
    cells = [(t, b) for t in settings.temperatures for b in settings.batch_sizes]
    for number, (temperature, batch_size) in enumerate(cells):
        rounds = Rounds(settings.ways, shared.loops, batch_size, temperature)
        _measure(settings, stands, tasks, rounds, _Teller(report, number, len(cells)))
        record["cells"].append(as_entry(rounds))
        if "picture" not in record and batch_size == 1 and (found := picture(settings, rounds)):
            record["picture"] = found
    report(Progress(done=len(cells), total=len(cells), detail="done"))
    return record


class _Teller:
    """Says where in the run a turn is."""

    def __init__(self, report: OnProgress, cell: int, num_cells: int) -> None:
        self._report, self._cell, self._num_cells = report, cell, num_cells

    def __call__(self, what: str) -> None:
        self._report(Progress(done=self._cell, total=self._num_cells, stage="cells", detail=what))


def _measure(
    settings: SpeedSettings,
    stands: Mapping[str, Stand],
    tasks: Sequence[Task],
    rounds: Rounds,
    say: _Teller,
) -> None:
    """Fill the rounds of one cell; a short one that does not count comes first."""
    longest = max(len(task.prompt_ids) for task in tasks) + settings.max_new_tokens
    tasks = [_changed(task, temperature=rounds.temperature) for task in tasks]
    short = min(WARM_UP_TOKENS, settings.max_new_tokens)
    some = [_changed(task, max_new_tokens=short) for task in tasks[: rounds.batch_size]]
    with ExitStack() as stack:
        lanes: list[tuple[Way, Lane]] = []
        for way in rounds.ways:
            lane = stands[way.model].lane(way, longest)
            stack.callback(lane.close)
            lanes.append((way, lane))
        for way, lane in lanes:
            say(f"warm-up: {way.name}")
            lane.run(some, rounds.batch_size)
        for number in range(settings.rounds):
            start = number % len(lanes)
            turns = {}
            for way, lane in (*lanes[start:], *lanes[:start]):
                say(f"round {number + 1} of {settings.rounds}: {way.name}")
                turns[way.name] = lane.run(tasks, rounds.batch_size)
            rounds.turns.append(turns)


def _changed(task: Task, **changes: Any) -> Task:
    return replace(task, params=replace(task.params, **changes))


def _tasks(settings: SpeedSettings, stands: Mapping[str, Stand]) -> list[Task]:
    """Return the prompts in the tokens that all models share.

    Raises:
        ConfigError: A prompt is a text and there is no tokenizer, or none fits.
    """
    tokenizer = stands[SHARED].tokenizer
    limit = min(stand.target.info.context_limit for stand in stands.values())
    tasks = []
    for number, item in enumerate(settings.workload.prompts):
        if isinstance(item.prompt, str):
            if tokenizer is None:
                raise ConfigError(
                    f"{item.place}: the prompt is a text, but the model has no tokenizer",
                    hint="use a .jsonl workload with prompt_ids",
                )
            prompt_ids = tokenizer.encode(item.prompt)
        else:
            prompt_ids = list(item.prompt)
        prompt_ids = prompt_ids[: settings.max_prompt_tokens]
        if prompt_ids and len(prompt_ids) + settings.max_new_tokens <= limit:
            params = SamplingParams(
                temperature=0.0,
                seed=settings.seed + number,
                max_new_tokens=settings.max_new_tokens,
                ignore_eos=True,
            )
            tasks.append(Task(prompt_ids=prompt_ids, params=params))
    if not tasks:
        raise ConfigError(
            f"no prompt of workload {settings.workload.name} fits the models' context of {limit} "
            f"tokens with {settings.max_new_tokens} new ones",
            hint="lower --max-new-tokens or choose another workload",
        )
    return tasks


def _facts(stand: Stand, settings: SpeedSettings, name: str) -> dict[str, Any]:
    info = stand.target.info
    facts: dict[str, Any] = {
        "name": settings.names[name],
        "num_parameters": info.num_parameters,
        "num_layers": info.num_layers,
        "loops": stand.loops,
        "dtype": str(info.dtype).removeprefix("torch."),
        "exactness": info.exactness.value,
    }
    if quality := settings.quality.get(name):
        facts["quality"] = dict(quality)
    return facts


def _costs(stand: Stand) -> dict[str, Any]:
    """Return times by rows, measured apart from the rounds, without what is around passes."""
    curves = {"tick_ms": stand.ticks, "pass_ms": stand.passes}
    return {
        name: {str(rows): rounded(curve.pass_ms(rows, 0)) for rows in range(1, 2 * stand.loops + 1)}
        for name, curve in curves.items()
        if curve is not None
    }


__all__ = ["FORMAT", "POLICY", "WHAT", "run_speed"]
