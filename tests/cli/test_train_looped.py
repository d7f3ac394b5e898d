"""`foretoken train looped`: its model, what it tells, its errors as two lines."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from foretoken.training.looped.settings import LoopedSettings
from tests.cli.test_main import HEAVY

TINY = (
    "--steps", 6, "--context", 16, "--batch-size", 4, "--measure-steps", 3, "--group", 1,
    "--loops", 3, "--threads", 1,
)  # fmt: skip
NAMES = ("cat", "dog", "cow", "hen", "ant", "fox", "bee", "pig", "owl", "ewe")


@pytest.fixture
def looped(cli, models_on_disk, tmp_path):
    """Run `foretoken train looped` on a few texts; later options win over the earlier ones."""
    (tmp_path / "texts.txt").write_text(
        "\n<|endoftext|>\n".join(f"The {one} saw the {other}." for one in NAMES for other in NAMES)
    )
    (tmp_path / "others.jsonl").write_text('{"text": "The mule saw a hare."}\n')

    def run_here(*arguments):
        return cli("train", "looped", *base(models_on_disk, tmp_path), *arguments)

    return run_here


def base(models_on_disk, tmp_path):
    texts = ("--text", tmp_path / "texts.txt", "--held-out", tmp_path / "others.jsonl")
    return ("--model", models_on_disk.target, *texts, *TINY)


def test_a_model_and_its_report(looped, cli, tmp_path):
    folder = tmp_path / "run"
    done = looped("--output", folder)
    assert done.code == 0
    lines = done.out.splitlines()
    assert re.fullmatch(r"shared: [\d,]+ parameters, 3 layers run, 1 stored; 6 steps", lines[0])
    assert lines[1] == "on 1 other texts:"
    assert [re.split(r"\s{2,}", line.strip())[0] for line in lines[2:]] == ["loops", "1", "2", "3"]
    assert lines[-1].endswith("100.0%")
    assert done.err.splitlines()[-2:] == [
        f"written: {folder / 'report.json'}",
        f'use it:  foretoken generate --model {folder}/model --drafter speed "..."',
    ]
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"]["threads"] == 1
    assert "command" in report
    assert str(tmp_path) not in json.dumps(report)


def test_texts_are_held_out_if_none_are_given(cli, models_on_disk, looped, tmp_path):
    given = ("--model", models_on_disk.target, "--text", tmp_path / "texts.txt", *TINY)
    done = cli("train", "looped", *given, "--output", tmp_path / "run")
    assert done.code == 0
    texts = json.loads((tmp_path / "run" / "report.json").read_text())["texts"]
    assert texts["num_texts"] + texts["num_held_out_texts"] == 100
    assert texts["num_held_out_texts"] > 0


def test_a_plain_model_is_not_told_to_speculate_in_loops(looped, tmp_path):
    done = looped("--output", tmp_path / "run", "--kind", "deep")
    assert done.out.startswith("deep: ")
    assert "--drafter" not in done.err


def test_the_same_command_resumes(looped, tmp_path):
    first, again = looped("--output", tmp_path / "run"), looped("--output", tmp_path / "run")
    assert (first.code, again.code) == (0, 0)
    assert again.out == first.out
    assert again.err.splitlines()[:3] == [
        "resuming: pace, already done",
        "resuming: train, already done",
        "resuming: measure, already done",
    ]


def test_help(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert "looped" in cli("train").out
    text = cli("train", "looped", "--help").out
    assert "foretoken train looped --text stories.txt --output looped" in text
    defaults = LoopedSettings()
    for name in (
        "prelude", "group", "loops", "coda", "context", "batch_size", "minutes", "learning_rate",
        "measure_steps", "seed",
    ):  # fmt: skip
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} .*\(default {getattr(defaults, name):g}\)", text), option
    for value in (defaults.kind, defaults.optimizer, defaults.depth_weights):
        assert f"{value} (default)" in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from foretoken.cli.main import run; run(['train', 'looped', '--help']); "
        f"print('heavy:', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--loops", "many"], "'many' is not an integer", "train --help"),
        (["--loops", "0"], "loops to be an integer of at least 1; got 0", "loops"),
        (["--kind", "wide"], "kind is shared, shallow, deep; got 'wide'", "--kind"),
        (["--depth-weights", "1,2"], "or 3 numbers of at least 0", "--depth-weights"),
        (["--optimizer", "sgd"], "optimizer is adamw or muon; got 'sgd'", "optimizer"),
        (["--minutes", "0"], "minutes is a number above 0", "--minutes"),
        (["--steps", "0"], "steps is an integer >= 1; got 0", "--steps"),
        (["--heads", "3"], "hidden", "hidden"),
        (["--hidden", "16", "--copy-embedding"], "cannot be copied to 16", "--copy-embedding"),
        (["--batch-size", "4000"], "fewer than a step takes", "--batch-size"),
        (["--precision", "int8"], "precision is auto, float32 or bfloat16; got 'int8'", "preci"),
        (["--device", "pocket"], "device 'pocket' cannot be used", "cpu"),
        (["--model", "storys"], "no model 'storys'", "did you mean 'stories'?"),
        (["--text", "none.txt"], "text file 'none.txt' cannot be read", "check the path"),
        (["--loop", "3"], "no such option: --loop", "did you mean --loops?"),
    ],
)
def test_errors_are_two_lines(looped, tmp_path, arguments, message, hint):
    done = looped("--output", tmp_path / "run", *arguments)
    error_line, hint_line = done.err.splitlines()
    assert done.code == 2
    assert message in error_line
    assert hint_line.startswith("hint: ")
    assert hint in hint_line
    assert not (tmp_path / "run").exists()


def test_other_settings_are_an_error(looped, tmp_path):
    assert looped("--output", tmp_path / "run").code == 0
    done = looped("--output", tmp_path / "run", "--seed", "3")
    assert done.code == 2
    assert "holds a run with other settings: seed 0, now 3" in done.err


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bits(looped, models_on_disk, tmp_path):
    """SIGKILL between two checkpoints: no handler runs, nothing is flushed."""
    more = ("--steps", 300, "--measure-steps", 50)
    command = [
        sys.executable, "-m", "foretoken", "train", "looped", *base(models_on_disk, tmp_path),
        *more, "--output", tmp_path / "killed",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "model.checkpoint"
    deadline_s = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()

    resumed = looped("--output", tmp_path / "killed", *more)
    assert "resuming: training goes on from its checkpoint" in resumed.err
    assert looped("--output", tmp_path / "whole", *more).code == 0
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("killed", "whole")
    ]
    assert weights[0] == weights[1]
