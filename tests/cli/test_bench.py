"""`foretoken bench`: tables, records, and errors as two lines."""

import json
import re
from pathlib import Path

import pytest
import typer

from foretoken.assets import EMBEDDED
from foretoken.bench.peers import PEERS
from foretoken.cli.main import app
from foretoken.models.heads.target import target_tensors
from foretoken.training.heads.kinds import KINDS
from tests.bench.fakes import FakePeer
from tests.heads import shape_of

TINY = ("--num-prompts", 2, "--max-new-tokens", 4, "--rounds", 1, "--threads", 1, "--in-process")


@pytest.fixture
def bench(cli, monkeypatch):
    """Run `foretoken bench` on the embedded pair with as little work as possible."""
    monkeypatch.setattr("foretoken.bench.machine.BUFFER_BYTES", 2**16)

    def run_here(*arguments):
        words = ["bench", *TINY, *arguments]
        monkeypatch.setattr("sys.argv", ["foretoken", *map(str, words)])
        return cli(*words)

    return run_here


def test_a_table_of_the_embedded_pair(bench):
    done = bench()
    assert (done.code, done.err) == (0, "")
    assert "stories, 3.65M parameters, float32; 2 prompts of stories" in done.out
    assert "foretoken plain" in done.out
    assert "foretoken draft-model" in done.out
    assert "prefill" in done.out


def test_systems_run_in_processes_of_their_own(cli):
    arguments = [word for word in TINY if word != "--in-process"]
    done = cli("bench", *arguments, "--drafter", "none", "--format", "json")
    assert done.code == 0
    record = json.loads(done.out)
    assert list(record["systems"]) == ["foretoken plain"]


def test_json_is_the_record(bench):
    done = bench("--format", "json", "--temperature", 0, "--temperature", 1, "--max-nodes", 2)
    record = json.loads(done.out)
    assert [cell["temperature"] for cell in record["cells"]] == [0, 1]
    assert record["settings"]["max_nodes"] == [2]
    assert record["settings"]["num_prompts"] == 2
    assert record["command"].startswith("foretoken bench --num-prompts 2")


def test_a_folder_gets_record_and_pictures(bench, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "results"
    done = bench("--output", folder)
    assert done.code == 0
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".png", ".png", ".png"]
    assert json.loads((folder / "record.json").read_text())["what"] == "foretoken bench"
    again = bench("--output", folder)
    assert again.code == 2
    assert "holds a record.json" in again.err
    assert bench("--output", folder, "--force").code == 0


def test_a_widened_model_keeps_its_draft(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = bench("--inflate", "hidden=384,layers=12", "--format", "json")
    assert done.code == 0
    record = json.loads(done.out)
    assert record["settings"]["model"] == "stories widened to hidden=384,layers=12"
    assert record["settings"]["drafters"] == ["draft-model:path=draft"]
    assert record["cells"][0]["systems"]["foretoken draft-model"]["tokens_per_step"] > 1


def test_a_head_is_widened_with_its_target(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, head = EMBEDDED["stories"].target, tmp_path / "head"
    kind, shape = KINDS.load("medusa"), shape_of(target)
    module = kind.build(shape, target_tensors(str(target)), {"heads": 2})
    kind.save(module, shape, head, "# Not trained\n")
    monkeypatch.setitem(PEERS._table, "fake", FakePeer)
    widened = ("--inflate", "hidden=384,layers=12", "--format", "json", "--against", "fake")
    done = bench(*widened, "--drafter", f"medusa:path={head}")
    assert done.code == 0
    assert "fake draft" not in done.out  # a head is no draft model for others
    [cell] = json.loads(done.out)["cells"]
    assert cell["systems"]["foretoken medusa"]["draft_tokens_per_step"] > 0


def test_another_system_beside_it(bench, monkeypatch):
    monkeypatch.setitem(PEERS._table, "fake", FakePeer)
    done = bench("--against", "fake", "--num-draft-tokens", 3)
    assert done.code == 0
    assert "fake draft" in done.out
    without = bench("--against", "fake", "--drafter", "prompt-lookup")
    assert "fake draft" not in without.out
    assert "only decode plainly" in without.err


def test_other_tokens_are_an_error_after_the_numbers(bench, monkeypatch):
    from foretoken.bench.foretoken_host import ForetokenHost

    run = ForetokenHost.run

    def wrong(host, tasks, *, batch_size, speculative):
        turn = run(host, tasks, batch_size=batch_size, speculative=speculative)
        if speculative:
            turn.outputs[-1].token_ids[0] += 1
        return turn

    monkeypatch.setattr(ForetokenHost, "run", wrong)
    done = bench()
    assert done.code == 1
    assert "foretoken draft-model" in done.out
    assert "gave other tokens than plain decoding in 1 cases" in done.err
    assert "stories, line 2" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 0], "rounds is an integer >= 1; got 0"),
        (["--batch-size", 2, "--batch-size", 0], "batch_size is an integer >= 1"),
        (["--max-nodes", "many"], "'many' is not an integer"),
        (["--temperature", -1], "temperature is a number 0 or"),
        (["--workload", "missing.jsonl"], "workload 'missing.jsonl' cannot be read"),
        (["--against", "vlm"], "unknown peer 'vlm'"),
        (["--drafter", "profit"], "unknown drafter 'profit'"),
        (["--model", "nowhere/at/all", "--inflate", "hidden=8"], "has no config.json"),
        (["--inflate", "hidden=8"], "cannot be widened to hidden=8"),
        (["--inflate", "hidden=384,layers=12", "--dtype", "float16"], "got dtype 'float16'"),
    ],
)
def test_mistakes_are_two_lines(bench, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = bench(*arguments)
    assert done.code == 2
    error, hint = done.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")


def test_help_has_examples(cli):
    done = cli("bench", "--help")
    assert done.code == 0
    assert "foretoken bench --inflate" in done.out


def test_the_page_names_only_options_that_exist():
    page = Path(__file__).resolve().parents[2] / "docs" / "bench.md"
    command = typer.main.get_command(app).commands["bench"]
    known = {"--help", *(option.opts[0] for option in command.params)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
    assert named <= known
