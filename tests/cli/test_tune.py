"""`foretoken tune` on the command line."""

import json
import re
from pathlib import Path

import pytest
import typer

from foretoken.cli.main import app
from foretoken.planner.plan import Plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tune.md"
TINY = ("--max-new-tokens", 6, "--rounds", 1, "--max-nodes", 3, "--threads", 1)


@pytest.fixture(autouse=True)
def _quick_costs(monkeypatch):
    monkeypatch.setattr("foretoken.bench.tune.run.COST_BUDGET_S", 0.01)


@pytest.fixture
def tune(cli, models_on_disk, monkeypatch):
    """Run the command with as little work as possible; the pair is one model twice."""

    def run_here(*arguments, num_prompts=2):
        draft = f"draft-model:path={models_on_disk.target}"
        words = ["tune", "--model", models_on_disk.target, "--drafter", draft, *TINY]
        words += ["--num-prompts", num_prompts, *arguments]
        monkeypatch.setattr("sys.argv", ["foretoken", *map(str, words)])
        return cli(*words)

    return run_here


def test_report_ends_with_the_verdict(tune):
    done = tune()
    assert (done.code, done.err) == (0, "")
    assert "draft-model ≤3" in done.out
    assert "What was measured" in done.out
    last = done.out.rstrip().rpartition("\n\n")[2]
    assert re.match(r"(Speculate with|Do not speculate)", last)


def test_json_is_the_record(tune, models_on_disk):
    done = tune("--format", "json", "--drafter", "prompt-lookup", "--temperature", 0.5)
    record = json.loads(done.out)
    assert record["what"] == "foretoken tune"
    assert [it["name"] for it in record["candidates"]] == ["draft-model", "prompt-lookup"]
    assert record["settings"]["temperatures"] == [0.5]
    assert str(Path(models_on_disk.target).parent) not in done.out


def test_lines_of_the_input_keep_their_own_parameters(tune, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "one", "temperature": 0.9, "seed": 3},
        {"prompt_ids": [1, 2, 3], "max_new_tokens": 4},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    done = tune("--input", path, "--format", "json")
    record = json.loads(done.out)
    assert record["settings"]["temperatures"] == [0.0, 0.9]
    assert record["settings"]["source"] == "prompts.jsonl"
    assert record["measured"][0]["tokens_per_s"]["median"] > 0


def test_a_folder_gets_plan_report_record_and_pictures(tune, generate, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "tuned"
    done = tune("--output", folder)
    assert done.code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "acceptance.png",
        "cost.png",
        "plan.json",
        "predicted.png",
        "record.json",
        "report.md",
    ]
    Plan.load(folder / "plan.json")
    plain = generate("--max-new-tokens", 6, "--drafter", "none", "once")
    planned = generate("--max-new-tokens", 6, "--plan", folder / "plan.json", "once")
    assert (planned.code, planned.out) == (0, plain.out)
    assert "holds a record.json" in tune("--output", folder).err


def test_an_interrupt_writes_what_is_finished(tune, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def interrupt(*_arguments, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("foretoken.bench.tune.run.Tuner._measure", interrupt)
    folder = tmp_path / "tuned"
    done = tune("--output", folder)
    assert done.code == 130
    assert "interrupted" in done.err
    record = json.loads((folder / "record.json").read_text())
    assert not record["is_finished"]
    assert "is predicted to make" in record["verdict"]
    assert (folder / "plan.json").exists()


def test_an_interrupt_at_the_start_leaves_nothing_behind(tune, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def interrupt(*_arguments, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("foretoken.bench.tune.run.Tuner._record", interrupt)
    assert tune("--output", tmp_path / "tuned").code == 130
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--rounds", 0], "rounds is an integer >= 1; got 0", "--rounds"),
        (["--max-nodes", 0], "max_nodes is an integer >= 1; got 0", "--max-nodes"),
        (["--drafter", "prompt-lokup"], "unknown drafter 'prompt-lokup'", "prompt-lookup"),
        (["--workload", "none.txt"], "cannot be read", "check the path"),
        (["--workload", "stories", "--input", "a.txt"], "both name prompts", "leave one"),
        (["--temperature", -1], "temperature", ""),
    ],
)
def test_mistakes_are_two_lines(tune, arguments, message, hint):
    done = tune(*arguments)
    assert done.code == 2
    error, hint_line = done.err.splitlines()
    assert message in error
    assert hint in hint_line


def test_the_page_names_only_options_that_exist():
    command = typer.main.get_command(app).commands["tune"]
    generate = typer.main.get_command(app).commands["generate"]
    known = {"--help"}
    known.update(option.opts[0] for it in (command, generate) for option in it.params)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8")))
    assert named <= known
