"""`foretoken generate` with the models that come along and with third-party ones."""

import json

import pytest

from foretoken.cli.main import run


def generate(capfd, *arguments):
    """Return exit code, standard output and the lines of standard error."""
    capfd.readouterr()
    code = run(["generate", *map(str, arguments)])
    captured = capfd.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_the_embedded_pair_tells_a_story(capfd):
    # Whether drafts pay is for the planner to say; here they are wanted.
    common = ("Once upon a time", "--max-new-tokens", 16, "--compare", "--fixed")
    code, out, err = generate(capfd, *common)
    assert code == 0, err
    assert out.startswith("Once upon a time")
    statistics, comparison = err
    assert " in " in statistics
    assert "draft tokens accepted" in statistics
    assert "the same tokens" in comparison


def test_the_embedded_pair_as_json(capfd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One day\nLily saw a dog\n")
    common = ("--input", prompts, "--max-new-tokens", 12, "--format", "json", "--seed", 3)
    code, out, _ = generate(capfd, *common, "--temperature", 1)
    plain_code, plain_out, _ = generate(capfd, *common, "--temperature", 1, "--drafter", "none")
    assert code == plain_code == 0
    records, plain = ([json.loads(line) for line in text.splitlines()] for text in (out, plain_out))
    assert [record["prompt"] for record in records] == ["One day", "Lily saw a dog"]
    assert [item["token_ids"] for item in records] == [item["token_ids"] for item in plain]


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        ("babyllama105b-hf", "draft-model:path={models}/babyllama105-hf"),
        ("stories260K-hf", "prompt-lookup"),
    ],
)
def test_third_party_models(capfd, shared_data, target, drafter):
    models = shared_data / "models"
    arguments = ("Once upon a time", "--max-new-tokens", 24, "--format", "json", "--compare")
    drafter = drafter.format(models=models)
    code, out, err = generate(capfd, *arguments, "--model", models / target, "--drafter", drafter)
    assert code == 0, err
    record = json.loads(out)
    assert record["stats"]["num_steps"] <= len(record["token_ids"])
    assert len(err) == 2


def test_a_draft_of_another_family_is_refused(capfd, shared_data):
    models = shared_data / "models"
    drafter = f"draft-model:path={models / 'stories260K-hf'}"
    code, out, err = generate(capfd, "Once", "--model", models / "babyllama105b-hf",
                              "--drafter", drafter)  # fmt: skip
    assert (code, out) == (2, "")
    assert err[0].startswith("error: draft and target vocabularies differ")
    assert err[1].startswith("hint: ")
