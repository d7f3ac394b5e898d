"""`foretoken datastore build`: from files to drafts, and what it refuses."""

import pytest

from foretoken.drafters.datastore import Datastore
from foretoken.models.tokenizer import Tokenizer


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for path, text in zip(paths, ("to be or not to be", "that is the question"), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


@pytest.fixture
def build(cli, models_on_disk, texts, tmp_path):
    """Build a datastore of the texts; later options win over the earlier ones."""
    output = tmp_path / "datastore"

    def run_here(*arguments, files=texts):
        return cli(
            "datastore", "build", *files, "--model", models_on_disk.target, "--output", output,
            *arguments,
        )  # fmt: skip

    return run_here


def test_a_datastore_is_built_and_drafted_from(build, generate, models_on_disk, tmp_path):
    result = build()
    assert result.code == 0, result.err
    assert "40 tokens of 2 files" in result.err
    tokenizer = Tokenizer.load(models_on_disk.target)
    datastore = Datastore.load(tmp_path / "datastore", 257, tokenizer)
    first, second = tokenizer.encode("to be or not to be"), tokenizer.encode("that is the question")
    assert datastore.tokens.tolist() == [*first, -1, *second, -1]
    spec = f"rest:path={tmp_path / 'datastore'}"
    drafted = generate("to be or", "--drafter", spec, "--max-new-tokens", "8", "--seed", "1")
    plain = generate("to be or", "--drafter", "none", "--max-new-tokens", "8", "--seed", "1")
    assert drafted.code == 0, drafted.err
    assert drafted.out == plain.out


def test_a_datastore_for_another_vocabulary_is_refused(build, cli, models_on_disk, tmp_path):
    assert build("--model", models_on_disk.stranger).code == 0
    spec = f"rest:path={tmp_path / 'datastore'}"
    result = cli("generate", "--model", models_on_disk.target, "--drafter", spec, "to be")
    assert result.code == 2
    assert "was made with another vocabulary than the target's" in result.err
    assert "hint: build it with this model: foretoken datastore build" in result.err


def test_an_existing_file_is_overwritten_only_by_force(build, tmp_path):
    (tmp_path / "datastore").write_text("mine", encoding="utf-8")
    result = build()
    assert result.code == 2
    assert "exists" in result.err
    assert (tmp_path / "datastore").read_text(encoding="utf-8") == "mine"
    assert build("--force").code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"\xff\xfe\x00", "is not UTF-8"), (b"", "got 0")],
)
def test_files_that_cannot_be_used_are_refused(build, tmp_path, content, message):
    path = tmp_path / "it.txt"
    if content is not None:
        path.write_bytes(content)
    result = build(files=[path])
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "datastore").exists()


def test_help_without_a_command(cli):
    assert "build" in cli("datastore").out
    assert "foretoken datastore build docs" in cli("datastore", "build", "--help").out
