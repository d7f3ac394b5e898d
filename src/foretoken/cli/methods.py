"""`foretoken methods`."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from foretoken.cli import options
from foretoken.cli.terminal import is_terminal, note

if TYPE_CHECKING:
    from foretoken.engine.methods import DrafterRow, Methods, VerifierRow

PIPE_WIDTH = 160  # where no terminal has a width
REGENERATE = "foretoken methods --format markdown > docs/methods.md"

EXAMPLES = """
[bold]Examples[/]

foretoken methods

foretoken methods --format json
"""

_INTRODUCTION = (
    'Every drafter and verifier that is registered, by the axes of the survey "Beyond the '
    'Speculative Game" (arXiv:2404.14897). `foretoken methods` prints these tables, with what '
    "other packages register."
)
_ABOUT_DRAFTERS = (
    "Where drafts come from, whether that needs weights made for it, what ends a draft, and its "
    "shape; which rules take siblings drawn as this drafter can. [Drafters](drafters.md) says "
    "which one helps when."
)
_ABOUT_VERIFIERS = (
    "How closely the output follows plain decoding, given equal logits; what a draft token is "
    "accepted by; which siblings a rule takes, and of how many drafters. "
    "[Verifiers](verifiers.md) explains each."
)


class MethodsFormat(enum.StrEnum):
    """How the tables are written."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


def _format(text: str) -> MethodsFormat:
    try:
        return MethodsFormat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not text, json or markdown") from None


Format = Annotated[
    MethodsFormat,
    options._files("--format", "FORMAT", "text (default), json or markdown.", parser=_format),
]


def methods(format_: Format = MethodsFormat.TEXT, debug: options.Debug = False) -> None:
    """List drafters and verifiers by the axes of the survey of the field."""
    if not debug:
        warnings.simplefilter("ignore")
    from foretoken.engine.methods import list_methods

    found = list_methods()
    if format_ is MethodsFormat.JSON:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    elif format_ is MethodsFormat.MARKDOWN:
        typer.echo(page(found), nl=False)
    else:
        _show("drafters", _drafter_table(found))
        _show("verifiers", _verifier_table(found))
    for name, reason in found.broken.items():
        note(f"left out: {name}: {reason}")


def page(found: Methods) -> str:
    """Return the tables as docs/methods.md."""
    parts = [
        f"<!-- Generated: {REGENERATE} -->\n# Methods",
        _INTRODUCTION,
        "## Drafters",
        _ABOUT_DRAFTERS,
        _markdown(_drafter_table(found)),
        "## Verifiers",
        _ABOUT_VERIFIERS,
        _markdown(_verifier_table(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _drafter_table(found: Methods) -> list[list[str]]:
    """Return the heads of the columns and a list for each drafter."""
    all_rules = tuple(rule.name for rule in found.verifiers)
    heads = ["drafter", "source of drafts", "trained", "termination", "structure", "verifiers"]
    return [
        [*heads, "reference"],
        *(
            [
                _named(row),
                row.source,
                {True: "yes", False: "no", None: "not said"}[row.is_trained],
                row.termination,
                row.structure,
                "all" if row.verifiers == all_rules else ", ".join(row.verifiers),
                row.reference,
            ]
            for row in found.drafters
        ),
    ]


def _verifier_table(found: Methods) -> list[list[str]]:
    """Return the heads of the columns and a list for each verifier."""
    heads = ["verifier", "exactness", "acceptance criterion", "siblings drawn as", "structure"]
    return [
        [*heads, "drafters", "reference"],
        *(
            [
                _named(row),
                row.exactness,
                row.criterion,
                _words(row.draws),
                row.structure,
                "any number" if row.max_drafters is None else str(row.max_drafters),
                row.reference,
            ]
            for row in found.verifiers
        ),
    ]


def _named(row: DrafterRow | VerifierRow) -> str:
    return row.name if row.package == "foretoken" else f"{row.name} (of {row.package})"


def _words(draws: Sequence[str]) -> str:
    from foretoken.core.draft import SiblingDraw

    if len(draws) == len(SiblingDraw):
        return "any"
    return ", ".join(draws).replace("_", " ")


def _markdown(table: Sequence[Sequence[str]]) -> str:
    heads, *rows = table
    rows = [[f"`{row[0]}`", *row[1:]] for row in rows]
    rule = ["---"] * len(heads)
    lines = [heads, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _show(title: str, table: Sequence[Sequence[str]]) -> None:
    """Print a table for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads, *rows = table
    console = Console(width=None if is_terminal(sys.stdout) else PIPE_WIDTH, highlight=False)
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, head in enumerate(heads):
        shown.add_column(head, no_wrap=number == 0, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    console.print()


__all__ = ["EXAMPLES", "REGENERATE", "methods", "page"]
