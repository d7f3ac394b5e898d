"""`foretoken train looped`: a decoder that runs its layers in loops, and plain ones beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from foretoken.cli import options
from foretoken.cli.terminal import loading, note
from foretoken.cli.training import (
    OutputFolder,
    Seed,
    prepare,
    resumable,
    training_option,
    training_progress,
)

if TYPE_CHECKING:
    from foretoken.training.looped.settings import Kind

TEXT_PANEL = "What it learns"
SHAPE_PANEL = "Shape (sizes that are not given are those of --model)"

EXAMPLES = """
[bold]Examples[/]

foretoken train looped --text stories.txt --output looped

foretoken train looped --text stories.jsonl --held-out others.jsonl --minutes 30 --output looped

foretoken train looped --text stories.txt --kind deep --steps 2000 --output deep

foretoken generate --model looped/model --drafter speed "Once upon a time"
"""


def _text(name: str, metavar: str, help_text: str, **more: Any) -> Any:
    return options._option(name, metavar, help_text, TEXT_PANEL, **more)


def _size(name: str, help_text: str) -> Any:
    return options._option(name, "N", help_text, SHAPE_PANEL, parser=options._integer)


def _count(name: str, help_text: str) -> Any:
    return training_option(name, "N", help_text, parser=options._integer)


Text = Annotated[
    list[Path],
    _text(
        "--text",
        "FILE",
        "Texts: .jsonl with a text per line, or .txt with lines <|endoftext|> between them; "
        "may be repeated.",
    ),
]
HeldOut = Annotated[
    list[Path] | None,
    _text("--held-out", "FILE", "Texts to measure on (default: 3 % of --text); may be repeated."),
]
Model = Annotated[
    str,
    options._model(
        "--model", "MODEL", "Whose tokens it speaks: a directory, hub id, or stories (default)."
    ),
]
Kind_ = Annotated[
    str,
    options._option(
        "--kind",
        "NAME",
        "shared (default): a group of layers in loops; to compare with it, plain ones: shallow, "
        "with the layers that it stores, or deep, with those that it runs.",
        SHAPE_PANEL,
    ),
]
Prelude = Annotated[int, _size("--prelude", "Layers before the loops (default 0).")]
Group = Annotated[int, _size("--group", "Layers of a loop (default 2).")]
Loops = Annotated[int, _size("--loops", "How often the group runs (default 4).")]
Coda = Annotated[int, _size("--coda", "Layers behind the loops (default 0).")]
Hidden = Annotated[int | None, _size("--hidden", "Channels between the layers.")]
Heads = Annotated[int | None, _size("--heads", "Query heads per layer.")]
KvHeads = Annotated[int | None, _size("--kv-heads", "Key and value heads per layer.")]
HeadDim = Annotated[int | None, _size("--head-dim", "Channels of a head.")]
Intermediate = Annotated[int | None, _size("--intermediate", "Channels of the feed-forward part.")]
CopyEmbedding = Annotated[
    bool, training_option("--copy-embedding", "", "Begin with the embedding of --model.")
]
DepthWeights = Annotated[
    str,
    training_option(
        "--depth-weights",
        "NAME",
        "Of the losses behind the loops: uniform (default), increasing, decreasing, last, or "
        "numbers with commas.",
    ),
]
Context = Annotated[int, _count("--context", "Tokens of a row (default 256).")]
BatchSize = Annotated[int, _count("--batch-size", "Rows per step (default 8).")]
Minutes = Annotated[
    float,
    training_option("--minutes", "X", "Time on this machine (default 20).", parser=options._number),
]
Steps = Annotated[int | None, _count("--steps", "Steps, in place of --minutes.")]
LearningRate = Annotated[
    float,
    training_option(
        "--learning-rate",
        "X",
        "The highest (default 0.004); it falls to zero.",
        parser=options._number,
    ),
]
OptimizerName = Annotated[str, training_option("--optimizer", "NAME", "muon (default) or adamw.")]
Precision = Annotated[
    str,
    training_option(
        "--precision",
        "NAME",
        "float32, bfloat16, or auto (default): bfloat16 on a GPU that computes with it.",
    ),
]
Compile = Annotated[
    bool, training_option("--compile", "", "Compile the layers first: worth it for long runs.")
]
MeasureSteps = Annotated[
    int,
    _count("--measure-steps", "Steps between measurements, checkpoints and models (default 100)."),
]


def looped(  # the options of the command
    text: Text,
    output: OutputFolder,
    held_out: HeldOut = None,
    model: Model = "stories",
    kind: Kind_ = "shared",
    prelude: Prelude = 0,
    group: Group = 2,
    loops: Loops = 4,
    coda: Coda = 0,
    hidden: Hidden = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    intermediate: Intermediate = None,
    copy_embedding: CopyEmbedding = False,
    depth_weights: DepthWeights = "uniform",
    context: Context = 256,
    batch_size: BatchSize = 8,
    minutes: Minutes = 20.0,
    steps: Steps = None,
    learning_rate: LearningRate = 4e-3,
    optimizer: OptimizerName = "muon",
    precision: Precision = "auto",
    compile_layers: Compile = False,
    measure_steps: MeasureSteps = 100,
    seed: Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Train a decoder that runs a group of layers in loops, or a plain one to compare it with.

    The folder gets the model, model, and report.json; while it trains, the model is as far as it
    was last measured. Run the same command again to go on with what was interrupted.
    """
    with resumable(is_quiet=not debug):
        with loading(model):
            from foretoken.training.looped.documents import read_texts, split_texts
            from foretoken.training.looped.run import run_looped
            from foretoken.training.looped.settings import LoopedSettings

            settings = LoopedSettings(
                model=model,
                kind=cast("Kind", kind),  # checked there
                prelude=prelude,
                group=group,
                loops=loops,
                coda=coda,
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                intermediate=intermediate,
                copies_embedding=copy_embedding,
                depth_weights=depth_weights,
                context=context,
                batch_size=batch_size,
                minutes=minutes,
                steps=steps,
                learning_rate=learning_rate,
                optimizer=optimizer,
                precision=precision,
                compiles=compile_layers,
                measure_steps=measure_steps,
                seed=seed,
            )
            provenance = prepare(device, threads, is_quiet=not debug)
            split = split_texts(read_texts(text), read_texts(held_out) if held_out else None)
        with training_progress() as on_progress:
            report = run_looped(
                settings,
                split,
                output,
                device=device,
                on_progress=on_progress,
                provenance=provenance,
            )
    typer.echo(_told(report))
    note(f"written: {output / 'report.json'}")
    drafter = " --drafter speed" if kind == "shared" else ""
    note(f'use it:  foretoken generate --model {output}/model{drafter} "..."')


def _told(report: Mapping[str, Any]) -> str:
    """Return what came out, in lines."""
    built, measured = report["build"], report["measure"]
    texts = report["texts"]["num_held_out_texts"]
    lines = [
        f"{report['settings']['kind']}: {built['num_parameters']:,} parameters, "
        f"{built['num_layers']} layers run, {built['num_stored']} stored; "
        f"{report['train']['num_steps']:,} steps",
        f"on {texts:,} other texts:",
        "loops  bits per character  likeliest token is the last loop's",
    ]
    measures = zip(measured["bits_per_character"], measured["agreement"], strict=True)
    for depth, (bits, share) in enumerate(measures, start=1):
        lines.append(f"{depth:5}  {bits:18.3f}  {share:33.1%}")
    return "\n".join(lines)


__all__ = ["EXAMPLES", "looped"]
