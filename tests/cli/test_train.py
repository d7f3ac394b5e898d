"""`foretoken train boost`: its pool, its table, its errors as two lines."""

import json
import re
import subprocess
import sys

import pytest

from foretoken.training.boost_run import BoostSettings
from tests.cli.test_main import HEAVY

TINY = (
    "--num-prompts", 6, "--max-new-tokens", 5, "--window", 2, "--steps", 2, "--batch-size", 3,
    "--pool-size", 2, "--threads", 1,
)  # fmt: skip
PROMPTS = "\n".join(f"The {name} " for name in ("cat", "dog", "cow", "hen", "ant", "fox"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture
def boost(cli, models_on_disk, prompts):
    """Run `foretoken train boost` on tiny models; later options win over the earlier ones."""

    def run_here(*arguments):
        pair = ("--model", models_on_disk.target, "--start", models_on_disk.draft)
        return cli("train", "boost", *pair, "--prompts", prompts, *TINY, *arguments)

    return run_here


def test_a_pool_and_its_report(boost, cli, models_on_disk, tmp_path):
    pool = tmp_path / "pool"
    done = boost("--output", pool)
    assert done.code == 0
    assert "target, draft models from draft; trained on " in done.out
    assert " tokens, windows of 2)" in done.out
    assert re.search(r"covered +control +first choices +control +tokens/step +control", done.out)
    assert max(map(len, done.out.splitlines())) <= 120
    assert re.search(r"^the start +\d", done.out, re.MULTILINE)
    assert re.search(r"^2 models +\d+\.\d% +\d+\.\d%", done.out, re.MULTILINE)
    assert "the boosted pool's gain over one model [95 %]:" in done.out
    assert "over a pool trained without dropping" in done.out
    assert done.err.splitlines()[-1] == f"written: {pool / 'report.json'}"
    report = json.loads((pool / "report.json").read_text())
    assert report["environment"]["threads"] == 1
    assert str(tmp_path) not in json.dumps(report)

    drafters = [("--drafter", f"draft-model:path={pool / f'draft-{n}'}") for n in (1, 2)]
    served = cli(
        "generate", "--model", models_on_disk.target, *drafters[0], *drafters[1], "--compare", "Hi"
    )
    assert served.code == 0
    assert "same tokens" in served.err


def test_lines_say_how_far_it_is_where_there_is_no_terminal(boost, tmp_path):
    lines = boost("--output", tmp_path / "pool", "--no-control").err.splitlines()
    assert "collecting outputs: 9 of 9" in lines
    assert any(re.fullmatch(r"training draft-2: 2 of 2, loss \d\.\d{3}", line) for line in lines)
    assert not any("control" in line or "resuming" in line for line in lines)
    assert all(len(line) < 150 for line in lines)


def test_the_same_command_resumes(boost, tmp_path):
    first = boost("--output", tmp_path / "pool", "--no-control")
    lines = boost("--output", tmp_path / "pool", "--no-control").err.splitlines()
    assert lines[:4] == [
        "resuming: writing prompts, 3 of 3 are there",
        "resuming: collecting outputs, 9 of 9 are there",
        "resuming: training draft-1, 2 of 2 are there",
        "resuming: training draft-2, 2 of 2 are there",
    ]
    assert first.code == 0


def test_an_interrupted_run_keeps_what_is_finished(boost, tmp_path, monkeypatch):
    from foretoken.training import boost as algorithm

    train = algorithm.train

    def interrupted(*arguments, **more):
        if more["checkpoint"].name.startswith("draft-2"):
            raise KeyboardInterrupt
        return train(*arguments, **more)

    monkeypatch.setattr(algorithm, "train", interrupted)
    done = boost("--output", tmp_path / "pool")
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        "interrupted: what is finished is kept; the same command goes on from there"
    )
    assert (tmp_path / "pool" / "draft-1" / "model.safetensors").exists()
    monkeypatch.undo()
    assert boost("--output", tmp_path / "pool").code == 0


def test_a_terminal_shows_a_bar_and_what_is_resumed(boost, tmp_path, monkeypatch):
    monkeypatch.setattr("foretoken.cli.progress.is_terminal", lambda stream: stream is sys.stderr)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich draw bars into what is no terminal
    monkeypatch.setenv("TERM", "xterm")
    first = boost("--output", tmp_path / "pool", "--no-control")
    again = boost("--output", tmp_path / "pool", "--no-control")
    assert (first.code, again.code) == (0, 0)
    assert "━" in first.err
    assert "resuming" not in first.err
    assert "resuming: training draft-2, 2 of 2 are there" in again.err


def test_a_pool_that_ends_early_says_so(boost, models_on_disk, tmp_path):
    itself = ("--start", models_on_disk.target, "--learning-rate", "1e-9")
    done = boost(*itself, "--output", tmp_path / "pool")
    assert done.code == 0
    assert "the pool ends with model 1: no window is left to train another one on" in done.out
    assert not (tmp_path / "pool" / "draft-2").exists()


def test_prompts_from_standard_input(boost, tmp_path, monkeypatch):
    with (tmp_path / "stdin").open("w+b") as file:
        file.write(PROMPTS.encode())
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": file}))
        done = boost("--prompts", "-", "--output", tmp_path / "pool", "--no-control")
    assert done.code == 0


# -- help and errors -----------------------------------------------------------------------------


def test_help(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert "boost" in cli("train").out
    assert "train" in cli("--help").out
    text = cli("train", "boost", "--help").out
    assert "foretoken train boost --output pool" in text
    defaults = BoostSettings()
    for name in (
        "pool_size", "window", "epochs", "batch_size", "learning_rate", "num_prompts",
        "max_new_tokens", "seed",
    ):  # fmt: skip
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} .*\(default {getattr(defaults, name):g}\)", text), option
    assert re.search(r"--temperature .*0 \(default\)", text)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from foretoken.cli.main import run; run(['train', 'boost', '--help']); "
        f"print('heavy:', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--pool-size", "0"], "pool_size is an integer >= 1; got 0", "change --pool-size"),
        (["--pool-size", "two"], "'two' is not an integer", "train --help"),
        (["--learning-rate", "0"], "learning_rate is a number above 0", "--learning-rate"),
        (["--temperature", "-1"], "temperature is a number", "temperature"),
        (["--threads", "0"], "threads is an integer >= 1; got 0", "--threads"),
        (["--device", "pocket"], "device 'pocket' cannot be used", "cpu"),
        (["--start", "nowhere"], "model directory 'nowhere' does not exist", "--start"),
        (["--model", "storys"], "no model 'storys'", "did you mean 'stories'?"),
        (["--prompts", "none.txt"], "input none.txt cannot be read", "check the path"),
        (["--wndow", "3"], "no such option: --wndow", "did you mean --window?"),
    ],
)
def test_errors_are_two_lines(boost, tmp_path, arguments, message, hint):
    done = boost("--output", tmp_path / "pool", *arguments)
    error_line, hint_line = done.err.splitlines()
    assert done.code == 2
    assert message in error_line
    assert hint_line.startswith("hint: ")
    assert hint in hint_line
    assert not (tmp_path / "pool").exists()


def test_no_output_folder_is_an_error(cli):
    done = cli("train", "boost")
    assert done.code == 2
    assert "issing option '--output'" in done.err.splitlines()[0]


def test_a_wrong_command_is_an_error(cli):
    done = cli("train", "bost")
    assert done.code == 2
    assert "no such command 'bost'" in done.err


def test_another_vocabulary_is_an_error(boost, models_on_disk, tmp_path):
    done = boost("--start", models_on_disk.stranger, "--output", tmp_path / "pool")
    assert done.code == 2
    assert "vocabularies differ" in done.err
    assert "of the target's own family" in done.err.splitlines()[-1]


def test_other_settings_are_an_error(boost, tmp_path):
    assert boost("--output", tmp_path / "pool", "--no-control").code == 0
    done = boost("--output", tmp_path / "pool", "--no-control", "--window", 3)
    assert done.code == 2
    error_line, hint_line = done.err.splitlines()
    assert "holds a run with other settings: window 2, now 3" in error_line
    assert "name another folder" in hint_line


def test_a_broken_corpus_line_is_an_error(boost, tmp_path):
    assert boost("--output", tmp_path / "pool", "--no-control").code == 0
    corpus = tmp_path / "pool" / "corpus.jsonl"
    corpus.write_text("broken\n" + corpus.read_text())
    done = boost("--output", tmp_path / "pool", "--no-control")
    assert done.code == 2
    assert "error: corpus.jsonl, line 1: not JSON" in done.err
    assert "hint: delete the line" in done.err


def test_prompts_with_sampling_of_their_own_are_an_error(boost, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "temperature": 1}\n')
    done = boost("--prompts", path, "--output", tmp_path / "pool")
    assert done.code == 2
    assert "prompts.jsonl, line 2: a prompt with sampling parameters of its own" in done.err
