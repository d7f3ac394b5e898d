"""The root command: help, version, usage errors, and the last line of defence."""

import re
import subprocess
import sys

import pytest

import foretoken
from foretoken.cli import generate as command
from foretoken.cli.options import DEFAULTS
from foretoken.core.params import SamplingParams
from foretoken.planner.plan import Plan

HEAVY = {"numba", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
IMPORT_CHECK = f"""
import sys
from foretoken.cli.main import run
code = run(["generate", "--help"])
print("heavy:", sorted(set(sys.modules) & {HEAVY!r}), code)
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHECK], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "heavy: [] 0"


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out) == (0, f"foretoken {foretoken.__version__}\n")


def test_no_command_shows_the_help(cli):
    result = cli()
    assert result.code == 0
    assert "generate" in result.out
    assert result.out == cli("--help").out == cli("-h").out


def test_help_of_a_command(cli):
    result = cli("generate", "--help")
    assert result.code == 0
    assert "Examples" in result.out
    assert 'foretoken generate "Once upon a time"' in result.out


def test_help_states_the_defaults(cli, monkeypatch):
    """The defaults of a plan are written out in the help, which does not import plans."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    text = cli("generate", "--help").out
    assert SamplingParams() == DEFAULTS
    assert f"(default {DEFAULTS.max_new_tokens})" in text
    limits = rf"default {Plan(adaptive=False).node_limit}, adaptive {Plan().node_limit}"
    assert re.search(rf"--max-nodes .*\({limits}\)", text)
    assert re.search(rf"--verifier .*\(default {Plan().verifier}\)", text)
    assert re.search(rf"--drafter .*{Plan().drafters[0]} \(default\)", text)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["genrate", "x"], "no such command 'genrate'", "did you mean generate?"),
        (["zzz"], "no such command 'zzz'", "see foretoken --help"),
        (["--versoin"], "no such option: --versoin", "did you mean --version?"),
        (["generate", "--temprature", "1"], "no such option: --temp", "did you mean --temperature"),
        (["generate", "--top-k", "a", "x"], "'--top-k': 'a' is not an integer", "generate --help"),
        (["generate", "--top-p", "a", "x"], "'--top-p': 'a' is not a number", "generate --help"),
        (["generate", "--seed", "1.5", "x"], "'--seed': '1.5' is not an int", "generate --help"),
        (["generate", "--format", "xml"], "'xml' is neither text nor json", "generate --help"),
        (["generate", "x", "--model"], "requires an argument", "generate --help"),
    ],
)
def test_usage_errors(cli, arguments, message, hint):
    result = cli(*arguments)
    error_line, hint_line = result.err.splitlines()
    assert result.code == 2
    assert error_line.startswith("error: ")
    assert hint_line.startswith("hint: ")
    assert message in error_line
    assert hint in hint_line
    assert result.out == ""


def fail(error):
    def read_jobs(*_):
        raise error

    return read_jobs


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("one\ntwo"), "error: unexpected ValueError: one two"),
        (OSError(5, "Input/output error", "tape"), "error: tape: Input/output error"),
        (foretoken.DrafterError("it broke", hint="mend it"), "error: it broke"),
    ],
)
def test_what_nobody_expected_ends_with_exit_code_1(cli, monkeypatch, error, message):
    monkeypatch.setattr(command, "read_jobs", fail(error))
    result = cli("generate", "x")
    assert result.code == 1
    assert result.err.splitlines()[0] == message
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["error", "hint"]


def test_debug_shows_the_traceback(cli, monkeypatch):
    monkeypatch.setattr(command, "read_jobs", fail(ValueError("bad")))
    lines = cli("generate", "x", "--debug").err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == "error: unexpected ValueError: bad"


def test_an_interrupt_before_the_work_is_silent(cli, monkeypatch):
    monkeypatch.setattr(command, "read_jobs", fail(KeyboardInterrupt()))
    result = cli("generate", "x")
    assert (result.code, result.err) == (130, "")


def test_an_interrupt_that_came_as_native_code_returned_is_one_too(cli, monkeypatch):
    """It used to be reported as an unexpected SystemError."""
    error = SystemError("returned a result with an exception set")
    error.__cause__ = KeyboardInterrupt()
    monkeypatch.setattr(command, "read_jobs", fail(error))
    result = cli("generate", "x")
    assert (result.code, result.err) == (130, "")
