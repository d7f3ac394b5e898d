"""`foretoken train head`: a head on the target's states, from prompts to a verified drafter."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import options
from foretoken.cli.terminal import is_terminal, loading, note
from foretoken.cli.train_report import PIPE_WIDTH
from foretoken.cli.training import (
    BatchSize,
    MaxNewTokens,
    NumPrompts,
    OutputFolder,
    PromptsFile,
    Seed,
    Temperature,
    data_option,
    prepare,
    read_prompts,
    resumable,
    training_option,
    training_progress,
)
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    pass

MEASURING_PANEL = "Measuring"
GIGABYTE = 1e9

EXAMPLES = """
[bold]Examples[/]

foretoken train head eagle --output eagle

foretoken train head medusa --num-prompts 128 --steps 50 --output quick

foretoken train head kangaroo --option layers=2 --loss tv --temperature 0.7 --output warm

foretoken train head eagle --model ./big --prompts prompts.txt --max-disk 20 --against
draft-model:path=./small --output eagle

foretoken generate --model ./big --drafter eagle:path=eagle/head "Hello"
"""

Kind = Annotated[
    str,
    typer.Argument(
        metavar="KIND",
        help="medusa, hydra, eagle, parallel, graft or kangaroo.",
        show_default=False,
    ),
]
Options = Annotated[
    list[str] | None,
    training_option(
        "--option", "KEY=VALUE", "Of the kind, as layers, heads or depth; may be repeated."
    ),
]
Loss = Annotated[
    str,
    training_option(
        "--loss",
        "NAME",
        "forward-kl (default), reverse-kl, jsd, tv, tvd++ or cross-entropy; at --temperature.",
    ),
]
Epochs = Annotated[
    float,
    training_option(
        "--epochs", "X", "How often each text is used (default 4).", parser=options._number
    ),
]
Steps = Annotated[
    int | None,
    training_option("--steps", "N", "In place of --epochs.", parser=options._integer),
]
LearningRate = Annotated[
    float,
    training_option("--learning-rate", "X", "The highest (default 0.001).", parser=options._number),
]
Precision = Annotated[
    str,
    training_option(
        "--precision", "NAME", "auto (default: bfloat16 on GPUs), float32 or bfloat16."
    ),
]
MaxDisk = Annotated[
    float,
    data_option(
        "--max-disk",
        "GB",
        "Most that the target's states may take; beyond it they are computed anew for each "
        "batch (default 8).",
        parser=options._number,
    ),
]
StatesDType = Annotated[
    str,
    data_option(
        "--states-dtype",
        "NAME",
        "In which they are kept: auto (default: the target's own), float32, bfloat16 or float16.",
    ),
]
Against = Annotated[
    list[str] | None,
    options._option(
        "--against",
        "SPEC",
        "Another drafter to serve in turn, such as draft-model:path=DIR; auto: the model's own; "
        "may be repeated.",
        MEASURING_PANEL,
    ),
]
MaxNodes = Annotated[
    int,
    options._option(
        "--max-nodes",
        "N",
        "Most draft tokens per step (default 8).",
        MEASURING_PANEL,
        parser=options._integer,
    ),
]


def head(
    kind: Kind,
    output: OutputFolder,
    model: options.Model = "stories",
    option: Options = None,
    prompts: PromptsFile = None,
    num_prompts: NumPrompts = 2048,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    max_disk: MaxDisk = 8.0,
    states_dtype: StatesDType = "auto",
    loss: Loss = "forward-kl",
    epochs: Epochs = 4.0,
    steps: Steps = None,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 1e-3,
    precision: Precision = "auto",
    seed: Seed = 0,
    against: Against = None,
    max_nodes: MaxNodes = 8,
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Train a head on the target's states, which drafts what the target says next.

    The folder gets head, the drafter's directory, and report.json. Run the same command again to
    go on with what was interrupted.
    """
    texts = read_prompts(prompts)
    with resumable(is_quiet=not debug):
        with loading(model):
            from foretoken.training.heads.run import run_head
            from foretoken.training.heads.settings import HeadMachine, HeadSettings

            settings = HeadSettings(
                kind=kind,
                options=_read_options(option or []),
                model=model,
                num_prompts=num_prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                states_dtype=states_dtype,
                loss=loss,
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                precision=precision,
                seed=seed,
            )
            machine = HeadMachine(
                device=device,
                max_disk_bytes=max_disk * GIGABYTE,
                max_nodes=max_nodes,
                against=_named(against or [], model, kind),
            )
            provenance = prepare(device, threads, is_quiet=not debug)
        with training_progress() as on_progress:
            report = run_head(
                settings,
                texts,
                output,
                machine=machine,
                on_progress=on_progress,
                provenance=provenance,
            )
    show_head_report(report)
    note(f"written: {output / 'report.json'}")
    note(f"serve it: foretoken generate --model {model} --drafter {kind}:path={output / 'head'}")


def show_head_report(report: Mapping[str, Any]) -> None:
    """Print what a person wants of a report.

    Args:
        report: As `run_head` returns it.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if is_terminal(sys.stdout) else PIPE_WIDTH, highlight=False)
    corpus, settings, training = report["corpus"], report["settings"], report["training"]
    losses = training["held_out_loss"]
    console.print(
        f"[bold]{settings['model']}[/], {settings['kind']} head of "
        f"{training['num_parameters']:,} parameters; trained on {corpus['num_texts']:,} outputs "
        f"({corpus['num_tokens']:,} tokens), {training['num_steps']:,} steps\n"
        f"measured on {corpus['num_held_out_texts']} other prompts "
        f"({corpus['num_held_out_tokens']:,} tokens); {settings['loss']} there "
        f"{losses['before']:.3f} before, {losses['after']:.3f} after\n"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("drafter", no_wrap=True)
    for column in ("tokens/step", "forecast", "tokens/s", "forecast", "speed-up [95 %]"):
        table.add_column(column, justify="right", style="dim" if column == "forecast" else "")
    for name, served in report["served"].items():
        expected = report["forecast"][name]
        table.add_row(
            name,
            f"{served['tokens_per_step']:.2f}",
            f"{expected['tokens_per_step']['value']:.2f}",
            f"{served['tokens_per_s']:.0f}",
            f"{expected['tokens_per_s']['value']:.0f}",
            _gain(served.get("speedup")),
        )
    console.print(table)


def _gain(speedup: Mapping[str, Any] | None) -> str:
    if speedup is None:
        return ""
    low, high = speedup["interval_95"]
    return f"{speedup['value']:.2f} [{low:.2f}, {high:.2f}]"


def _read_options(pairs: Sequence[str]) -> dict[str, str]:
    """Return the kind's options by name."""
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not (separator and key.strip()):
            raise ConfigError(
                f"an option of a kind is written key=value; got {pair!r}",
                hint="for example --option heads=4",
            )
        found[key.strip()] = value.strip()
    return found


def _named(specs: Sequence[str], model: str, kind: str) -> dict[str, str]:
    """Return specs of drafters by names that tell them from each other and from the head."""
    from foretoken.engine.names import resolve_drafters

    named: dict[str, str] = {}
    for spec in specs:
        found = resolve_drafters((spec,), model)
        if not found:
            raise ConfigError(
                f"plain decoding is compared with anyway; got --against {spec}",
                hint="leave it out, or name a drafter",
            )
        name, number = found[0].name, 2
        while name in named or name == kind:
            name, number = f"{found[0].name}#{number}", number + 1
        named[name] = str(found[0])
    return named


__all__ = ["EXAMPLES", "head", "show_head_report"]
