"""`foretoken bench sweep`: tables, records that are gone on with, and errors as two lines."""

import json
import re
import threading
from pathlib import Path

import pytest
import typer

from foretoken.cli.main import app
from foretoken.cli.progress import progress_bar, time_left
from foretoken.core.progress import Progress

TINY = (
    *("--max-new-tokens", 4, "--num-prompts", 1, "--rounds", 1, "--max-rounds", 1),
    *("--batch-size", 1, "--temperature", 0, "--threads", 1, "--least-seconds", 0),
)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweep.md"


@pytest.fixture
def sweep(cli, models_on_disk, monkeypatch):
    """Run the command with as little work as possible."""

    def run_here(*arguments):
        words = ["bench", "sweep", "--model", models_on_disk.target, *TINY, *arguments]
        monkeypatch.setattr("sys.argv", ["foretoken", *map(str, words)])
        return cli(*words)

    return run_here


def test_tables_and_conclusions(sweep):
    done = sweep()
    assert (done.code, len(done.err.splitlines())) == (0, 3)
    assert "edit, greedy: speed of plain decoding [95 %]" in done.out
    assert "suffix" in done.out
    assert "of 3 cells" in done.out


def test_json_is_the_record(sweep, models_on_disk):
    drafter = f"draft-model:path={models_on_disk.target}"
    done = sweep(
        *("--format", "json", "--workload", "random", "--temperature", 1, "--batch-size", 2),
        *("--drafter", drafter, "--drafter", "suffix", "--max-nodes", 2, "--max-nodes", 3),
    )
    record = json.loads(done.out)
    assert record["what"] == "foretoken bench sweep"
    assert record["settings"]["temperatures"] == [0, 1]
    assert record["settings"]["drafters"] == ["draft-model:path=target", "suffix"]
    assert len(record["settings"]["weights"]) == 2
    assert len(record["cells"]) == 4
    assert list(record["cells"][0]["systems"]) == [
        *("plain", "draft-model ≤2", "draft-model ≤3", "suffix ≤2", "suffix ≤3", "auto")
    ]
    assert str(Path(models_on_disk.target).parent) not in done.out


def test_a_folder_is_gone_on_with(sweep, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    words = ("--workload", "random", "--output", folder)
    assert sweep(*words).code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "sweep.png"]
    whole = json.loads((folder / "record.json").read_text())
    again = sweep(*words)
    assert "resuming: cells, already done" in again.err
    assert json.loads((folder / "record.json").read_text()) == whole
    other = sweep(*words, "--seed", 3)
    assert other.code == 2
    assert "is of another run: seed 0, now 3" in other.err
    assert sweep(*words, "--seed", 3, "--force").code == 0


def test_finished_cells_are_told(sweep):
    done = sweep("--workload", "random", "--temperature", 1)
    assert done.code == 0
    assert done.err.splitlines() == ["1 of 2 cells, less than a minute left", "2 of 2 cells"]


@pytest.mark.parametrize(
    ("left_s", "text"),
    [(None, ""), (29.0, "less than a minute left"), (100.0, "about 2 min left")],
)
def test_the_time_that_is_left_in_words(left_s, text):
    assert time_left(Progress(done=1, total=2, left_s=left_s)) == text


def test_nothing_draws_while_something_is_measured(monkeypatch, capsys):
    """A thread that draws ten times a second would take part in every turn."""
    monkeypatch.setattr("foretoken.cli.progress.is_terminal", lambda _: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    before = threading.active_count()
    with progress_bar(is_still=True) as report:
        report(Progress(done=1, total=3, stage="cells", detail="round 1", left_s=200.0))
        assert threading.active_count() == before
    assert "cells  round 1  about 3 min left" in capsys.readouterr().err
    with progress_bar() as report:
        assert threading.active_count() == before + 1


def test_other_tokens_than_plain_decoding_are_an_error(sweep, monkeypatch):
    """The check of `foretoken bench` reads this record, too."""
    from foretoken.bench.sweep import run

    def changed(key, rounds):
        entry = as_entry(key, rounds)
        entry["systems"]["suffix"]["differences"] = [
            {"round": 0, "place": "the prompt of seed 3", "text": [1, 2], "token": 1}
        ]
        return entry

    as_entry = run.as_entry
    monkeypatch.setattr(run, "as_entry", changed)
    done = sweep("--workload", "random")
    assert done.code == 1
    assert "suffix gave other tokens than plain decoding in 1 cases" in done.err
    assert "output token 2 of the prompt of seed 3: [1, 2]" in done.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--workload", "storys"], "unknown workload of a sweep 'storys'", "story"),
        (["--drafter", "none"], "a sweep compares drafters; got none", ""),
        (["--rounds", 2], "max_rounds is at least rounds, 2; got 1", "--max-rounds"),
        (["--num-prompts", 0], "num_prompts is an integer >= 1; got 0", "--num-prompts"),
        (["--max-new-tokens", 100], "need a context of 200 tokens", "--max-new-tokens"),
        (["--least-seconds", -1], "least_seconds is in [0, 600]; got -1", "--least-seconds"),
        (["--width", "x"], "'x' is not a number", ""),
    ],
)
def test_mistakes_are_two_lines(sweep, arguments, message, hint):
    done = sweep(*arguments)
    assert done.code == 2
    error, hint_line = done.err.splitlines()
    assert message in error
    assert hint in hint_line


def test_the_help_of_bench_names_it(cli):
    assert "sweep" in cli("bench", "--help").out
    assert "Examples" in cli("bench", "sweep", "--help").out


def test_the_page_names_only_options_that_exist():
    bench = typer.main.get_command(app).commands["bench"]
    command = bench.commands["sweep"]
    known = {"--help", *(option.opts[0] for option in command.params)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8")))
    assert named <= known
