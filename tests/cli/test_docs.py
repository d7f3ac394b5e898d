"""docs/cli.md says what the command line does."""

import re
from pathlib import Path

import typer

from foretoken.cli.main import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
TEXT = PAGE.read_text(encoding="utf-8")
BOX = re.compile(r"[│╭╮╰╯─]")


def words(text):
    return " ".join(BOX.sub(" ", text).split())


def help_block():
    return re.search(r"```text\n(.*?)```", TEXT, re.DOTALL)[1]


def options():
    command = typer.main.get_command(app).commands["generate"]
    return [option for option in command.params if option.opts[0].startswith("--")]


def test_the_help_of_generate_is_on_the_page():
    shown = words(help_block())
    for option in options():
        names = " ".join([option.opts[0], *option.secondary_opts])
        assert words(f"{names} {option.metavar} {option.help}") in shown
    in_panels = re.findall(r"^│ (--[a-z-]+)", help_block(), re.MULTILINE)
    assert sorted(in_panels) == sorted(["--help", *(option.opts[0] for option in options())])


def test_every_option_that_the_page_names_exists():
    names = [name for option in options() for name in (*option.opts, *option.secondary_opts)]
    known = {"--help", "--version", *names}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= known
