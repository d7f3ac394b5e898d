"""`foretoken train`: draft models made for a target; here its pools of them, `train boost`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretoken.cli import options
from foretoken.cli.terminal import loading, note
from foretoken.cli.train_draft import EXAMPLES as DRAFT_EXAMPLES
from foretoken.cli.train_draft import draft
from foretoken.cli.train_head import EXAMPLES as HEAD_EXAMPLES
from foretoken.cli.train_head import head
from foretoken.cli.train_looped import EXAMPLES as LOOPED_EXAMPLES
from foretoken.cli.train_looped import looped
from foretoken.cli.train_report import show_report
from foretoken.cli.training import (
    BatchSize,
    MaxNewTokens,
    NumPrompts,
    OutputFolder,
    PromptsFile,
    Seed,
    Temperature,
    prepare,
    read_prompts,
    resumable,
    training_option,
    training_progress,
)

EXAMPLES = """
[bold]Examples[/]

foretoken train boost --output pool

foretoken train boost --pool-size 2 --num-prompts 128 --steps 50 --output quick

foretoken train boost --model ./big --start ./small --prompts prompts.txt --output pool

foretoken generate --model ./big --drafter draft-model:path=pool/draft-1 --drafter
draft-model:path=pool/draft-2 "Hello"
"""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _train(context: typer.Context) -> None:
    """Train draft models for a target."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Start = Annotated[
    Path | None,
    options._model(
        "--start", "DIR", "Small model that every draft model starts from (stories: its draft)."
    ),
]
PoolSize = Annotated[
    int, training_option("--pool-size", "N", "Draft models (default 3).", parser=options._integer)
]
Window = Annotated[
    int,
    training_option(
        "--window",
        "N",
        "Tokens that a model must get right for them to be dropped (default 4).",
        parser=options._integer,
    ),
]
Epochs = Annotated[
    float,
    training_option(
        "--epochs",
        "X",
        "Rounds of the first model over all texts; the others get as many steps (default 2).",
        parser=options._number,
    ),
]
Steps = Annotated[
    int | None,
    training_option(
        "--steps", "N", "Steps of each model, in place of --epochs.", parser=options._integer
    ),
]
LearningRate = Annotated[
    float,
    training_option(
        "--learning-rate", "X", "The highest (default 0.0005).", parser=options._number
    ),
]
NoControl = Annotated[
    bool, training_option("--no-control", "", "Do not also train a pool without dropping.")
]


@app.command(epilog=EXAMPLES, no_args_is_help=False)
def boost(
    output: OutputFolder,
    model: options.Model = "stories",
    start: Start = None,
    prompts: PromptsFile = None,
    num_prompts: NumPrompts = 2048,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    pool_size: PoolSize = 3,
    window: Window = 4,
    epochs: Epochs = 2.0,
    steps: Steps = None,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 5e-4,
    no_control: NoControl = False,
    seed: Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Train a pool of draft models, each on what those before it cannot say (boost-tuning).

    The folder gets draft-1, draft-2, ..., and report.json. Run the same command again to go on
    with what was interrupted.
    """
    texts = read_prompts(prompts)
    with resumable(is_quiet=not debug):
        with loading(model):
            from foretoken.training.boost_run import BoostSettings, run_boost

            settings = BoostSettings(
                model=model,
                start=str(start) if start is not None else None,
                pool_size=pool_size,
                num_prompts=num_prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                window=window,
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                has_control=not no_control,
                seed=seed,
            )
            provenance = prepare(device, threads, is_quiet=not debug)
        with training_progress() as on_progress:
            report = run_boost(
                settings,
                texts,
                output,
                device=device,
                on_progress=on_progress,
                provenance=provenance,
            )
    show_report(report)
    note(f"written: {output / 'report.json'}")


app.command(epilog=DRAFT_EXAMPLES, no_args_is_help=False)(draft)
app.command(epilog=HEAD_EXAMPLES, no_args_is_help=False)(head)
app.command(epilog=LOOPED_EXAMPLES, no_args_is_help=False)(looped)

__all__ = ["app", "boost"]
