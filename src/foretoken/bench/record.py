"""The record of a run: every number of every round, and what is derived from them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from foretoken.bench.machine import environment
from foretoken.bench.peers.base import PeerOutput
from foretoken.bench.phases import PHASES
from foretoken.bench.runner import PLAIN, BenchResult, Cell, System
from foretoken.bench.statistics import NUM_RESAMPLES, rates, ratio_interval, rounded, spread
from foretoken.bench.systems import Turn, units

FORMAT = 1
POLICY = (
    "Every system continues the same token ids by the same number of tokens, going on after the "
    "end of a sequence. Rounds are paired: in each, every system does all the work in turn, in "
    "an order that rotates; ratios are formed within a round. Tokens per second include the "
    f"prompt's own pass. Intervals: bootstrap, 95 %, {NUM_RESAMPLES} resamples of rounds and "
    "prompts (batches, where several prompts run at once), percentile method. Memory is that of "
    "a system's process, in which plain and speculative decoding share the models."
)


def make_record(result: BenchResult, command: Sequence[str]) -> dict[str, Any]:
    """Return the record as a JSON object; nothing in it names this machine's folders.

    Args:
        result: Of the run.
        command: The command line's words.
    """
    settings = result.settings
    weight_bytes = _weight_bytes(result)
    record: dict[str, Any] = {
        "what": "foretoken bench",
        "format": FORMAT,
        "command": portable_command(command),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "policy": POLICY,
        "environment": environment(settings.threads),
        "settings": {
            "model": settings.model_name,
            "num_parameters": result.systems[0].host.info.num_parameters,
            "weight_bytes_per_pass": weight_bytes,
            "dtype": result.systems[0].host.info.dtype,
            "device": settings.device,
            "drafters": [portable(drafter) for drafter in settings.drafters],
            "max_nodes": list(settings.max_nodes),
            "workload": settings.workload.name,
            "num_prompts": len(result.prompts),
            "num_skipped_prompts": result.num_skipped,
            "max_new_tokens": settings.max_new_tokens,
            "rounds": settings.rounds,
            "seed": settings.seed,
            "draft_of_peers": settings.draft.name if settings.draft and settings.peers else None,
            "num_draft_tokens_of_peers": settings.num_draft_tokens if settings.peers else None,
        },
        "systems": {
            system.name: {
                "version": system.host.info.version,
                "dtype": system.host.info.dtype,
                "speculative": system.speculative,
                "exactness": system.host.info.exactness or None,
            }
            for system in result.systems
        },
        "cells": [_cell(cell, result, weight_bytes) for cell in result.cells],
    }
    return record


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Write `record.json` into a folder that exists and return its path."""
    path = folder / "record.json"
    text = json.dumps(record, indent=2, ensure_ascii=False)
    # Numbers of one round belong on one line: a person compares rounds, a diff shows them.
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", _joined, text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def portable_command(words: Sequence[str]) -> str:
    """Return a command line with paths of this machine shortened to their names."""
    name = Path(words[0]).stem if words else "foretoken"
    shown = [name if name != "__main__" else "foretoken", *map(portable, words[1:])]
    return " ".join(f"'{word}'" if re.search(r"\s", word) else word for word in shown)


def portable(word: str) -> str:
    """Return a word with every absolute or home path in it shortened to its last part."""
    return re.sub(r"(?<![\w.~])~?(?:/[^/,=]+)*/([^/,=]+)/?(?=$|[,=])", r"\1", word)


def different_tokens(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the places where Foretoken's speculation gave other tokens than its plain decoding.

    Each has the cell's temperature and batch size, the system, round, prompt, place and token.
    """
    return [
        {
            "temperature": cell["temperature"],
            "batch_size": cell["batch_size"],
            "system": name,
            **difference,
        }
        for cell in record["cells"]
        for name, system in cell["systems"].items()
        for difference in system.get("differences", ())
    ]


def _joined(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"


def _cell(cell: Cell, result: BenchResult, weight_bytes: int | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "temperature": cell.temperature,
        "batch_size": cell.batch_size,
        "num_tokens": sum(_unit_tokens(cell, cell.systems[0])),
    }
    if cell.bandwidth:
        values = [rounded(value) for value in cell.bandwidth]
        entry["read_bandwidth_bytes_per_s"] = {**spread(values), "rounds": values}
    if cell.left_out:
        entry["left_out"] = cell.left_out
    entry["systems"] = {
        system.name: _system(system, cell, result, weight_bytes) for system in cell.systems
    }
    return entry


def _system(
    system: System, cell: Cell, result: BenchResult, weight_bytes: int | None
) -> dict[str, Any]:
    turns = [turns[system.name] for turns in cell.rounds]
    tokens = _unit_tokens(cell, system)
    per_round = rates(tokens, _unit_seconds(turns))
    entry: dict[str, Any] = {
        "tokens_per_s": {**spread(per_round), "rounds": [rounded(value) for value in per_round]}
    }
    decode = [_decode_rate(turn, cell.batch_size) for turn in turns]
    decode_rates = [value for value in decode if value is not None]
    if len(decode_rates) == len(turns):
        entry["decode_tokens_per_s"] = spread(decode_rates)
    if system.name != PLAIN:
        entry["speed_up"] = _ratio(cell, system.name, PLAIN)
    if system.is_peer and system.speculative:
        entry["speed_up_over_own_plain"] = _ratio(cell, system.name, system.plain)
    entry |= counts(turns[0].outputs)  # they hold for all rounds
    entry |= _phases(turns, sum(tokens))
    if weight_bytes and cell.bandwidth and cell.batch_size == 1 and not system.speculative:
        entry["bandwidth_share"] = _bandwidth_share(
            turns, decode_rates or per_round, cell.bandwidth, weight_bytes
        )
    memory = {key: max(turn.memory[key] for turn in turns) for key in turns[0].memory}
    entry["memory"] = memory
    entry |= _changes(system, cell, result)
    if cell.batch_size == 1 and result.settings.workload.categories:
        entry["categories"] = _categories(system, cell, result)
    entry["unit_s"] = [[rounded(value) for value in turn.unit_s] for turn in turns]
    return entry


def _ratio(cell: Cell, name: str, base: str) -> dict[str, Any]:
    ours = _unit_seconds([turns[name] for turns in cell.rounds])
    theirs = _unit_seconds([turns[base] for turns in cell.rounds])
    ratios = (theirs.sum(axis=1) / ours.sum(axis=1)).tolist()
    return {
        **spread(ratios),
        "interval_95": list(ratio_interval(ours, theirs)),
        "against": base,
        "rounds": [rounded(value) for value in ratios],
    }


def _unit_seconds(turns: Sequence[Turn]) -> NDArray[np.float64]:
    return np.array([turn.unit_s for turn in turns], dtype=np.float64)


def _unit_tokens(cell: Cell, system: System) -> list[int]:
    outputs = cell.rounds[0][system.name].outputs
    return [
        sum(len(output.token_ids) for output in unit) for unit in units(outputs, cell.batch_size)
    ]


def _decode_rate(turn: Turn, batch_size: int) -> float | None:
    """Return tokens after the first of each prompt, per second after the last first one."""
    seconds, num_tokens = 0.0, 0
    for unit, unit_s in zip(units(turn.outputs, batch_size), turn.unit_s, strict=True):
        prefills = [output.prefill_s for output in unit if output.prefill_s is not None]
        if len(prefills) < len(unit):
            return None
        seconds += unit_s - max(prefills)
        num_tokens += sum(len(output.token_ids) - 1 for output in unit)
    return num_tokens / seconds if seconds > 0 and num_tokens else None


def counts(outputs: Sequence[PeerOutput]) -> dict[str, Any]:
    """Return tokens per step and acceptance of outputs, where their system tells."""
    num_tokens = sum(len(output.token_ids) for output in outputs)
    num_steps = _total([output.num_steps for output in outputs])
    num_drafted = _total([output.num_draft_tokens for output in outputs])
    num_accepted = _total([output.num_accepted for output in outputs])
    entry: dict[str, Any] = {}
    if num_steps:
        entry["tokens_per_step"] = rounded(num_tokens / num_steps)
        if num_drafted is not None:
            entry["draft_tokens_per_step"] = rounded(num_drafted / num_steps)
    if num_drafted and num_accepted is not None:
        entry["acceptance_rate"] = rounded(num_accepted / num_drafted)
    return entry


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum; None if one is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _phases(turns: Sequence[Turn], num_tokens: int) -> dict[str, Any]:
    phases = [turn.phases for turn in turns if turn.phases is not None]
    if not phases:
        return {}
    per_round = [{**phase.as_dict(), "total": phase.total_s} for phase in phases]
    return {
        "phases_s": {
            name: [rounded(seconds[name]) for seconds in per_round] for name in (*PHASES, "total")
        },
        "phases_ms_per_token": {
            name: rounded(1000 * statistics.median(one[name] for one in per_round) / num_tokens)
            for name in PHASES
        },
        "target_pass_ms": _passes([phase.target_ms for phase in phases]),
        "draft_pass_ms": _passes([phase.draft_ms for phase in phases]),
    }


def _passes(rounds: Sequence[Mapping[int, list[float]]]) -> dict[str, dict[str, float]]:
    """Return how long passes took by their number of rows, over all rounds."""
    rows = sorted({count for passes in rounds for count in passes})
    merged = {count: [ms for passes in rounds for ms in passes.get(count, ())] for count in rows}
    return {
        str(count): {"count": len(values), "median": rounded(statistics.median(values))}
        for count, values in merged.items()
    }


def _bandwidth_share(
    turns: Sequence[Turn], token_rates: Sequence[float], bandwidth: Sequence[float], num_bytes: int
) -> dict[str, Any]:
    """Return the part of the read bandwidth, measured in the same round, that is used.

    `of_tokens` counts the weights once per token, so it includes everything that the system does
    beside its passes; `of_passes` counts them once per pass of one row.
    """
    of_tokens = [
        rate * num_bytes / limit for rate, limit in zip(token_rates, bandwidth, strict=True)
    ]
    shares = {"of_tokens": spread(of_tokens)}
    single = [turn.phases.target_ms.get(1, ()) if turn.phases else () for turn in turns]
    if all(single):
        of_passes = [
            1000 * num_bytes / statistics.median(passes) / limit
            for passes, limit in zip(single, bandwidth, strict=True)
        ]
        shares["of_passes"] = spread(of_passes)
    return shares


def _changes(system: System, cell: Cell, result: BenchResult) -> dict[str, Any]:
    """Compare token ids: exactly within Foretoken, as a count for peers.

    A peer samples with its own random numbers, so its sampled text tells nothing.
    """
    if system.name == PLAIN or (system.is_peer and cell.temperature > 0):
        return {}
    if system.is_peer:
        counts = {"than_foretoken_plain": _num_changed(cell, system.name, PLAIN)}
        if system.speculative:
            counts["than_own_plain"] = _num_changed(cell, system.name, system.plain)
        return {"prompts_with_other_tokens": counts}
    differences = [
        {
            "round": number,
            "prompt": index,
            "place": result.prompts[index].place,
            "text": result.prompts[index].prompt,
            "token": next(
                place
                for place, (ours, theirs) in enumerate(
                    zip(output.token_ids, plain.token_ids, strict=True)
                )
                if ours != theirs
            ),
        }
        for number, turns in enumerate(cell.rounds)
        for index, (output, plain) in enumerate(
            zip(turns[system.name].outputs, turns[PLAIN].outputs, strict=True)
        )
        if output.token_ids != plain.token_ids
    ]
    changed = len({difference["prompt"] for difference in differences})
    return {
        "prompts_with_other_tokens": {"than_foretoken_plain": changed},
        "differences": differences,
    }


def _num_changed(cell: Cell, name: str, base: str) -> int:
    """Return for how many prompts any round's tokens differ from those of another system."""
    changed = {
        index
        for turns in cell.rounds
        for index, (ours, theirs) in enumerate(
            zip(turns[name].outputs, turns[base].outputs, strict=True)
        )
        if ours.token_ids != theirs.token_ids
    }
    return len(changed)


def _categories(system: System, cell: Cell, result: BenchResult) -> dict[str, Any]:
    ours = _unit_seconds([turns[system.name] for turns in cell.rounds])
    plain = _unit_seconds([turns[PLAIN] for turns in cell.rounds])
    outputs = cell.rounds[0][system.name].outputs
    entries: dict[str, Any] = {}
    for category in result.settings.workload.categories:
        places = [n for n, item in enumerate(result.prompts) if item.category == category]
        if not places:
            continue
        tokens = [len(outputs[place].token_ids) for place in places]
        num_steps = _total([outputs[place].num_steps for place in places])
        ratios = plain[:, places].sum(axis=1) / ours[:, places].sum(axis=1)
        entries[category] = {
            "num_prompts": len(places),
            "tokens_per_s": spread(rates(tokens, ours[:, places])),
            "speed_up": spread(ratios.tolist()),
            "tokens_per_step": rounded(sum(tokens) / num_steps) if num_steps else None,
        }
    return entries


def _weight_bytes(result: BenchResult) -> int | None:
    """Return the bytes of weights that a pass over one row reads.

    All of them, but for an embedding that is not the output matrix too: of that a pass reads a
    row. Without a local directory it is estimated by the number of parameters.
    """
    info = result.systems[0].host.info
    if info.num_parameters is None:
        return None
    size = {"float64": 8, "float32": 4}.get(info.dtype, 2)
    shapes: dict[str, int] = {}
    for path in Path(result.settings.model).expanduser().glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                shapes[name] = int(np.prod(weights.get_slice(name).get_shape()))
    unread = sum(
        count
        for name, count in shapes.items()
        if "embed_tokens" in name and "lm_head.weight" in shapes
    )
    return (info.num_parameters - unread) * size


__all__ = [
    "counts",
    "different_tokens",
    "make_record",
    "portable",
    "portable_command",
    "write_record",
]
