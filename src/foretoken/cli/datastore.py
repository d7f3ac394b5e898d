"""`foretoken datastore`: texts that the drafter rest retrieves from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretoken.cli import options
from foretoken.cli.errors import FileError
from foretoken.cli.output import FileSink
from foretoken.cli.terminal import loading, note
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.models.tokenizer import Tokenizer

EXAMPLES = """
[bold]Examples[/]

foretoken datastore build docs/*.txt --model ./big --output docs.datastore

foretoken generate --model ./big --drafter rest:path=docs.datastore "Hello"
"""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _datastore(context: typer.Context) -> None:
    """Build datastores of texts for the drafter rest."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILES...", help="UTF-8 text files; each is one text.", show_default=False
    ),
]
Model = Annotated[
    str,
    options._model("--model", "MODEL", "Directory, hub id or stories: whose tokens to write."),
]
Output = Annotated[Path, options._files("--output", "FILE", "Where to write the datastore.")]


@app.command(epilog=EXAMPLES, no_args_is_help=False)
def build(
    files: Files,
    model: Model,
    output: Output,
    force: options.Force = False,
    debug: options.Debug = False,
) -> None:
    """Tokenize files and index them; for drafting with models of one vocabulary."""
    if not debug:
        warnings.simplefilter("ignore")
    FileSink(output, force=force)  # refuses what cannot be written, before the work is done
    texts = [_read(path) for path in files]
    with loading(model):
        from foretoken.drafters.datastore import Datastore

        tokenizer = _tokenizer(model)
    datastore = Datastore.build(tokenizer.encode(text) for text in texts if text)
    datastore.save(output, tokenizer)
    note(f"{output}: {len(datastore.tokens)} tokens of {len(files)} files")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FileError(f"{path} is not UTF-8", hint="convert it to UTF-8") from None
    except OSError as error:
        raise FileError(
            f"{path} cannot be read: {error.strerror}", hint="name text files that exist"
        ) from error


def _tokenizer(model: str) -> Tokenizer:
    """Return a model's tokenizer; its weights are not loaded."""
    from foretoken.engine.names import resolve_model
    from foretoken.models.quiet import silence_libraries
    from foretoken.models.tokenizer import Tokenizer

    silence_libraries()
    tokenizer = Tokenizer.load(resolve_model(model))
    if tokenizer is None:
        raise ConfigError(
            f"model {model!r} has no tokenizer",
            hint="add the tokenizer's files to the model directory",
        )
    return tokenizer


__all__ = ["app", "build"]
