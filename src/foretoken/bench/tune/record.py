"""The record of a tuning: what was predicted, what was measured, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretoken.bench.machine import environment
from foretoken.bench.record import portable, portable_command
from foretoken.bench.statistics import NUM_RESAMPLES, ratio_interval, rounded, spread
from foretoken.bench.systems import units
from foretoken.bench.tune.lab import Run
from foretoken.bench.tune.run import CandidateResult, Measured, Size, TuneResult
from foretoken.bench.tune.settings import PLAIN
from foretoken.engine.step_log import (
    acceptance_by_confidence,
    acceptance_by_depth,
    acceptance_by_rank,
    rank_acceptances,
    tallies_as_record,
)
from foretoken.planner.analysis import break_even_tokens
from foretoken.planner.cost import CostCurve
from foretoken.planner.plan import Plan
from foretoken.planner.sequoia import choose_tree

FORMAT = 1
MAX_STATIC_NODES = 64
POLICY = (
    "Every way to decode continues the same prompts with the same seeds, as the user asked, and "
    "says the same tokens. Drafters are fresh in every round. Ways take turns with every batch of "
    "prompts, in an order that rotates; ratios to plain decoding are formed within a round. Tokens "
    f"per second include the prompt's own pass. Intervals: bootstrap, 95 %, {NUM_RESAMPLES} "
    "resamples of rounds and of batches, percentile method. Predictions: the steps of a replay "
    "against the recorded output, times a cost curve, calibrated by one live run per drafter at "
    "one size; drafters that need what the target computes are predicted by one live run per size. "
    "The error compares ratios to plain decoding, so that it is free of the machine's drift."
)


def make_record(result: TuneResult, command: Sequence[str]) -> dict[str, Any]:
    """Return the record as a JSON object; nothing in it names this machine's folders.

    Args:
        result: Of the run, finished or as far as it came.
        command: The command line's words.
    """
    settings = result.settings
    measured = [_measured(it, result) for it in result.measured if it.rounds]
    winner, verdict = decide(measured, result)
    return {
        "what": "foretoken tune",
        "format": FORMAT,
        "command": portable_command(command),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "policy": POLICY,
        "environment": environment(settings.threads),
        "settings": _settings(result),
        "is_finished": result.is_finished,
        "verdict": verdict,
        "winner": winner,
        "cost_ms": {
            name: curve.to_dict()
            for name, curve in ({"target": result.curve} | result.draft_curves).items()
            if curve is not None
        },
        "candidates": [_candidate(it, result) for it in result.candidates],
        "predicted_best": result.chosen.name if result.chosen else None,
        "measured": measured,
    }


def decide(measured: Sequence[dict[str, Any]], result: TuneResult) -> tuple[str | None, str]:
    """Return the name of the way to decode that is recommended, and why, in one sentence.

    Drafting is recommended if it is faster than plain decoding beyond the scatter of rounds and
    prompts. Without rounds the prediction stands, and the sentence says so.

    Args:
        measured: Entries of the record, plain decoding first.
        result: For what is known without them.
    """
    prefix = "" if result.is_finished else "Interrupted; so far: "
    drafting = [entry for entry in measured if entry["name"] != PLAIN]
    if not drafting:
        if result.chosen is None or result.plain_prediction is None:
            return None, "Interrupted before anything was known."
        name, ratio = result.chosen.name, _predicted_ratios(result)[result.chosen.name]
        return name, f"{prefix}{name} is predicted to make {ratio:.2f} times plain decoding."
    best = max(drafting, key=lambda entry: float(entry["speed_up"]["median"]))
    ratio, (low, high) = best["speed_up"]["median"], best["speed_up"]["interval_95"]
    shown = f"{ratio:.2f} times plain decoding's tokens per second [{low:.2f}, {high:.2f}]"
    if low > 1.0:
        return best["name"], f"{prefix}Speculate with {best['name']}: {shown}."
    doubt = "beyond doubt " if high > 1.0 else ""
    return PLAIN, (
        f"{prefix}Do not speculate: nothing is {doubt}faster than plain decoding; the best, "
        f"{best['name']}, makes {shown}."
    )


def winning_plan(result: TuneResult, winner: str | None) -> Plan | None:
    """Return the plan of the way to decode that is recommended; None if there is none yet."""
    setups = [it.setup for it in result.measured]
    setups += [size.setup for it in result.candidates for size in it.sizes]
    plans = {setup.name: setup.plan for setup in setups}
    if winner == PLAIN:
        return Plan(drafters=("none",), max_nodes=0)
    return plans.get(winner or "")


def _settings(result: TuneResult) -> dict[str, Any]:
    settings, target = result.settings, result.target
    return {
        "model": portable(settings.model_name),
        "num_parameters": target.num_parameters if target else None,
        "dtype": str(target.dtype).removeprefix("torch.") if target else settings.dtype,
        "device": settings.device,
        "exactness": target.exactness.value if target else None,
        "source": settings.source,
        "num_prompts": result.num_prompts,
        "num_skipped_prompts": len(settings.prompts) - result.num_prompts if target else 0,
        "temperatures": sorted({it.params.temperature for it in settings.prompts}),
        "batch_size": settings.batch_size,
        "rounds": settings.rounds,
        "rounds_done": result.num_rounds,
        "seed": settings.seed,
        "max_nodes": list(settings.max_nodes),
        "drafters": [portable(it.spec) for it in settings.candidates],
        "auto": [portable(spec) for spec in settings.auto.drafters],
    }


def _candidate(it: CandidateResult, result: TuneResult) -> dict[str, Any]:
    drafts = it.sizes[-1].run.drafts
    entry: dict[str, Any] = {
        "name": it.candidate.name,
        "spec": portable(it.candidate.spec),
        "how": "live" if it.calibration is None else "replay",
        "best": it.best.setup.name,
        "prompts_with_other_tokens_than_plain": it.num_changed,
        "sizes": [_size(size, result) for size in it.sizes],
        "acceptance_by_depth": tallies_as_record(acceptance_by_depth(drafts)),
        "acceptance_by_rank": tallies_as_record(acceptance_by_rank(drafts)),
        "acceptance_by_confidence": tallies_as_record(acceptance_by_confidence(drafts)),
    }
    if it.calibration is not None:
        entry["calibration"] = {
            key: rounded(value) for key, value in asdict(it.calibration).items()
        }
    draft_curve = result.draft_curves.get(it.candidate.name)
    if draft_curve is not None and result.curve is not None:
        entry["best_static_tree"] = _static_tree(it, result.curve, draft_curve)
    return entry


def _size(size: Size, result: TuneResult) -> dict[str, Any]:
    run, it = size.run, size.prediction
    per_step = 1000 / it.num_steps
    entry = {
        "name": size.setup.name,
        "max_nodes": size.setup.plan.node_limit,
        "tokens_per_step": rounded(run.tokens_per_step),
        "mean_tokens_per_step": rounded(run.mean_tokens_per_step),
        "nodes_per_step": rounded(run.nodes_per_step),
        "ms_per_step": {
            "target": rounded(it.target_s * per_step),
            "draft": rounded(it.draft_s * per_step),
            "other": rounded(it.other_s * per_step),
        },
        "predicted_tokens_per_s": rounded(it.tokens_per_s),
    }
    if result.plain_prediction is not None:
        plain = result.plain_prediction
        needed = break_even_tokens(step_ms=it.step_ms, target_ms=plain.step_ms)
        entry["break_even_tokens_per_step"] = rounded(needed)
        entry["predicted_speed_up"] = rounded(it.tokens_per_s / plain.tokens_per_s)
    return entry


def _static_tree(it: CandidateResult, curve: CostCurve, draft_curve: CostCurve) -> dict[str, Any]:
    """Return Sequoia's choice for the acceptances and the costs that were measured."""
    largest = it.sizes[-1].run
    steps = [step for step in largest.steps if not step.has_prompt]
    num_keys = round(sum(step.num_keys / step.num_requests for step in steps) / len(steps))
    choice = choose_tree(
        rank_acceptances(largest.drafts),
        draft_ms=draft_curve.pass_ms(1, num_keys),
        verify_ms=partial(curve.pass_ms, num_keys=num_keys),
        max_nodes=min(MAX_STATIC_NODES, curve.max_rows),
        max_depth=max(draft.depth for draft in largest.drafts),
    )
    return {
        "parents": list(choice.tree.parents),
        "depth": choice.tree.depth,
        "expected_tokens_per_step": rounded(choice.tree.expected_tokens),
        "step_ms": rounded(choice.step_ms),
    }


def _measured(it: Measured, result: TuneResult) -> dict[str, Any]:
    plain = result.measured[0]
    per_round = [run.num_tokens / sum(run.unit_s) for run in it.rounds]
    entry: dict[str, Any] = {
        "name": it.setup.name,
        "plan": {
            **asdict(it.setup.plan),
            "drafters": [portable(spec) for spec in it.setup.plan.drafters],
        },
        "tokens_per_s": {**spread(per_round), "rounds": [rounded(rate) for rate in per_round]},
        # An adaptive plan takes other steps in every round.
        "tokens_per_step": rounded(
            sum(run.num_tokens for run in it.rounds) / sum(run.num_steps for run in it.rounds)
        ),
        "prompts_with_other_tokens_than_plain": max(
            sum(a != b for a, b in zip(ours.output_ids, theirs.output_ids, strict=True))
            for ours, theirs in zip(it.rounds, plain.rounds, strict=True)
        ),
        "unit_s": [[rounded(value) for value in run.unit_s] for run in it.rounds],
    }
    if it is not plain:
        entry["speed_up"] = _ratio(it.rounds, plain.rounds, result.settings.batch_size)
    ratio = _predicted_ratios(result).get(it.setup.name)
    if ratio is not None and it.prediction is not None:
        measured_ratio = entry["speed_up"]["median"] if it is not plain else 1.0
        entry["predicted_tokens_per_s"] = rounded(it.prediction.tokens_per_s)
        entry["predicted_speed_up"] = rounded(ratio)
        entry["error"] = rounded(ratio / measured_ratio - 1)
        entry["error_with_drift"] = rounded(
            it.prediction.tokens_per_s / entry["tokens_per_s"]["median"] - 1
        )
    return entry


def _predicted_ratios(result: TuneResult) -> dict[str, float]:
    """Return predicted tokens per second over those of plain decoding, by name."""
    if result.plain_prediction is None:
        return {}
    base = result.plain_prediction.tokens_per_s
    sizes = [size for it in result.candidates for size in it.sizes]
    return {PLAIN: 1.0} | {it.setup.name: it.prediction.tokens_per_s / base for it in sizes}


def _ratio(ours: Sequence[Run], plain: Sequence[Run], batch_size: int) -> dict[str, Any]:
    own_s, plain_s = (_s_per_token(runs, batch_size) for runs in (ours, plain))
    weights = _unit_tokens(plain[0], batch_size)
    own_s, plain_s = own_s * weights, plain_s * weights
    ratios = (plain_s.sum(axis=1) / own_s.sum(axis=1)).tolist()
    return {
        **spread(ratios),
        "interval_95": list(ratio_interval(own_s, plain_s)),
        "rounds": [rounded(value) for value in ratios],
    }


def _s_per_token(runs: Sequence[Run], batch_size: int) -> NDArray[np.float64]:
    """Return seconds per token of each batch, [rounds, U]: lengths differ if tokens do."""
    return np.array([run.unit_s / _unit_tokens(run, batch_size) for run in runs])


def _unit_tokens(run: Run, batch_size: int) -> NDArray[np.float64]:
    return np.array([sum(map(len, batch)) for batch in units(run.output_ids, batch_size)], float)


__all__ = ["decide", "make_record", "winning_plan"]
