"""`foretoken bench speed`: tables, a folder of results, and errors as two lines."""

import json
import re
import shutil
from pathlib import Path

import pytest
import typer

from foretoken.cli.main import app
from tests.cli.conftest import ALPHABET
from tests.looped import looped_module

PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"
TINY = (
    *("--max-new-tokens", 6, "--num-prompts", 1, "--rounds", 1, "--temperature", 0),
    *("--threads", 1, "--dtype", "float32"),
)
TEXTS = "once upon a time there was a fox\n<|endoftext|>\nthe end of it all was a fine day\n"


@pytest.fixture(scope="module")
def looped(tmp_path_factory, models_on_disk):
    folder = tmp_path_factory.mktemp("looped") / "looped"
    looped_module(0, loops=3, group=1, vocab=len(ALPHABET) + 1).save_pretrained(folder)
    for file in Path(models_on_disk.target).glob("*token*"):
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture
def speed(cli, looped, monkeypatch):
    """Run the command with as little work as possible."""

    def run_here(*arguments, model=looped):
        words = ["bench", "speed", "--model", model, *TINY, *arguments]
        monkeypatch.setattr("sys.argv", ["foretoken", *map(str, words)])
        return cli(*words)

    return run_here


def test_tables_and_conclusions(speed):
    done = speed("--exit-loop", 1, "--exit-loop", 2)
    assert done.code == 0
    assert "Speed, greedy" in done.out
    assert "lazy e=2" in done.out
    assert "loopspec" in done.out
    assert "Quality against latency" not in done.out


def test_json_is_the_record(speed, looped):
    done = speed(
        *("--format", "json", "--check", "eager", "--loopspec", "none", "--batch-size", 2),
        *("--temperature", 1),
    )
    record = json.loads(done.out)
    assert record["what"] == "foretoken bench speed"
    assert record["settings"]["models"] == {"shared": "looped"}
    assert [cell["temperature"] for cell in record["cells"]] == [0, 1]
    assert list(record["cells"][0]["systems"]) == ["shared plain", "eager e=1", "auto"]
    assert str(Path(looped).parent) not in done.out


def test_quality_is_measured_and_drawn(speed, models_on_disk, tmp_path):
    pytest.importorskip("matplotlib")
    texts, folder = tmp_path / "texts.txt", tmp_path / "results"
    texts.write_text(TEXTS, encoding="utf-8")
    done = speed("--shallow", models_on_disk.target, "--held-out", texts, "--output", folder)
    assert done.code == 0
    assert "at equal latency the shared model with SPEED is the better one:" in done.out
    assert sorted(path.name for path in folder.iterdir()) == [
        *("cost_model.png", "quality_latency.png", "record.json", "report.md")
    ]
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert len(record["models"]["shared"]["quality"]["bits_per_character"]) == 3
    assert len(record["models"]["shallow"]["quality"]["bits_per_character"]) == 1
    assert record["settings"]["workload"] == "held-out texts"
    assert "# foretoken bench speed" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_widened_model_says_the_same(speed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = speed("--inflate", "hidden=64", "--format", "json", "--exit-loop", 1)
    record = json.loads(done.out)
    assert record["models"]["shared"]["name"] == "looped widened to hidden=64"
    assert record["models"]["shared"]["loops"] == 3


def test_other_tokens_than_plain_decoding_are_an_error(speed, monkeypatch):
    """The check of `foretoken bench` reads this record, too."""
    from foretoken.bench.speed import run

    def changed(rounds):
        entry = as_entry(rounds)
        entry["systems"]["eager e=1"]["differences"] = [
            {"round": 0, "place": "prompt 3", "text": [1, 2], "token": 1}
        ]
        return entry

    as_entry = run.as_entry
    monkeypatch.setattr(run, "as_entry", changed)
    done = speed()
    assert done.code == 1
    assert "eager e=1 gave other tokens than plain decoding in 1 cases" in done.err
    assert "output token 2 of prompt 3: [1, 2]" in done.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--check", "never"], "checks are eager and lazy; got 'never'", "--check"),
        (["--exit-loop", 0], "exit_loop is an integer >= 1; got 0", "--exit-loop"),
        (["--exit-loop", 3], "exit_loop is below the target's 3 loops; got 3", "exit_loop"),
        (["--max-new-tokens", 1], "max_new_tokens is at least 2", "--max-new-tokens"),
        (["--max-new-tokens", 5000], "no prompt of workload stories fits", "--max-new-tokens"),
        (["--loopspec", "d9=1"], "d9", ""),
    ],
)
def test_mistakes_are_two_lines(speed, arguments, message, hint):
    done = speed(*arguments)
    assert done.code == 2
    error, hint_line = done.err.splitlines()
    assert message in error
    assert hint in hint_line


def test_a_model_without_loops_is_told_so(speed, models_on_disk):
    done = speed(model=models_on_disk.target)
    assert done.code == 2
    assert "runs each of its layers once" in done.err
    assert "train looped" in done.err


def test_it_needs_a_model(cli):
    done = cli("bench", "speed")
    assert done.code == 2
    assert "foretoken train looped" in done.err


def test_the_help_of_bench_names_it(cli):
    assert "speed" in cli("bench", "--help").out
    assert "Examples" in cli("bench", "speed", "--help").out


def test_the_page_names_only_options_that_exist():
    bench = typer.main.get_command(app).commands["bench"]
    known = {"--help", *(option.opts[0] for option in bench.commands["speed"].params)}
    text = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^foretoken bench speed (?:.*\\\n)*.*$", text, re.MULTILINE)
    named = {name for command in commands for name in re.findall(r"--[a-z][a-z-]+", command)}
    assert commands
    assert named <= known
