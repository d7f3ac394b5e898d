"""`foretoken train draft`: its model, its tables, its errors as two lines."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from foretoken.training.draft.settings import DraftSettings
from tests.cli.test_main import HEAVY

TINY = (
    "--num-prompts", 6, "--max-new-tokens", 5, "--layers", 1, "--steps", 3, "--batch-size", 3,
    "--threads", 1,
)  # fmt: skip
PROMPTS = "\n".join(f"The {name} " for name in ("cat", "dog", "cow", "hen", "ant", "fox"))


@pytest.fixture
def draft(cli, models_on_disk, tmp_path):
    """Run `foretoken train draft` on a tiny target; later options win over the earlier ones."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)

    def run_here(*arguments):
        target = ("--model", models_on_disk.target, "--prompts", prompts)
        return cli("train", "draft", *target, *TINY, *arguments)

    return run_here


def test_a_draft_and_its_report(draft, cli, models_on_disk, tmp_path):
    folder = tmp_path / "run"
    done = draft("--output", folder, "--against", "prompt-lookup")
    assert done.code == 0
    assert re.search(r"^target: a draft model of [\d,]+ parameters, cut from the target", done.out)
    assert re.search(r"^shape +layers=1,.* \(the user\)$", done.out, re.MULTILINE)
    assert re.search(r"^first choices +\d.*% → \d.*% are the target's$", done.out, re.MULTILINE)
    assert re.search(r"forecast +tokens/step +forecast +tokens/s +times plain", done.out)
    row = r"^draft +[\d.]+ +[\d.]+ +[\d,]+ +[\d,]+ +[\d.]+ \[[\d.]+, [\d.]+\]$"
    assert re.search(row, done.out, re.MULTILINE)
    assert re.search(r"^plain +[\d.]+ +1\.00 ", done.out, re.MULTILINE)
    assert re.search(r"^prompt-lookup ", done.out, re.MULTILINE)
    assert "verified: the same tokens as plain decoding" in done.out
    assert re.search(r"in all: ", done.out)
    assert max(map(len, done.out.splitlines())) <= 120
    assert done.err.splitlines()[-2:] == [
        f"written: {folder / 'report.json'}",
        f"use it:  foretoken generate --model {models_on_disk.target} "
        f"--drafter draft-model:path={folder}/draft",
    ]
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"]["threads"] == 1
    assert str(tmp_path) not in json.dumps(report)

    served = cli(
        "generate", "--model", models_on_disk.target, "--drafter",
        f"draft-model:path={folder / 'draft'}", "--compare", "Hi",
    )  # fmt: skip
    assert served.code == 0
    assert "same tokens" in served.err


def test_lines_say_how_far_it_is_where_there_is_no_terminal(draft, tmp_path):
    lines = draft("--output", tmp_path / "run").err.splitlines()
    assert "collecting outputs: 9 of 9" in lines
    assert any(re.fullmatch(r"distilling: 3 of 3, loss \d\.\d{3}", line) for line in lines)
    assert not any("resuming" in line for line in lines)


def test_the_same_command_resumes(draft, tmp_path):
    first = draft("--output", tmp_path / "run")
    again = draft("--output", tmp_path / "run")
    assert (first.code, again.code) == (0, 0)
    assert again.out == first.out
    assert again.err.splitlines()[:4] == [
        "resuming: writing prompts, 3 of 3 are there",
        "resuming: collecting outputs, 9 of 9 are there",
        "resuming: design, already done",
        "resuming: initialise, already done",
    ]


def test_an_interrupted_run_keeps_what_is_finished(draft, tmp_path, monkeypatch):
    from foretoken.training.draft import maker

    def interrupted(*_arguments, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr(maker, "distil", interrupted)
    done = draft("--output", tmp_path / "run")
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        "interrupted: what is finished is kept; the same command goes on from there"
    )
    monkeypatch.undo()
    assert draft("--output", tmp_path / "run").code == 0


# -- help and errors -----------------------------------------------------------------------------


def test_help(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert "draft" in cli("train").out
    text = cli("train", "draft", "--help").out
    assert "foretoken train draft --output draft" in text
    defaults = DraftSettings()
    for name in ("num_prompts", "max_new_tokens", "minutes", "batch_size", "learning_rate", "seed"):
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} .*\(default {getattr(defaults, name):g}\)", text), option
    assert f"{defaults.loss} (default)" in text
    assert f"{defaults.method} (default)" in text
    assert re.search(r"--on-policy .*\(default 0\)", text)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from foretoken.cli.main import run; run(['train', 'draft', '--help']); "
        f"print('heavy:', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--layers", "many"], "'many' is not an integer", "train --help"),
        (["--layers", "99"], "layers", "shape"),
        (["--hidden", "-8"], "hidden", "the sizes are layers"),
        (["--loss", "mse"], "no loss 'mse'; there are forward-kl", "--loss"),
        (["--method", "guess"], "begins by prune or scratch; got 'guess'", "--method"),
        (["--on-policy", "2"], "on_policy is a share from 0 to 1; got 2", "--on-policy"),
        (["--minutes", "0"], "minutes is a number above 0", "--minutes"),
        (["--steps", "0"], "steps is an integer >= 1; got 0", "--steps"),
        (["--learning-rate", "0"], "learning_rate is a number above 0", "--learning-rate"),
        (["--precision", "int8"], "precision is auto, float32 or bfloat16; got 'int8'", "preci"),
        (["--temperature", "-1"], "temperature is a number", "temperature"),
        (["--device", "pocket"], "device 'pocket' cannot be used", "cpu"),
        (["--model", "storys"], "no model 'storys'", "did you mean 'stories'?"),
        (["--prompts", "none.txt"], "input none.txt cannot be read", "check the path"),
        (["--layer", "3"], "no such option: --layer", "did you mean --layers?"),
    ],
)
def test_errors_are_two_lines(draft, tmp_path, arguments, message, hint):
    done = draft("--output", tmp_path / "run", *arguments)
    error_line, hint_line = done.err.splitlines()
    assert done.code == 2
    assert message in error_line
    assert hint_line.startswith("hint: ")
    assert hint in hint_line
    assert not (tmp_path / "run").exists()


def test_a_target_of_another_family(draft, models_on_disk, tmp_path):
    """Nothing can be cut from it, but a Llama from scratch learns from it."""
    target = ("--model", models_on_disk.draft)  # a GPT-2
    refused = draft(*target, "--output", tmp_path / "run")
    assert refused.code == 2
    assert "drafts are cut from models of type llama" in refused.err
    assert "got 'gpt2'" in refused.err
    hint = refused.err.splitlines()[-1]
    assert "--method scratch" in hint
    some = draft(*target, "--method", "scratch", "--output", tmp_path / "run")
    assert some.code == 2
    assert "shape" in some.err
    assert "Error" not in some.err
    sizes = {"--hidden": 8, "--heads": 2, "--kv-heads": 2, "--head-dim": 4, "--intermediate": 8}
    given = [part for size in sizes.items() for part in size]
    done = draft(*target, "--method", "scratch", *given, "--output", tmp_path / "run")
    assert done.code == 0
    assert "verified: the same tokens as plain decoding" in done.out


def test_a_rate_that_is_too_high_ends_in_two_lines(draft, tmp_path):
    done = draft("--output", tmp_path / "run", "--learning-rate", "1e38", "--steps", 80)
    assert done.code == 2
    *_, error_line, hint_line = done.err.splitlines()
    assert "training cannot go on" in error_line
    assert hint_line == "hint: lower the learning rate"


def test_other_settings_are_an_error(draft, tmp_path):
    assert draft("--output", tmp_path / "run").code == 0
    done = draft("--output", tmp_path / "run", "--loss", "tv")
    assert done.code == 2
    assert 'holds a run with other settings: loss "forward-kl", now "tv"' in done.err


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bits(draft, models_on_disk, tmp_path):
    """SIGKILL between two checkpoints: no handler runs, nothing is flushed."""
    more = ("--steps", 400)
    command = [
        sys.executable, "-m", "foretoken", "train", "draft", "--model", models_on_disk.target,
        "--prompts", tmp_path / "prompts.txt", *TINY, *more, "--output", tmp_path / "killed",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "draft.checkpoint"
    deadline_s = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "draft").exists()

    resumed = draft("--output", tmp_path / "killed", *more)
    assert "resuming: distilling goes on from its checkpoint" in resumed.err
    assert draft("--output", tmp_path / "whole", *more).code == 0
    weights = [
        (tmp_path / name / "draft" / "model.safetensors").read_bytes()
        for name in ("killed", "whole")
    ]
    assert weights[0] == weights[1]
