"""Errors as a user sees them: one `error:` line, one `hint:` line, and an exit code."""

from __future__ import annotations

import difflib
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import typer

from foretoken.cli.terminal import ERROR, HINT, paint
from foretoken.errors import ConfigError, ForetokenError, ModelError, RequestError

EXIT_FAILURE = 1
EXIT_USAGE = 2

# What typer raises for a wrong command line. Its releases keep the class in different places,
# but it is always the parent of this public one.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


@dataclass(slots=True)
class Session:
    """What one run of the command line shares.

    Args:
        debug: Whether errors come with a traceback.
        help_command: What to type for help.
    """

    debug: bool = False
    help_command: str = "foretoken --help"


class FileError(ForetokenError):
    """A file that the user named cannot be read or written."""


def at(place: str, error: ForetokenError) -> ForetokenError:
    """Return an error of the same kind that begins with the place it is about.

    Args:
        place: For example "prompts.jsonl, line 3"; empty adds nothing.
        error: The error.
    """
    kind = RequestError if isinstance(error, RequestError) else ConfigError
    return kind(f"{place}: {error}", hint=error.hint) if place else error


def report(error: Exception, session: Session, command: Any) -> int:
    """Print an error as two lines and return the exit code.

    Args:
        error: What ended the run.
        session: Whether a traceback is wanted.
        command: The root command, whose subcommands and options are suggested.
    """
    if session.debug:
        traceback.print_exception(error)
    if isinstance(error, _UsageError):
        message, hint, code = *_usage_lines(error, session, command), EXIT_USAGE
    elif isinstance(error, ForetokenError):
        is_usage = isinstance(error, (ConfigError, ModelError, RequestError, FileError))
        message, hint, code = str(error), error.hint, EXIT_USAGE if is_usage else EXIT_FAILURE
    elif isinstance(error, OSError):
        message, hint, code = _os_error_text(error), "check the file or device", EXIT_FAILURE
    else:
        message = f"unexpected {type(error).__name__}: {error}"
        hint = "run again with --debug for the traceback, and report it"
        code = EXIT_FAILURE
    print_lines(message, hint)
    return code


def print_lines(message: str, hint: str) -> None:
    """Print the two lines to standard error, whatever line breaks the texts contain."""
    for label, text, style in (("error:", message, ERROR), ("hint:", hint, HINT)):
        line = f"{paint(label, style, sys.stderr)} {' '.join(text.split())}"
        print(line, file=sys.stderr)  # noqa: T201


def _os_error_text(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _usage_lines(error: Any, session: Session, command: Any) -> tuple[str, str]:
    """Return message and hint of an error that typer found in the command line."""
    message = error.format_message().splitlines()[0].partition(" Did you mean")[0].rstrip(".")
    hint = f"see {session.help_command}"
    wrong = getattr(error, "option_name", None)
    if wrong is not None and "such option" in message:
        message = f"no such option: {wrong}"
        known = [name for param in error.ctx.command.params for name in param.opts]
    else:
        _, _, wrong = message.partition("No such command ")
        wrong, known = wrong.strip("'\""), list(command.commands)
    nearest = difflib.get_close_matches(wrong or "", known, n=1, cutoff=0.5)
    if nearest:
        hint = f"did you mean {nearest[0]}? {hint}"
    return message[:1].lower() + message[1:], hint


__all__ = ["EXIT_FAILURE", "EXIT_USAGE", "FileError", "Session", "at", "print_lines", "report"]
