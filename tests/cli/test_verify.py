"""`foretoken verify`: verdicts, reports and exit codes."""

import json

import pytest

from foretoken.certify.certificate import Certification
from foretoken.certify.settings import FALSE_ALARM
from tests.certify.rules import (
    BROKEN_RULES,
    broken_rules,  # noqa: F401 - a fixture
)

# As little work as shows something: part one on two prompts, some hundred drawn tokens.
SMALL = ("--num-prompts", 2, "--max-new-tokens", 8, "--samples", 64, "--threads", 1)


@pytest.fixture
def verify(cli, monkeypatch):
    """Run `foretoken verify` on the embedded pair with little work."""

    def run_here(*arguments):
        words = ["verify", *SMALL, *arguments]
        monkeypatch.setattr("sys.argv", ["foretoken", *map(str, words)])
        return cli(*words)

    return run_here


def test_the_embedded_pair_passes(verify):
    done = verify()
    assert (done.code, done.err) == (0, "")
    first, *rest = done.out.splitlines()
    assert first == "PASS  the tokens of plain decoding, from the same bits"
    text = "\n".join(rest)
    assert "greedy: speculative, 8 at once" in text
    assert "temperature 0.8: speculative, alone" in text
    assert "640 tokens of 64 texts against the target's distribution" in text
    assert f"with probability {FALSE_ALARM:g} at most" in text


def test_json_is_one_object(verify):
    done = verify("--format", "json", "--seed", 5, "--temperature", 1)
    record = json.loads(done.out, parse_constant=pytest.fail)  # neither NaN nor Infinity
    assert done.code == 0
    assert (record["what"], record["verdict"], record["exactness"]) == (
        "foretoken verify",
        "pass",
        "bitwise",
    )
    assert record["work"]["temperatures"] == [1.0]
    assert record["work"]["seed"] == 5
    subject = record["subject"]
    assert subject["model"] == "stories"
    assert subject["command"].startswith("foretoken verify --num-prompts 2")
    assert {"torch", "python"} <= set(subject["environment"])
    [entry] = record["distribution"]
    assert entry["num_texts"] == 64
    assert all(test["detectable_distance"] <= 1 for test in entry["tests"])


def test_a_broken_rule_fails_with_an_explanation(verify):
    assert "broken-TakesNearMisses" in BROKEN_RULES
    done = verify("--verifier", "broken-TakesNearMisses", "--max-new-tokens", 32)
    assert done.code == 1
    assert done.out.startswith("FAIL  exactness bitwise does not hold")
    assert "texts are not plain decoding's" in done.out
    assert "the row here ranks another token first: the rule did not take it" in done.out
    assert "openings" in done.out or "line" in done.out
    assert "seed" in done.out


def test_a_broken_rule_fails_by_its_distribution(verify):
    done = verify("--verifier", "broken-AcceptsAlways", "--samples", 512, "--format", "json")
    assert done.code == 1
    record = json.loads(done.out)
    assert any("the drafter favours" in reason for reason in record["reasons"])


def test_a_lossy_rule_needs_permission(verify):
    refused = verify("--verifier", "typical")
    assert refused.code == 1
    assert "the rule is lossy by its own account" in refused.out
    allowed = verify("--verifier", "typical", "--allow-lossy")
    assert allowed.code == 0
    assert allowed.out.startswith("PASS  lossy, as allowed")
    assert "total variation distance, likeliest first: at least" in allowed.out


def test_own_prompts_with_their_own_controls(verify, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "One day", "seed": 9, "frequency_penalty": 0.5},
        {"prompt": "Lily saw a dog", "temperature": 0.3},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = verify("--input", prompts, "--format", "json", "--top-p", 0.95)
    record = json.loads(done.out)
    assert done.code == 0
    assert record["work"]["temperatures"] == [0.0, 0.8, 0.3]
    counts = {
        (item["temperature"], item["is_speculative"], item["batch_size"]): item["num_texts"]
        for item in record["identity"]["comparisons"]
    }
    assert counts[0.8, True, 1] == 2  # one prompt, two seeds
    assert counts[0.3, True, 1] == 2
    assert str(tmp_path) not in done.out


def test_controls_of_every_kind(verify):
    done = verify(
        "One day", "--regex", "[a-z ,.]{20,40}", "--top-k", 40, "--min-p", 0.01,
        "--no-repeat-ngram-size", 3, "--logit-bias", '{"5": 2}', "--verifier", "naive",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    assert "1 prompt, up to 8 tokens each" in done.out


def test_a_file_gets_the_certificate(verify, tmp_path):
    path = tmp_path / "certificate.json"
    done = verify("--format", "json", "--output", path)
    assert (done.code, done.out) == (0, "")
    assert done.err == f"pass: written to {path}\n"
    assert json.loads(path.read_text())["verdict"] == "pass"
    again = verify("--output", path)
    assert again.code == 2
    assert "exists" in again.err
    assert verify("--output", path, "--force").code == 0
    assert path.read_text().startswith("PASS")


def test_interrupted_gives_what_is_finished(verify, monkeypatch):
    run = Certification.run

    def interrupted(self, report):
        def stop(progress):
            if progress.done == 3:
                raise KeyboardInterrupt

        run(self, stop)

    monkeypatch.setattr(Certification, "run", interrupted)
    done = verify()
    assert done.code == 130
    assert done.err == "interrupted\n"
    assert done.out.startswith("INCOMPLETE  interrupted; this was finished")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", 0), "samples is an integer >= 1; got 0"),
        (("--batch-size", -1), "batch-size is an integer >= 1; got -1"),
        (("--seed", -1), "seed is an integer >= 0; got -1"),
        (("--temperature", -1), "temperature is a number"),
        (("--verifier", "couplet"), "unknown verifier 'couplet'"),
        (("--max-new-tokens", 0), "max_new_tokens is an integer >= 1; got 0"),
        (("--input", "nowhere.txt"), "cannot be read"),
    ],
)
def test_usage_errors(verify, arguments, message):
    done = verify(*arguments)
    assert done.code == 2
    assert done.out == ""
    error, hint = done.err.splitlines()
    assert message in error
    assert hint.startswith("hint: ")


def test_an_own_model_without_a_draft_model(cli, models_on_disk):
    done = cli("verify", "--model", models_on_disk.target, "Hello", *SMALL, "--format", "json")
    record = json.loads(done.out)
    assert (done.code, record["verdict"]) == (0, "pass")
    assert record["subject"]["model"] == "target"
    assert record["subject"]["drafters"] == ["auto"]
