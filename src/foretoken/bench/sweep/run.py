"""The sweep: every method is loaded once, and every cell is written when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foretoken.bench.foretoken_host import ForetokenHost
from foretoken.bench.resume import begun_record, new_record, save_record
from foretoken.bench.runner import System, foretoken_specs, load_host
from foretoken.bench.sweep.cell import as_entry, measure
from foretoken.bench.sweep.settings import AUTO, PLAIN, SweepSettings
from foretoken.bench.sweep.work import PROMPT_TOKENS, SweepWork
from foretoken.bench.systems import HostInfo
from foretoken.core.progress import OnProgress, Progress, silent
from foretoken.models.tokenizer import Tokenizer
from foretoken.planner.plan import ADAPTIVE_MAX_NODES

WHAT = "foretoken bench sweep"
FORMAT = 1
POLICY = (
    "Rounds are paired: in each, every method continues the same prompts by the same number of "
    "tokens in turn, in an order that rotates; ratios are formed within a round. Every round has "
    "prompts that no method has seen. Each method runs in a process of its own, plain decoding in "
    "that of the first one. A cell has more rounds while an interval is wider than asked for. "
    "Intervals: bootstrap of the median over rounds, 95 %, percentile method. story: the target "
    "continues beginnings of stories as it likes. edit: the prompt is a story, and the target is "
    "made to say it again with a word in twelve exchanged. random: prompt and output are made of "
    "random tokens. Making the target say something raises one logit after a real pass. The best "
    "fixed method of a cell is the one that turned out best, so `auto` is held against the "
    "luckiest, too."
)


def run_sweep(
    settings: SweepSettings,
    command: Sequence[str],
    folder: Path | None = None,
    report: OnProgress = silent,
    *,
    begins_anew: bool = False,
) -> dict[str, Any]:
    """Measure all cells that are not in the folder's record, and return the whole record.

    Args:
        settings: What to measure.
        command: The command line's words.
        folder: Where the record is, or will be after the first cell; it exists. None keeps
            nothing until the end.
        report: Is told how far it is.
        begins_anew: Whether a record that is there counts for nothing.

    Raises:
        ConfigError: The record there is of other settings, or a setting is not allowed.
        ModelError: A model cannot be loaded.
        ForetokenError: A method failed.
    """
    found = begun_record(WHAT, settings.as_json(), None if begins_anew else folder)
    record = found or new_record(
        WHAT,
        number=FORMAT,
        policy=POLICY,
        settings=settings.as_json(),
        threads=settings.threads,
        command=command,
    )
    cells, keys = record["cells"], settings.cells
    if cells:
        report(Progress(done=len(cells), total=len(keys), stage="cells", is_resumed=True))
    torch.set_num_threads(settings.threads)
    with ExitStack() as stack:
        if len(cells) < len(keys):
            systems = _load(stack, settings, report)
            record["target"] = _facts(systems[0].host.info)
            work = SweepWork(settings, Tokenizer.load(settings.model), systems[0].host.info)
        for key in keys[len(cells) :]:
            say = partial(_say, report, len(cells), len(keys))
            cells.append(as_entry(key, measure(key, systems, work, settings, say)))
            if folder is not None:
                save_record(record, folder)
    _say(report, len(cells), len(keys), "done")
    return record


def _say(report: OnProgress, done: int, total: int, *doing: str) -> None:
    report(Progress(done=done, total=total, stage="cells", detail=": ".join(doing)))


def _facts(info: HostInfo) -> dict[str, Any]:
    return {
        "num_parameters": info.num_parameters,
        "dtype": info.dtype,
        "exactness": info.exactness,
    }


def _load(stack: ExitStack, settings: SweepSettings, report: OnProgress) -> list[System]:
    """Return plain decoding, each drafter alone, and the engine's own choice among all."""
    longest = settings.max_new_tokens + max(PROMPT_TOKENS, settings.max_new_tokens)
    specs = list(foretoken_specs(settings, longest))
    auto = replace(
        specs[0][1],
        drafters=settings.drafters,
        max_nodes=max(ADAPTIVE_MAX_NODES, *settings.max_nodes),  # it has the choice
        adaptive=True,
    )
    systems: list[System] = []
    for name, spec in [*specs, (AUTO, auto)]:
        host = load_host(stack, settings, report, name, partial(ForetokenHost, spec))
        if not systems:
            systems.append(System(PLAIN, PLAIN, host, is_peer=False))
        systems.append(System(name, PLAIN, host, is_peer=False))
    return systems


__all__ = ["FORMAT", "POLICY", "WHAT", "run_sweep"]
