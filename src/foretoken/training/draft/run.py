"""A run from prompts to a verified draft model, in a folder that it can be resumed in.

Its stages: *collect* the target's own outputs, *design* the shape, *initialise* the weights,
*distil*, *forecast* what serving will give, *verify* it served, *export*. Each is done once; killed
at any moment, the same run goes on with the stage that it was in, and ends with the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foretoken.core.progress import OnProgress, silent
from foretoken.engine.llm import LLM, Prompt
from foretoken.engine.names import resolve_model
from foretoken.models.loading import load_config, local_directory
from foretoken.training.draft.maker import DraftMaker
from foretoken.training.draft.settings import DraftMachine, DraftSettings
from foretoken.training.folder import RunFolder, fingerprint, write_json
from foretoken.training.gather import gather, num_held_out, prompts_fingerprint, shown_name
from foretoken.training.settings import check_folder_name
from foretoken.training.stages import Stages

REPORT_FILE = "report.json"
REPORT_FORMAT = 1


def run_draft(
    settings: DraftSettings,
    prompts: Sequence[Prompt],
    output: Path,
    *,
    machine: DraftMachine | None = None,
    on_progress: OnProgress = silent,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make a draft model for a target; return the report, which is also written to the folder.

    Args:
        settings: What to do.
        prompts: Texts or token ids; some are held out.
        output: A new folder, or that of a run with the same settings, which is resumed. The draft
            model is in its folder `draft`.
        machine: Where, and against what it is served.
        on_progress: Told how far it is.
        provenance: What else the report is to say, such as the command.

    Raises:
        ConfigError: A setting is wrong, the folder is of another run or cannot be written, or a
            loss is no finite number; the last good checkpoint is kept.
        ModelError: The target cannot be loaded, or is of a family that no draft can be cut from.
        RequestError: A prompt does not fit the target.
        ForetokenError: Serving with the draft gave other tokens than the target's.
    """
    check_folder_name(output)
    num_held_out(len(prompts))
    machine = machine or DraftMachine()
    path = resolve_model(settings.model)
    shape = settings.given_shape(load_config(path))
    llm = LLM(settings.model, device=machine.device)
    encoded = [tuple(llm.encode(prompt)) for prompt in prompts]
    folder = RunFolder(output, _identity(settings, encoded))
    stages = Stages(output, on_progress)
    start_s = time.perf_counter()
    gathered = gather(
        llm,
        encoded,
        settings.sampling(),
        output,
        num_prompts=settings.num_prompts,
        seed=settings.seed,
        on_progress=on_progress,
    )
    stages.note("collect", time.perf_counter() - start_s, gathered.described())
    llm.close()
    del llm  # what trains, and what is served, is loaded anew
    maker = DraftMaker(settings, local_directory(path), gathered, folder, machine, on_progress)
    results = maker.results(stages, shape)
    report = {
        "what": "foretoken train draft",
        "format": REPORT_FORMAT,
        **(provenance or {}),
        "settings": {**asdict(settings), "model": shown_name(settings.model)},
        **results,
        "seconds": stages.seconds,
    }
    write_json(output / REPORT_FILE, report)
    return report


def _identity(settings: DraftSettings, prompts: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Return all that the draft depends on; a run with another one is another run."""
    return {
        **asdict(settings),
        "model": shown_name(settings.model),
        "model_fingerprint": fingerprint(resolve_model(settings.model)),
        "prompts_fingerprint": prompts_fingerprint(prompts),
    }


__all__ = ["DraftMachine", "DraftSettings", "run_draft"]
