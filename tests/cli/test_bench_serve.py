"""`foretoken bench serve`: two real servers of a tiny model, and errors as two lines."""

import json
import re
from pathlib import Path

import pytest
import typer

from foretoken.cli.main import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bench-serve.md"
TINY = ("--load", 0.5, "--rounds", 1, "--duration", 0.3, "--threads", 1, "--max-requests", 2)


@pytest.fixture
def files(tmp_path):
    """Write a trace and a text; return the options that name them."""
    trace, text = tmp_path / "trace.csv", tmp_path / "text.txt"
    rows = [f"2023-11-16 18:{second // 60:02}:{second % 60:02},300,9" for second in range(300)]
    header = "TIMESTAMP,ContextTokens,GeneratedTokens"
    trace.write_text("\n".join([header, *rows]), encoding="utf-8")
    text.write_text("A text is a text is a text. " * 500, encoding="utf-8")
    return "--trace", trace, "--text", text


@pytest.fixture
def serve(cli, models_on_disk, monkeypatch):
    """Run the command with as little work as possible."""

    def run_here(*arguments):
        words = ["bench", "serve", "--model", models_on_disk.target, "--drafter", "suffix"]
        words += [*TINY, "--kv-cache-tokens", 1024, *arguments]
        monkeypatch.setattr("sys.argv", ["foretoken", *map(str, words)])
        return cli(*words)

    return run_here


@pytest.mark.slow
def test_a_run_with_real_servers(serve, files, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    done = serve(*files, "--minutes", 4, "--output", folder)
    assert done.code == 0, done.err
    assert "yes  no errors: 0 errors, 0 sent away" in done.out
    assert "yes  the same texts: 0 differ" in done.out
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["goodput.png", "latency.png", "record.json"]
    record = json.loads((folder / "record.json").read_text())
    assert record["settings"]["trace_requests"] == 240
    assert record["lengths"]["context_limit"] == 128
    [cell] = record["cells"]
    for system in cell["systems"].values():
        assert system["num_complete"] == sum(cell["num_requests"]) > 0
        assert system["server_cores"] > 0
    assert cell["systems"]["plain"]["tokens_per_step"] == 1
    assert cell["systems"]["drafts"]["tokens_per_step"] > 1
    assert str(tmp_path) not in json.dumps(record)
    again = serve(*files, "--minutes", 4, "--output", folder)
    assert "resuming: loads, 1 of 1 are there" in again.err


def test_other_texts_than_plain_decoding_are_an_error(serve, files, monkeypatch):
    from foretoken.bench.serve import run

    record = {"cells": [{"num_different_texts": 2, "exactness": ["bitwise"]}]}
    monkeypatch.setattr(run, "run_serve", lambda *_, **__: record)
    done = serve(*files, "--format", "json")
    assert done.code == 1
    assert json.loads(done.out) == record
    assert "2 answers differ from those of plain decoding" in done.err


def test_a_server_that_does_not_start_says_why(serve, files):
    done = serve(*files, "--drafter", "none")
    assert done.code == 2
    done = serve(*files, "--max-queue", -3)
    assert done.code == 1
    assert "the server of plain ended with status 2; it said:" in done.err
    assert "max_queue" in done.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([], "got no --trace", "AzurePublicDataset"),
        (["--trace", "gone.csv"], "gone.csv is no trace of requests", "ContextTokens"),
        (["--trace", "gone.csv", "--minutes", 0], "--minutes is a number > 0", "--minutes"),
        (["--rounds", 0], "rounds is an integer >= 1; got 0", "--rounds"),
        (["--duration", "x"], "'x' is not a number", ""),
    ],
)
def test_mistakes_are_two_lines(serve, arguments, message, hint):
    done = serve(*arguments)
    assert done.code == 2
    error, hint_line = done.err.splitlines()
    assert message in error
    assert hint in hint_line


def test_no_trace_is_taken_from_the_environment(serve, files, tmp_path, monkeypatch):
    """A variable that other commands need made the same words measure something else."""
    (tmp_path / "traces").mkdir()
    files[1].rename(tmp_path / "traces" / "AzureLLMInferenceTrace_conv.csv")
    monkeypatch.setenv("FORETOKEN_SHARED_DATA", str(tmp_path))
    done = serve()
    assert done.code == 2
    assert "got no --trace" in done.err


def test_the_help_of_bench_names_it(cli):
    assert "serve" in cli("bench", "--help").out
    assert "Examples" in cli("bench", "serve", "--help").out


def test_the_page_names_only_options_that_exist():
    bench = typer.main.get_command(app).commands["bench"]
    command = bench.commands["serve"]
    known = {"--help", *(name for it in command.params for name in (*it.opts, *it.secondary_opts))}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8")))
    assert named <= known
