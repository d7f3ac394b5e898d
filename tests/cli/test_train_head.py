"""`foretoken train head`: its head, its table, its errors as two lines."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from foretoken.training.heads.kinds import KINDS
from foretoken.training.heads.settings import HeadMachine, HeadSettings
from tests.cli.test_main import HEAVY

TINY = (
    "--num-prompts", 6, "--max-new-tokens", 8, "--steps", 2, "--batch-size", 3, "--threads", 1,
)  # fmt: skip
PROMPTS = "\n".join(f"The {name} " for name in ("cat", "dog", "cow", "hen", "ant", "fox"))


@pytest.fixture
def train_head(cli, models_on_disk, tmp_path):
    """Run `foretoken train head` on a tiny model; later options win over the earlier ones."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)

    def run_here(kind, *arguments):
        model = ("--model", models_on_disk.target, "--prompts", prompts)
        return cli("train", "head", kind, *model, *TINY, *arguments)

    return run_here


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_head_and_its_report(train_head, cli, models_on_disk, tmp_path, kind):
    folder = tmp_path / "run"
    against = ("--against", "prompt-lookup", "--against", "prompt-lookup:max_ngram=2")
    done = train_head(kind, "--output", folder, *against)
    assert done.code == 0, done.err
    assert re.search(rf"^target, {kind} head of [\d,]+ parameters; trained on ", done.out)
    assert re.search(r"drafter +tokens/step +forecast +tokens/s +forecast +speed-up", done.out)
    for name in (kind, "prompt-lookup", "prompt-lookup#2"):
        row = rf"^{name} +\d\.\d\d +\d\.\d\d +\d+ +\d+ +\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]$"
        assert re.search(row, done.out, re.MULTILINE)
    assert max(map(len, done.out.splitlines())) <= 120
    written, served = done.err.splitlines()[-2:]
    assert written == f"written: {folder / 'report.json'}"
    assert served.endswith(f"--drafter {kind}:path={folder / 'head'}")
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"]["threads"] == 1
    assert report["served"][kind]["num_different"] == 0
    assert str(tmp_path) not in json.dumps(report)

    drafter = ("--drafter", f"{kind}:path={folder / 'head'}")
    again = cli("generate", "--model", models_on_disk.target, *drafter, "--compare", "Hi")
    assert again.code == 0
    assert "same tokens" in again.err


def test_the_same_command_goes_on(train_head, tmp_path):
    assert train_head("medusa", "--output", tmp_path / "run").code == 0
    done = train_head("medusa", "--output", tmp_path / "run")
    assert done.code == 0
    assert "resuming: collecting outputs, 9 of 9 are there" in done.err
    assert "resuming: training the head, 2 of 2 are there" in done.err


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(train_head, models_on_disk, tmp_path):
    """A real one, without a chance to tidy up, some steps after its first checkpoint."""
    long = ("--steps", "400", "--batch-size", "2")
    assert train_head("hydra", "--output", tmp_path / "whole", *long).code == 0
    command = [
        sys.executable, "-m", "foretoken", "train", "head", "hydra", "--output", tmp_path / "run",
        "--model", models_on_disk.target, "--prompts", tmp_path / "prompts.txt", *TINY, *long,
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "run" / "head.checkpoint"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "head").exists()
    done = train_head("hydra", "--output", tmp_path / "run", *long)
    assert done.code == 0
    assert "resuming: training the head goes on from its checkpoint" in done.err
    one, other = (
        load_file(tmp_path / it / "head" / "model.safetensors") for it in ("run", "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_options_reach_the_kind(train_head, tmp_path):
    folder = tmp_path / "run"
    done = train_head("medusa", "--output", folder, "--option", "heads=2", "--option", "layers=0")
    assert done.code == 0
    options = json.loads((folder / "head" / "config.json").read_text())["options"]
    assert (options["heads"], options["layers"]) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--option", "heads"), "written key=value; got 'heads'", "--option heads=4"),
        (("--option", "hats=4"), "unknown option of medusa 'hats'", "did you mean 'heads'?"),
        (("--loss", "l2"), "there is no loss 'l2'", "change --loss"),
        (("--steps", "0"), "steps is an integer >= 1; got 0", "change --steps"),
        (("--max-disk", "-1"), "max_disk is a number >= 0", "change --max-disk"),
        (("--states-dtype", "int8"), "got 'int8'", "change --states-dtype"),
        (("--against", "none"), "plain decoding is compared with anyway", "leave it out"),
        (("--against", "suffix:zzz=1"), "unknown option of suffix 'zzz'", "use one of"),
        (("--against", "promt-lookup"), "unknown drafter 'promt-lookup'", "did you mean"),
    ],
)
def test_wrong_options_are_errors(train_head, tmp_path, arguments, message, hint):
    done = train_head("medusa", "--output", tmp_path / "run", *arguments)
    assert done.code == 2
    error_line, hint_line = done.err.splitlines()[-2:]
    assert message in error_line
    assert hint in hint_line
    assert not (tmp_path / "run").exists()


def test_an_unknown_kind_is_an_error(train_head, tmp_path):
    done = train_head("medsua", "--output", tmp_path / "run")
    assert done.code == 2
    assert "unknown kind of head 'medsua'" in done.err
    assert "did you mean 'medusa'?" in done.err


def test_the_help_names_every_kind_and_the_defaults_are_the_settings(cli):
    done = cli("train", "head", "--help")
    text = " ".join(done.out.split())
    assert all(kind in text for kind in KINDS)
    settings, machine = HeadSettings(kind="medusa"), HeadMachine()
    for default in (
        f"default {settings.num_prompts}",
        f"default {settings.epochs:g}",
        f"default {settings.learning_rate:g}",
        f"default {settings.batch_size}",
        f"default {machine.max_nodes}",
        f"default {machine.max_disk_bytes / 1e9:g}",
    ):
        assert default in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from foretoken.cli.main import run; run(['train', 'head', '--help']); "
        f"print('heavy:', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
