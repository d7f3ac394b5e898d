"""`foretoken`: the commands, and the one place where errors become lines and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from foretoken import __version__
from foretoken.cli.bench_speed import bench_app
from foretoken.cli.datastore import app as datastore_app
from foretoken.cli.doctor import EXAMPLES as DOCTOR_EXAMPLES
from foretoken.cli.doctor import doctor
from foretoken.cli.errors import EXIT_FAILURE, Session, report
from foretoken.cli.generate import EXAMPLES, EXIT_INTERRUPTED, generate
from foretoken.cli.methods import EXAMPLES as METHODS_EXAMPLES
from foretoken.cli.methods import methods
from foretoken.cli.serve import EXAMPLES as SERVE_EXAMPLES
from foretoken.cli.serve import serve
from foretoken.cli.train import app as train_app
from foretoken.cli.tune import EXAMPLES as TUNE_EXAMPLES
from foretoken.cli.tune import tune
from foretoken.cli.verify import EXAMPLES as VERIFY_EXAMPLES
from foretoken.cli.verify import verify
from foretoken.errors import interruption_in

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=EXAMPLES, no_args_is_help=False)(generate)
app.command(epilog=SERVE_EXAMPLES, no_args_is_help=False)(serve)
app.add_typer(bench_app, name="bench")
app.command(epilog=VERIFY_EXAMPLES, no_args_is_help=False)(verify)
app.add_typer(train_app, name="train")
app.add_typer(datastore_app, name="datastore")
app.command(epilog=METHODS_EXAMPLES, no_args_is_help=False)(methods)
app.command(epilog=DOCTOR_EXAMPLES, no_args_is_help=False)(doctor)
app.command(epilog=TUNE_EXAMPLES, no_args_is_help=False)(tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foretoken {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Generate text with several tokens per forward pass, and the same tokens as without."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors end here, as lines on stderr.

    Args:
        arguments: What follows the program's name.
    """
    session = Session()
    command: Any = typer.main.get_command(app)
    if arguments and arguments[0] in command.commands:
        session.help_command = f"foretoken {arguments[0]} --help"
    try:
        result = command.main(
            list(arguments), prog_name="foretoken", standalone_mode=False, obj=session
        )
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except SystemExit:  # typer's quiet end when the reader of a pipe has seen enough
        return EXIT_FAILURE
    except Exception as error:  # noqa: BLE001 - whatever it is, the user gets two lines
        if isinstance(interruption_in(error), KeyboardInterrupt):
            return EXIT_INTERRUPTED
        return report(error, session, command)
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a terminal that cannot show a character shows "?"
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


__all__ = ["app", "main", "run"]
