"""A run of boost-tuning from prompts to report, in a folder that it can be resumed in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretoken.assets import EMBEDDED
from foretoken.core.params import SamplingParams
from foretoken.core.progress import OnProgress, silent
from foretoken.engine.llm import LLM, Prompt
from foretoken.engine.names import resolve_model
from foretoken.errors import ConfigError, ModelError, VocabularyMismatchError
from foretoken.models.trainable import load_trainable
from foretoken.training.boost import Member, PoolConfig, PoolTrainer, check_fit
from foretoken.training.corpus import MAX_OPENING_TOKENS
from foretoken.training.folder import RunFolder, fingerprint, write_json
from foretoken.training.gather import gather, num_held_out, prompts_fingerprint, shown_name
from foretoken.training.pools import HeldOut, PoolCounts, PoolMeter, difference, ratio
from foretoken.training.settings import check_counts, check_folder_name, check_positive, check_seed

REPORT_FILE = "report.json"
REPORT_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BoostSettings:
    """What a run depends on, beside its prompts.

    Args:
        model: The target: a directory, hub id, or the name of an embedded pair.
        start: Directory of the model that every draft model starts from; None for the draft of
            an embedded pair.
        pool_size: Draft models.
        num_prompts: Prompts to train on; the target writes those that are not given.
        max_new_tokens: Of every output.
        temperature: Of the outputs.
        window: Tokens of a window.
        epochs: How often the first model sees each text; sets the steps of all.
        steps: Steps of every model; None leaves it to `epochs`.
        batch_size: Texts per step.
        learning_rate: The highest.
        has_control: Whether to also train a pool without dropping, for comparison.
        seed: Of everything random.
    """

    model: str = "stories"
    start: str | None = None
    pool_size: int = 3
    num_prompts: int = 2048
    max_new_tokens: int = 128
    temperature: float = 0.0
    window: int = 4
    epochs: float = 2.0
    steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 5e-4
    has_control: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("pool_size", "num_prompts", "max_new_tokens", "window", "steps", "batch_size")
        check_counts(self, counts)
        check_positive(self, ("epochs", "learning_rate"))
        check_seed(self.seed)
        self.sampling()  # checks the temperature

    def sampling(self) -> SamplingParams:
        """Return how the target writes."""
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature)

    def start_directory(self) -> Path:
        """Return where the model lies that every member starts from.

        Raises:
            ConfigError: None was given and the target has no embedded draft.
            ModelError: It is no directory.
        """
        if self.start is not None:
            path = Path(self.start).expanduser()
            if not path.is_dir():
                raise ModelError(
                    f"model directory {self.start!r} does not exist", hint="change --start"
                )
            return path
        if self.model in EMBEDDED:
            return EMBEDDED[self.model].draft
        raise ConfigError(
            f"there is no included draft model for {self.model!r} to start from",
            hint="name a small model of the same family with --start DIR",
        )


def run_boost(
    settings: BoostSettings,
    prompts: Sequence[Prompt],
    output: Path,
    *,
    device: str = "auto",
    on_progress: OnProgress = silent,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect, train, measure; return the report, which is also written to the folder.

    Args:
        settings: What to do.
        prompts: Texts or token ids; some are held out.
        output: A new folder, or that of a run with the same settings, which is resumed.
        device: Where the models run.
        on_progress: Told how far it is.
        provenance: What else the report is to say, such as the command.

    Raises:
        ConfigError: A setting is wrong, or the folder is of another run.
        ModelError: A model cannot be loaded, or start and target do not share their tokens.
        RequestError: A prompt does not fit the model.
    """
    start = settings.start_directory()
    num_held_out(len(prompts))
    check_folder_name(output)
    trainable = load_trainable(start, device=device)
    llm = _target(settings, start, device)
    encoded = [tuple(llm.encode(prompt)) for prompt in prompts]
    longest = max(map(len, encoded)) + MAX_OPENING_TOKENS + settings.max_new_tokens
    check_fit(trainable, min(longest, llm.info.context_limit))
    folder = RunFolder(output, _identity(settings, start, encoded))
    corpus = gather(
        llm,
        encoded,
        settings.sampling(),
        output,
        num_prompts=settings.num_prompts,
        seed=settings.seed,
        on_progress=on_progress,
    )
    del llm, trainable  # what is trained and measured is loaded anew

    config = PoolConfig(
        size=settings.pool_size,
        window=settings.window,
        num_steps=settings.steps
        or math.ceil(settings.epochs * len(corpus.examples) / settings.batch_size),
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )
    trainer = PoolTrainer(
        corpus.examples,
        config,
        start,
        folder,
        target=shown_name(settings.model),
        device=device,
        on_progress=on_progress,
    )
    boosted = trainer.boosted()
    control = trainer.control(boosted) if settings.has_control else []
    held_out = HeldOut(corpus.held_out, corpus.held_out_params, settings.window)
    meter = PoolMeter(settings.model, held_out, {"device": device}, on_progress)
    report = {
        "what": "foretoken train boost",
        "format": REPORT_FORMAT,
        **(provenance or {}),
        "settings": _shown_settings(settings, config, start),
        "corpus": corpus.described(),
        "members": [member.record for member in boosted],
        "control_members": [member.record for member in control],
        "held_out": _measured(meter, start, boosted, control),
    }
    write_json(output / REPORT_FILE, report)
    return report


def _target(settings: BoostSettings, start: Path, device: str) -> LLM:
    """Load the target; the model that members start from drafts for it."""
    is_embedded = settings.start is None
    try:
        return LLM(
            settings.model,
            drafters="auto" if is_embedded else f"draft-model:path={start}",
            device=device,
        )
    except VocabularyMismatchError as error:
        raise ModelError(
            str(error), hint="start from a small model of the target's own family"
        ) from error


def _identity(
    settings: BoostSettings, start: Path, prompts: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """Return all that the results depend on; a run with another one is another run."""
    return {
        **asdict(settings),
        "model": shown_name(settings.model),
        "start": start.name,
        "model_fingerprint": fingerprint(resolve_model(settings.model)),
        "start_fingerprint": fingerprint(str(start)),
        "prompts_fingerprint": prompts_fingerprint(prompts),
    }


def _measured(
    meter: PoolMeter, start: Path, boosted: Sequence[Member], control: Sequence[Member]
) -> dict[str, Any]:
    """Return what pools of every size reach on held-out texts."""
    sizes = range(1, len(boosted) + 1)
    [before] = meter.measure([start], [1], "the start")
    ours = meter.measure([member.path for member in boosted], sizes, "boosted pool")
    # The control's first model is the boosted pool's.
    others = (
        meter.measure([member.path for member in control], sizes[1:], "control") if control else []
    )
    pools = []
    for size, counts in zip(sizes, ours, strict=True):
        pool: dict[str, Any] = {"size": size, "boosted": counts.shares()}
        if others and size > 1:
            pool["control"] = others[size - 2].shares()
        pool["one_model"] = {
            "best_choices": meter.best_choices(boosted[0].path, size),
            "tree_tokens_per_step": round(ratio(meter.tree(boosted[0].path, size)), 4),
        }
        pools.append(pool)
    differences = {"one model": _differences(ours[-1], ours[0])} if len(ours) > 1 else {}
    if others:
        differences["control"] = _differences(ours[-1], others[-1])
    return {"start": before.shares(), "pools": pools, "largest_pool_minus": differences}


def _differences(one: PoolCounts, other: PoolCounts) -> dict[str, Any]:
    return {name: difference(getattr(one, name), getattr(other, name)) for name in one.shares()}


def _shown_settings(settings: BoostSettings, config: PoolConfig, start: Path) -> dict[str, Any]:
    return {
        **asdict(settings),
        "model": shown_name(settings.model),
        "start": start.name,
        "steps": config.num_steps,
    }


__all__ = ["BoostSettings", "run_boost"]
