"""`foretoken bench specinfer`, and that `foretoken bench` is what it was without it."""

import json
import re
from pathlib import Path

import pytest
import typer

from foretoken.cli.main import app

TINY = ("--num-prompts", 2, "--max-new-tokens", 4, "--num-seeds", 1, "--max-width", 2)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "specinfer.md"


@pytest.fixture
def specinfer(cli, models_on_disk, monkeypatch):
    """Run the command with as little work as possible; the pair is one model twice."""

    def run_here(*arguments):
        pair = ("--model", models_on_disk.target, "--draft", models_on_disk.target)
        words = ["bench", "specinfer", *pair, *TINY, "--threads", 1, *arguments]
        monkeypatch.setattr("sys.argv", ["foretoken", *map(str, words)])
        return cli(*words)

    return run_here


def test_tables_and_what_they_show(specinfer):
    done = specinfer()
    assert (done.code, done.err) == (0, "")
    assert "draft target" in done.out
    assert "Success rate, temperature 1" in done.out
    assert "static; mss, i.i.d. draws" in done.out
    assert "paper, PIQA" in done.out
    assert "\nyes  coupled: the tokens are those of plain decoding" in done.out


def test_json_is_the_record(specinfer, models_on_disk):
    done = specinfer("--format", "json", "--verifier", "rrs", "--seed", 3)
    record = json.loads(done.out)
    assert record["what"] == "foretoken bench specinfer"
    assert record["settings"]["model"] == "target"
    assert record["settings"]["verifiers"] == ["rrs"]
    assert record["settings"]["seed"] == 3
    assert "rrs" in {cell["verifier"] for cell in record["tokens_per_step"]}
    assert record["command"].startswith("foretoken bench specinfer --model target --draft target")
    assert str(Path(models_on_disk.target).parent) not in done.out


def test_the_embedded_pair_needs_no_names(cli):
    done = cli("bench", "specinfer", *TINY, "--threads", 1)
    assert (done.code, done.err) == (0, "")
    assert "stories" in done.out
    assert "draft stories/draft" in done.out


def test_a_folder_gets_record_and_picture(specinfer, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    assert specinfer("--output", folder).code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "record.json",
        "tokens_per_step.png",
    ]
    assert "holds a record.json" in specinfer("--output", folder).err
    assert specinfer("--output", folder, "--force").code == 0


@pytest.mark.parametrize("is_new", [True, False])
def test_an_interrupt_leaves_nothing_behind(specinfer, tmp_path, monkeypatch, is_new):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    if not is_new:
        folder.mkdir()
        (folder / "record.json").write_text("old")

    def interrupt(record, into):
        (into / "half.png").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("foretoken.bench.specinfer.plots.write_plots", interrupt)
    assert specinfer("--output", folder, "--force").code == 130
    assert folder.exists() is not is_new
    if not is_new:
        assert [path.read_text() for path in folder.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--max-width", 1], "max_width is at least 2, to compare widths; got 1", "--max-width"),
        (["--num-seeds", 0], "num_seeds is an integer >= 1; got 0", "--num-seeds"),
        (["--verifier", "fair"], "unknown verifier 'fair'", ""),
        (["--max-new-tokens", 500], "leaves room for 500 tokens", "--max-new-tokens"),
        (["--draft", "nowhere/at/all"], "nowhere/at/all", ""),
        (["--num-seed", 2], "no such option: --num-seed", "see foretoken bench specinfer --help"),
    ],
)
def test_mistakes_are_two_lines(specinfer, arguments, message, hint):
    done = specinfer(*arguments)
    assert done.code == 2
    error, hint_line = done.err.splitlines()
    assert message in error
    assert hint in hint_line


def test_another_model_needs_a_draft(cli, models_on_disk):
    done = cli("bench", "specinfer", "--model", models_on_disk.target)
    assert done.code == 2
    assert "has no draft model of its own" in done.err


def test_options_before_the_name_are_not_lost_silently(cli):
    done = cli("bench", "--seed", 0, "--model", "stories", "specinfer")
    assert done.code == 2
    assert done.err.splitlines() == [
        "error: --model, --seed before specinfer means nothing",
        "hint: options follow the name: foretoken bench specinfer --model ...",
    ]


def test_the_help_of_bench_names_it(cli):
    text = cli("bench", "--help").out
    assert "specinfer" in text
    assert "foretoken bench --inflate" in text
    assert "Examples" in cli("bench", "specinfer", "--help").out


def test_the_page_names_only_options_that_exist():
    bench = typer.main.get_command(app).commands["bench"]
    command = bench.commands["specinfer"]
    known = {"--help", *(option.opts[0] for option in command.params)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8")))
    assert named <= known
