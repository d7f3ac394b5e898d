"""A run that trains a head, from prompts to a verified drafter; resumed where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foretoken.core.progress import OnProgress, silent
from foretoken.engine.llm import LLM, Prompt
from foretoken.engine.names import resolve_model
from foretoken.models.heads.files import CARD_FILE
from foretoken.training.folder import RunFolder, fingerprint, write_json
from foretoken.training.forecast import ForecastSettings, forecast
from foretoken.training.gather import (
    Gathered,
    gather,
    num_held_out,
    prompts_fingerprint,
    shown_name,
)
from foretoken.training.heads.card import card
from foretoken.training.heads.settings import HeadMachine, HeadSettings
from foretoken.training.heads.trainer import HeadTrainer, measured, new_head
from foretoken.training.served import compare_served
from foretoken.training.settings import check_folder_name
from foretoken.training.storage import write_atomically

REPORT_FILE = "report.json"
REPORT_FORMAT = 1


def run_head(
    settings: HeadSettings,
    prompts: Sequence[Prompt],
    output: Path,
    *,
    machine: HeadMachine | None = None,
    on_progress: OnProgress = silent,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect, train, save, forecast and serve; return the report, also written to the folder.

    Args:
        settings: What to do.
        prompts: Texts or token ids; some are held out.
        output: A new folder, or that of a run with the same settings, which is resumed. The head
            is in its folder `head`.
        machine: Where, and within which bounds.
        on_progress: Told how far it is.
        provenance: What else the report is to say, such as the command.

    Raises:
        ConfigError: A setting is wrong, the folder is of another run or cannot be written, or
            loss or states are no finite numbers.
        ModelError: The target cannot be loaded, or the kind cannot be made for it.
        RequestError: A prompt does not fit the target.
        ForetokenError: Serving with the head gave other tokens.
    """
    machine = machine or HeadMachine()
    check_folder_name(output)
    num_held_out(len(prompts))
    seconds: dict[str, float] = {}
    with measured(seconds, "collect"):
        trainer, gathered = _collect(settings, prompts, output, machine, on_progress)
    record, head = trainer.record(seconds), trainer.head_path
    del trainer  # it holds the target; what serves is loaded anew, as users do
    drafters = {settings.kind: f"{settings.kind}:path={head}", **machine.against}
    texts, params = gathered.held_out, gathered.held_out_params
    with measured(seconds, "forecast"):
        forecasts = forecast(
            settings.model,
            drafters,
            texts,
            params,
            ForecastSettings(max_nodes=machine.max_nodes, device=machine.device),
            on_progress=on_progress,
        )
    with measured(seconds, "serve"):
        served = compare_served(
            settings.model,
            drafters,
            texts,
            params,
            machine={"device": machine.device, "max_nodes": machine.max_nodes},
            on_progress=on_progress,
        )
    text = card(settings, gathered, record, served)
    write_atomically(head / CARD_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    report = {
        "what": "foretoken train head",
        "format": REPORT_FORMAT,
        **(provenance or {}),
        "settings": {**asdict(settings), "model": shown_name(settings.model)},
        "corpus": gathered.described(),
        "training": record,
        "forecast": {name: it.as_dict() for name, it in forecasts.items()},
        "served": served,
        "seconds": seconds,
    }
    write_json(output / REPORT_FILE, report)
    return report


def _collect(
    settings: HeadSettings,
    prompts: Sequence[Prompt],
    output: Path,
    machine: HeadMachine,
    on_progress: OnProgress,
) -> tuple[HeadTrainer, Gathered]:
    """Let the target write; return what it wrote, and what trains a head on it."""
    llm = LLM(settings.model, device=machine.device)
    module = new_head(settings, llm.info)  # what is wrong with its options shows now
    encoded = [tuple(llm.encode(prompt)) for prompt in prompts]
    identity = {
        **asdict(settings),
        "model": shown_name(settings.model),
        "model_fingerprint": fingerprint(resolve_model(settings.model)),
        "prompts_fingerprint": prompts_fingerprint(encoded),
    }
    folder = RunFolder(output, identity)
    gathered = gather(
        llm,
        encoded,
        settings.sampling(),
        folder.path,
        num_prompts=settings.num_prompts,
        seed=settings.seed,
        on_progress=on_progress,
    )
    llm.close()
    target = llm.engine.parts.target
    return HeadTrainer(settings, module, target, gathered, folder, machine, on_progress), gathered


__all__ = ["run_head"]
