"""`foretoken train draft`: a draft model made to measure for a target, verified when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

from foretoken.cli import options
from foretoken.cli.terminal import loading, note
from foretoken.cli.train_report import show_draft_report
from foretoken.cli.training import (
    BatchSize,
    MaxNewTokens,
    NumPrompts,
    OutputFolder,
    PromptsFile,
    Seed,
    prepare,
    read_prompts,
    resumable,
    training_option,
    training_progress,
)

if TYPE_CHECKING:
    from foretoken.training.draft.initialise import Method as InitialiseMethod

SHAPE_PANEL = "Shape of the draft (default: chosen by a study on this machine)"
INCLUDED = "included"  # the name in the report of the draft that an embedded target comes with

EXAMPLES = """
[bold]Examples[/]

foretoken train draft --output draft

foretoken train draft --layers 1 --hidden 128 --minutes 5 --output quick

foretoken train draft --model ./big --prompts prompts.txt --minutes 60 --output draft

foretoken train draft --model ./big --temperature 0.7 --loss tvd++ --on-policy 0.3 --output draft

foretoken generate --model ./big --drafter draft-model:path=draft/draft "Hello"
"""


def _size(name: str, help_text: str) -> Any:
    return options._option(name, "N", help_text, SHAPE_PANEL, parser=options._integer)


Temperature = Annotated[
    float,
    training_option(
        "--temperature",
        "T",
        "At which it will serve: of outputs and loss; 0 (default): greedy.",
        parser=options._number,
    ),
]
Layers = Annotated[
    int | None, _size("--layers", "Decoder layers; what is not given is the target's.")
]
Hidden = Annotated[int | None, _size("--hidden", "Channels between the layers.")]
Heads = Annotated[int | None, _size("--heads", "Query heads per layer.")]
KvHeads = Annotated[int | None, _size("--kv-heads", "Key and value heads per layer.")]
HeadDim = Annotated[int | None, _size("--head-dim", "Channels of a head.")]
Intermediate = Annotated[int | None, _size("--intermediate", "Channels of the feed-forward part.")]
Vocab = Annotated[
    int | None,
    _size("--vocab", "Tokens that it can say, the target's most frequent (default all)."),
]
Method = Annotated[
    str,
    training_option(
        "--method", "NAME", "How it begins: prune (default), cut from the target; or scratch."
    ),
]
Loss = Annotated[
    str,
    training_option(
        "--loss",
        "NAME",
        "forward-kl (default), reverse-kl, jsd, tv, tvd++ or cross-entropy.",
    ),
]
OnPolicy = Annotated[
    float,
    training_option(
        "--on-policy",
        "X",
        "Share of steps on what the draft itself writes, 0 to 1 (default 0).",
        parser=options._number,
    ),
]
Minutes = Annotated[
    float,
    training_option(
        "--minutes",
        "X",
        "Time of distillation on this machine (default 20).",
        parser=options._number,
    ),
]
Steps = Annotated[
    int | None,
    training_option("--steps", "N", "Steps, in place of --minutes.", parser=options._integer),
]
LearningRate = Annotated[
    float,
    training_option("--learning-rate", "X", "The highest (default 0.001).", parser=options._number),
]
Precision = Annotated[
    str,
    training_option(
        "--precision",
        "NAME",
        "float32, bfloat16, or auto (default): bfloat16 on a GPU that computes with it.",
    ),
]
MaxNodes = Annotated[
    int,
    options._model(
        "--max-nodes", "N", "Most draft tokens per step (default 8).", parser=options._integer
    ),
]
Against = Annotated[
    list[str] | None,
    options._model(
        "--against", "SPEC", "Another drafter to forecast and serve beside it; may be repeated."
    ),
]


def draft(
    output: OutputFolder,
    model: options.Model = "stories",
    prompts: PromptsFile = None,
    num_prompts: NumPrompts = 2048,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    layers: Layers = None,
    hidden: Hidden = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    intermediate: Intermediate = None,
    vocab: Vocab = None,
    method: Method = "prune",
    loss: Loss = "forward-kl",
    on_policy: OnPolicy = 0.0,
    minutes: Minutes = 20.0,
    steps: Steps = None,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 1e-3,
    precision: Precision = "auto",
    max_nodes: MaxNodes = 8,
    against: Against = None,
    seed: Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Make a draft model for a target: designed, distilled from it, forecast and verified.

    The folder gets the model, draft, and report.json. Run the same command again to go on with
    what was interrupted.
    """
    texts = read_prompts(prompts)
    shape = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": intermediate,
        "vocab": vocab,
    }
    with resumable(is_quiet=not debug):
        with loading(model):
            from foretoken.training.draft.run import DraftMachine, DraftSettings, run_draft

            settings = DraftSettings(
                model=model,
                num_prompts=num_prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                shape=_shape(shape),
                method=cast("InitialiseMethod", method),  # checked there
                loss=loss,
                on_policy=on_policy,
                minutes=minutes,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                precision=precision,
                seed=seed,
            )
            machine = DraftMachine(
                device=device, max_nodes=max_nodes, against=_against(model, against or [])
            )
            provenance = prepare(device, threads, is_quiet=not debug)
        with training_progress() as on_progress:
            report = run_draft(
                settings,
                texts,
                output,
                machine=machine,
                on_progress=on_progress,
                provenance=provenance,
            )
    show_draft_report(report)
    note(f"written: {output / 'report.json'}")
    note(f"use it:  foretoken generate --model {model} --drafter draft-model:path={output}/draft")


def _shape(sizes: Mapping[str, int | None]) -> str | None:
    """Return sizes that were given as a shape is written; None if there are none."""
    given = [f"{name}={value}" for name, value in sizes.items() if value is not None]
    return ",".join(given) or None


def _against(model: str, specs: list[str]) -> dict[str, str]:
    """Return the drafters to compare with; an embedded target's own draft is always one."""
    from foretoken.assets import EMBEDDED

    embedded = {}
    if model in EMBEDDED:
        embedded[INCLUDED] = f"draft-model:path={EMBEDDED[model].draft}"
    return {**embedded, **{spec: spec for spec in specs}}


__all__ = ["EXAMPLES", "draft"]
