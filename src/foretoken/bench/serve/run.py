"""A load bench: two servers, what plain decoding can do, and every load below and above that."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from foretoken.bench.resume import begun_record, new_record, save_record
from foretoken.bench.serve.client import LoadClient, Reply
from foretoken.bench.serve.level import (
    Level,
    Served,
    Turn,
    as_entry,
    measure_level,
    take_turn,
)
from foretoken.bench.serve.process import ServerProcess
from foretoken.bench.serve.settings import DRAFTS, PLAIN, ServeSettings
from foretoken.bench.serve.trace import Trace, mean_lengths
from foretoken.bench.serve.work import Prompter, Text, load_text
from foretoken.bench.statistics import rounded
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.engine.names import resolve_model
from foretoken.errors import ForetokenError
from foretoken.models.tokenizer import Tokenizer

WHAT = "foretoken bench serve"
FORMAT = 1
CAPACITY_TURNS = 3  # in durations of a replay; the first one does not count
POLICY = (
    "Two `foretoken serve` processes on loopback, one without drafters (plain), one with (drafts); "
    "one is asked while the other has nothing to do. The client is a third process; the servers "
    "share the machine's cores with it, and what it uses is in the record. Capacity: requests per "
    "second that plain decoding ends while up to twice as many are kept going as it runs at once, "
    "drawn from the whole trace; a load is a part of that. A replay sends successive requests of "
    "the trace at its times, scaled by the one factor that makes their mean rate that of the load, "
    "whatever the answers take (open loop); rounds begin at evenly spread places of the trace. "
    "Both servers get the same requests, alternately first; all outputs have the trace's scaled "
    "length. Latencies are from when a request is due to its last token. Goodput: output tokens of "
    "answered requests over the length of the replay, or until the last answer if that is later. "
    "Ratios are formed within rounds; intervals: bootstrap of the median over rounds, 95 %, "
    "percentile method; with few rounds they are rough."
)


def run_serve(
    settings: ServeSettings,
    command: Sequence[str],
    folder: Path | None = None,
    report: OnProgress = silent,
    *,
    begins_anew: bool = False,
) -> dict[str, Any]:
    """Measure all loads that are not in the folder's record, and return the whole record.

    Args:
        settings: What to measure.
        command: The command line's words.
        folder: Where the record is, or will be after the first load; it exists. None keeps
            nothing until the end.
        report: Is told how far it is.
        begins_anew: Whether a record that is there counts for nothing.

    Raises:
        ConfigError: The record there is of other settings, or a setting is not allowed.
        ForetokenError: A server did not start, or answered nothing.
    """
    found = begun_record(WHAT, settings.as_json(), None if begins_anew else folder, number=FORMAT)
    record = found or new_record(
        WHAT,
        number=FORMAT,
        policy=POLICY,
        settings=settings.as_json(),
        threads=settings.threads,
        command=command,
    )
    if record["cells"]:
        num_done, num_all = len(record["cells"]), len(settings.loads)
        report(Progress(done=num_done, total=num_all, stage="loads", is_resumed=True))
    if len(record["cells"]) < len(settings.loads):
        save = (lambda: None) if folder is None else partial(save_record, record, folder)
        _complete(record, settings, save, report)
    _say(report, record, settings, "done")
    return record


def _complete(
    record: dict[str, Any], settings: ServeSettings, save: Callable[[], None], report: OnProgress
) -> None:
    """Measure what a record lacks, and save it part by part."""
    say = partial(_say, report, record, settings)
    say("starting servers")
    torch.set_num_threads(settings.threads)
    text = load_text(settings, Tokenizer.load(resolve_model(settings.model)))
    with ExitStack() as stack:
        systems = _start(stack, settings)
        card = systems[PLAIN].server.get("/v1/models")["data"][0]
        trace = settings.trace.scaled(
            card["max_model_len"], settings.max_prompt_tokens, settings.max_new_tokens
        )
        busy_turns = partial(_busy_turns, systems, trace, text, settings)
        if "capacity" in record:
            say("warming up")
            list(busy_turns(settings.duration_s))
        else:
            say("capacity")
            turns = busy_turns(CAPACITY_TURNS * settings.duration_s)
            record["lengths"] = _lengths(trace, card["max_model_len"])
            record["capacity"] = _capacity(turns, settings)
            save()
        capacity = record["capacity"][PLAIN]["requests_per_s"]
        for level in _levels(trace, text, settings, capacity)[len(record["cells"]) :]:
            rounds = measure_level(systems, level, partial(say, f"load {level.load:g}"))
            entry = as_entry(level, rounds, settings)
            entry["at"] = datetime.now(UTC).isoformat(timespec="seconds")
            entry["load_average"] = [round(average, 2) for average in os.getloadavg()]
            record["cells"].append(entry)
            save()


def _start(stack: ExitStack, settings: ServeSettings) -> dict[str, Served]:
    """Return a server without drafters and one with, both ready.

    Plain decoding has a server of its own: drafters that a request may not use would still follow
    it, and the prefixes that one has cached would be the other's gain.
    """
    drafters = {PLAIN: ("none",), DRAFTS: settings.drafters}
    systems = {}
    for name, specs in drafters.items():
        server = stack.enter_context(closing(ServerProcess(name, _options(settings, specs))))
        server.wait()  # alone, because a server may measure what passes cost when it starts
        client = LoadClient(server.base_url, settings.model_name, settings.temperature)
        systems[name] = Served(server, client)
    return systems


def _options(settings: ServeSettings, drafters: Sequence[str]) -> list[str]:
    """Return the options of a server."""
    adaptive = {None: [], True: ["--adaptive"], False: ["--fixed"]}[settings.adaptive]
    options = {
        "--model": settings.model,
        "--model-name": settings.model_name,
        "--dtype": settings.dtype,
        "--device": settings.device,
        "--threads": settings.threads,
        "--max-nodes": settings.max_nodes if drafters != ("none",) else None,
        "--max-requests": settings.max_requests,
        "--max-queue": settings.max_queue,
        "--kv-cache-tokens": settings.kv_cache_tokens,
    }
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    specs = (word for spec in drafters for word in ("--drafter", spec))
    return [*map(str, words), *(adaptive if drafters != ("none",) else ()), *specs]


def _busy_turns(
    systems: Mapping[str, Served], trace: Trace, text: Text, settings: ServeSettings, seconds: float
) -> Iterator[tuple[str, Turn]]:
    """Yield for each server what it does in some seconds when there is always more."""
    num_at_once = settings.max_requests + min(settings.max_requests, settings.max_queue)
    # The loads begin at the beginning of the text, this in its middle.
    prompter = Prompter(text, settings.seed, len(text.token_ids) // 2)
    # Lengths drift along a trace: what is true of its beginning need not be of all.
    arrivals = Random(settings.seed).sample(trace.arrivals, len(trace.arrivals))
    asks = itertools.tee(prompter.asks(itertools.cycle(arrivals)), len(systems))
    for (name, served), mine in zip(systems.items(), asks, strict=True):
        keep_busy = partial(served.client.keep_busy, mine, num_at_once, seconds)
        yield name, take_turn(served, keep_busy, seconds)


def _capacity(turns: Iterable[tuple[str, Turn]], settings: ServeSettings) -> dict[str, Any]:
    """Return what each server can do, from what it did when there was always more."""
    capacity = {}
    for name, turn in turns:
        # At first all begin at once and the shortest end; then it is as it stays.
        replies = [it for it in turn.complete if it.ended_s > settings.duration_s]
        _check(name, turn, replies)
        seconds = turn.seconds - settings.duration_s
        capacity[name] = {
            "requests_per_s": rounded(len(replies) / seconds),
            "tokens_per_s": rounded(sum(reply.num_tokens for reply in replies) / seconds),
            "num_requests": len(replies),
            "mean_new_tokens": rounded(statistics.mean(reply.num_tokens for reply in replies)),
        }
    return capacity


def _check(name: str, turn: Turn, replies: Sequence[Reply]) -> None:
    errors = [reply.error for reply in turn.replies if reply.error]
    if errors:
        raise ForetokenError(
            f"{name} does not even answer when one request follows another: {errors[0]}",
            hint="try the same options with foretoken serve",
        )
    if not replies:
        raise ForetokenError(
            f"{name} ended no request in {turn.seconds:.3g} s", hint="raise --duration"
        )


def _levels(trace: Trace, text: Text, settings: ServeSettings, capacity: float) -> list[Level]:
    """Return the loads and their requests: for the same capacity the same ones."""
    prompter = Prompter(text, settings.seed)
    firsts = [len(trace.arrivals) * n // settings.rounds for n in range(settings.rounds)]
    levels = []
    for load in settings.loads:
        rate = load * capacity
        parts = [trace.part(first, rate, settings.duration_s) for first in firsts]
        rounds = [list(prompter.asks(part)) for part in parts]
        levels.append(Level(load, rate, len(parts[0]) / rate, rounds))
    return levels


def _lengths(trace: Trace, context_limit: int) -> dict[str, float]:
    num_prompt, num_new = mean_lengths(trace.arrivals)
    return {
        "context_limit": context_limit,
        "mean_prompt_tokens": rounded(num_prompt),
        "mean_new_tokens": rounded(num_new),
    }


def _say(
    report: OnProgress, record: Mapping[str, Any], settings: ServeSettings, *doing: str
) -> None:
    done, total = len(record["cells"]), len(settings.loads)
    report(Progress(done=done, total=total, stage="loads", detail=": ".join(doing)))


__all__ = ["FORMAT", "POLICY", "WHAT", "run_serve"]
