"""The record of a run: counts, what follows from them, and what the paper leads to expect."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from foretoken.bench.machine import environment
from foretoken.bench.record import portable, portable_command
from foretoken.bench.specinfer import paper
from foretoken.bench.specinfer.estimates import Bootstrap
from foretoken.bench.specinfer.run import CellResult, SpecInferResult, Success
from foretoken.bench.specinfer.summary import summarize
from foretoken.bench.statistics import NUM_RESAMPLES, rounded

FORMAT = 1
POLICY = (
    "Counts, not times: a busy machine changes nothing. Every system continues the same prompts "
    "with the same seeds by the same number of tokens, going on after the end of a sequence. "
    "Tokens per step are output tokens per pass of the target, the pass that reads the prompt "
    "included. Success rates are those of the positions of the target's own plain output. A "
    "static tree has the expansion 1-1-w-1-1-1-1-1, which is 2 + 6 w nodes; best-first trees of "
    "the same width may have as many (min_gain=0). Intervals: bootstrap over prompts, 95 %, "
    f"{NUM_RESAMPLES} resamples, percentile method, the same draws for all systems."
)


def make_record(result: SpecInferResult, command: Sequence[str]) -> dict[str, Any]:
    """Return the record as a JSON object; nothing in it names this machine's folders.

    Args:
        result: Of the run.
        command: The command line's words.
    """
    settings = result.settings
    bootstrap = Bootstrap(result.num_prompts, settings.seed)
    cells = [_cell(cell, bootstrap) for cell in result.cells]
    return {
        "what": "foretoken bench specinfer",
        "format": FORMAT,
        "command": portable_command(command),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "policy": POLICY,
        "environment": environment(settings.threads),
        "settings": {
            "model": portable(settings.model_name),
            "num_parameters": result.target.num_parameters,
            "draft": portable(settings.draft_name),
            "draft_num_parameters": result.draft.num_parameters,
            "dtype": str(result.target.dtype).removeprefix("torch."),
            "device": settings.device,
            "workload": settings.workload.name,
            "num_prompts": result.num_prompts,
            "num_skipped_prompts": result.num_skipped,
            "max_new_tokens": settings.max_new_tokens,
            "num_seeds": settings.num_seeds,
            "seed": settings.seed,
            "max_width": settings.max_width,
            "verifiers": list(settings.verifiers),
        },
        "success_rate": [_success(success, bootstrap) for success in result.success],
        "tokens_per_step": cells,
        "paper": paper.as_record(),
        "summary": summarize(cells, bootstrap),
    }


def _success(success: Success, bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "temperature": success.temperature,
        "num_positions": int(success.num_positions.sum()),
        "ways": {
            way: [bootstrap.ratio(column, success.num_positions).as_record() for column in sums.T]
            for way, sums in success.sums.items()
        },
    }


def _cell(cell: CellResult, bootstrap: Bootstrap) -> dict[str, Any]:
    system, counts = cell.system, cell.counts
    tokens = [count.num_tokens for count in counts]
    steps = [count.num_steps for count in counts]
    num_drafted = sum(count.num_draft_tokens for count in counts)
    num_accepted = sum(count.num_accepted for count in counts)
    return {
        "tree": system.tree.value,
        "verifier": system.verifier,
        "siblings": cell.draw.value,
        "temperature": system.temperature,
        "width": system.width,
        "max_nodes": system.max_nodes,
        "options": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in system.shape.items()
        },
        "tokens_per_step": bootstrap.ratio(tokens, steps).as_record(),
        "nodes_per_step": rounded(num_drafted / sum(steps)),
        "acceptance_rate": rounded(num_accepted / num_drafted) if num_drafted else None,
        "num_tokens": sum(tokens),
        "num_steps": sum(steps),
        "outputs_with_other_tokens_than_plain": sum(count.num_changed for count in counts),
        "tokens_by_prompt": tokens,
        "steps_by_prompt": steps,
    }


__all__ = ["make_record"]
