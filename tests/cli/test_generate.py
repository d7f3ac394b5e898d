"""`foretoken generate` from the command line to its output, on tiny random models."""

import json
import os
import pty
import re
import signal
import sys
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest

from foretoken import LLM
from foretoken.cli import work
from foretoken.cli.main import run
from foretoken.cli.summary import Run, describe_comparison
from foretoken.core.verdict import Exactness
from foretoken.errors import ForetokenError
from tests.cli.conftest import ALPHABET, byte_tokenizer
from tests.engines import greedy
from tests.looped import make_looped

STATISTICS = re.compile(
    r"(\d+ prompts, )?\d+ tokens? in \d+ steps?: \d+\.\d tokens per step, "
    r"(\d+ % of \d+ draft tokens? accepted|no draft tokens), \d+\.\d tokens/s \(.*\)"
)


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def plain_ids(models_on_disk, prompt, num_tokens):
    [output] = LLM(models_on_disk.target, drafters="none").generate(prompt)
    return output.token_ids[:num_tokens]


# -- what comes out ------------------------------------------------------------------------------


def test_text_is_prompt_and_continuation(generate):
    result = generate("Once", "--max-new-tokens", 8)
    assert result.code == 0
    assert result.out.startswith("Once")
    assert result.out.endswith("\n")
    assert "\x1b[32m" not in result.out
    [line] = result.err.splitlines()
    assert STATISTICS.fullmatch(line)
    assert line.startswith("8 tokens in ")
    assert line.endswith("(greedy, exactness bitwise)")


def test_json_is_one_object(generate, models_on_disk):
    result = generate("Once", "--max-new-tokens", 8, "--format", "json", "--seed", 5)
    [record] = records(result.out)
    assert list(record) == [
        "prompt", "text", "token_ids", "finish_reason", "seed", "exactness", "stats"
    ]  # fmt: skip
    assert record["prompt"] == "Once"
    assert record["token_ids"] == plain_ids(models_on_disk, "Once", 8)
    assert record["finish_reason"] == "length"
    assert record["seed"] == 5
    assert record["stats"]["num_steps"] >= 1
    assert STATISTICS.fullmatch(result.err.strip())


def test_a_reported_seed_repeats_the_output(generate):
    sampled = ("Once", "--max-new-tokens", 12, "--format", "json", "--temperature", 1)
    [first] = records(generate(*sampled).out)
    [again] = records(generate(*sampled, "--seed", first["seed"], "--drafter", "none").out)
    assert again["token_ids"] == first["token_ids"]
    statistics = generate(*sampled, "--seed", 7, "--top-p", 0.5).err
    assert "(temperature 1, seed 7, exactness bitwise)" in statistics


def test_every_sampling_option_reaches_the_request(generate, monkeypatch):
    seen = []
    plain_check = LLM.check_prompt

    def check_prompt(self, prompt, params):
        seen.append(params)
        plain_check(self, prompt, params)

    monkeypatch.setattr(LLM, "check_prompt", check_prompt)
    options = {
        "max_new_tokens": 3, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": 11,
        "min_new_tokens": 2, "typical_p": 0.8, "top_h": 0.7, "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02, "no_repeat_ngram_size": 3, "logprobs": 2, "prompt_logprobs": 1,
        "logprobs_mode": "processed", "regex": "[a-z]+",
    }  # fmt: skip
    by_json = {
        "sequence_bias": [[[7, 8], -1.5]], "bad_words_ids": [[42], [7, 8]],
        "allowed_token_ids": list(range(200)), "suppress_tokens": [3, 4],
    }  # fmt: skip
    arguments = [
        text
        for name, value in {
            **options,
            **{key: json.dumps(value) for key, value in by_json.items()},
            "logit_bias": '{"4": -2}',
        }.items()
        for text in (f"--{name.replace('_', '-')}", value)
    ]
    more = ("--stop", "x", "--stop", "yz", "--stop-token-id", 5, "--stop-token-id", 6)
    result = generate("a", *arguments, *more, "--ignore-eos", "--format", "json")
    assert result.code == 0, result.err
    [params] = seen
    assert {name: getattr(params, name) for name in options} == options
    assert params.stop == ("x", "yz")
    assert params.logit_bias == {4: -2.0}
    assert params.sequence_bias == (((7, 8), -1.5),)
    assert params.bad_words_ids == ((42,), (7, 8))
    assert params.allowed_token_ids == tuple(range(200))
    assert params.suppress_tokens == (3, 4)
    assert params.stop_token_ids == (5, 6)
    assert params.ignore_eos


@pytest.mark.parametrize(
    "arguments",
    [("--json-schema", '{"type": "boolean"}'), ("--json-schema", "FILE"), ("--grammar", "FILE")],
    ids=["schema", "schema file", "grammar file"],
)
def test_structured_output(generate, tmp_path, arguments):
    option, value = arguments
    if value == "FILE":
        value = tmp_path / "structure"
        is_schema = option == "--json-schema"
        value.write_text('{"type": "boolean"}' if is_schema else 'start: "true" | "false"')
    result = generate("Is it?", option, value, "--max-new-tokens", 9, "--format", "json")
    assert result.code == 0, result.err
    [record] = records(result.out)
    assert record["text"].strip() in ("true", "false")


def test_log_probabilities_of_output_and_prompt(generate):
    asked = ("--logprobs", 2, "--prompt-logprobs", 0, "--format", "json")
    result = generate("Once", "--max-new-tokens", 3, *asked, "--suppress-tokens", "[3]")
    [record] = records(result.out)
    entries = record["logprobs"]
    assert [entry["id"] for entry in entries] == record["token_ids"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2, 2]
    assert all(entry["logprob"] <= 0 for entry in entries)
    assert "".join(entry["token"] for entry in record["prompt_logprobs"]) == "nce"
    processed = generate(
        "Once", "--max-new-tokens", 1, *asked, "--allowed-token-ids", "[3]",
        "--logprobs-mode", "processed",
    )  # fmt: skip
    [entry] = records(processed.out)[0]["logprobs"]
    assert (entry["id"], entry["logprob"]) == (3, 0)
    assert [other["logprob"] for other in entry["top_logprobs"]] == [0, -9999]


def test_log_probabilities_need_json(generate):
    result = generate("Once", "--logprobs", 1)
    assert result.code == 2
    assert result.err == (
        "error: log-probabilities are written as JSON only; the format is text\n"
        "hint: add --format json\n"
    )


@pytest.mark.parametrize("format_name", ["text", "json"])
def test_a_request_that_fails_leaves_the_others_whole(generate, tmp_path, format_name):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "one", "no_repeat_ngram_size": 1, "allowed_token_ids": [65, 66]}\n'
        '{"prompt": "two"}\n'
    )
    result = generate("--input", prompts, "--max-new-tokens", 5, "--format", format_name)
    assert result.code == 1
    error, hint = result.err.splitlines()[-2:]
    assert error.startswith(f"error: {prompts}, line 1: no token is left to choose after 5 tokens")
    assert hint == "hint: relax a control"
    if format_name == "json":
        failed, whole = records(result.out)
        assert failed["finish_reason"] == "error"
        assert sorted(failed["token_ids"]) == [65, 66]
        assert "no token is left" in failed["error"]["message"]
        assert whole["finish_reason"] == "length"
        assert "error" not in whole


def test_one_streamed_request_that_fails(generate):
    banned = ("--no-repeat-ngram-size", 1, "--allowed-token-ids", "[65, 66]")
    result = generate("one", "--max-new-tokens", 5, *banned)
    assert result.code == 1
    assert result.out.startswith("one")
    assert result.err.splitlines()[-2].startswith("error: no token is left to choose after 5 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bad-words-ids", "[1"), "error: --bad-words-ids is not JSON"),
        (("--bad-words-ids", "[1]"), "error: bad_words_ids is a list of non-empty lists"),
        (("--json-schema", "nowhere.json"), "error: schema file 'nowhere.json' cannot be read"),
        (("--grammar", "nowhere.lark"), "error: grammar file 'nowhere.lark' cannot be read"),
        (("--regex", "a", "--json-schema", "{}"), "error: at most one of json_schema, regex, lark"),
        (("--min-new-tokens", "9", "--max-new-tokens", "8"), "error: min_new_tokens is at most"),
        (("--suppress-tokens", "[999]"), "error: token id 999 in suppress_tokens is outside"),
    ],
)
def test_wrong_controls_are_two_lines(generate, arguments, message):
    result = generate("Once", *arguments)
    assert result.code == 2
    error, hint = result.err.splitlines()
    assert error.startswith(message)
    assert hint.startswith("hint: ")


def test_draft_model_and_plan(generate, models_on_disk, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"drafters": [f"draft-model:path={models_on_disk.draft}"]}))
    common = ("Once", "--max-new-tokens", 8, "--format", "json", "--plan", plan)
    [planned] = records(generate(*common).out)
    assert planned["stats"]["num_draft_tokens"] > 0
    [without] = records(generate(*common, "--drafter", "none").out)
    assert without["stats"]["num_draft_tokens"] == 0
    [also_without] = records(generate(*common, "--max-nodes", 0).out)
    assert also_without["stats"]["num_draft_tokens"] == 0
    assert planned["token_ids"] == without["token_ids"] == also_without["token_ids"]


def test_a_reference_saves_steps_and_changes_no_token(generate, models_on_disk, tmp_path):
    [plain] = LLM(models_on_disk.target, drafters="none").generate("Once", greedy(40))
    reference = tmp_path / "reference.txt"
    reference.write_text(f"Once{plain.text}", encoding="utf-8")
    common = ("--max-new-tokens", 40, "--format", "json", "--drafter", "reference")
    [alone] = records(generate("Once", *common).out)
    [record] = records(generate("Once", *common, "--reference", reference).out)
    assert record["token_ids"] == alone["token_ids"] == plain.token_ids
    assert record["stats"]["num_steps"] < alone["stats"]["num_steps"] == 40
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Once"}, {"prompt": "Once", "reference": f"Once{plain.text}"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    first, second = records(generate("--input", prompts, *common).out)
    assert first["stats"]["num_draft_tokens"] == 0
    assert second["stats"]["num_steps"] == record["stats"]["num_steps"]


def test_what_a_drafter_learned_is_there_in_the_next_run(generate, tmp_path):
    drafter = f"token-recycling:path={tmp_path / 'successors'}"
    common = ("Once", "--max-new-tokens", 20, "--format", "json", "--drafter", drafter)
    [[first], [second]] = [records(generate(*common).out) for _ in range(2)]
    assert first["token_ids"] == second["token_ids"]
    assert second["stats"]["num_steps"] < first["stats"]["num_steps"]


def test_a_streamed_prompt_has_its_reference_too(generate, tmp_path):
    reference = tmp_path / "reference.txt"
    reference.write_text("Once", encoding="utf-8")
    common = ("O", "--max-new-tokens", 4, "--drafter", "reference")
    assert "no draft tokens" in generate(*common).err
    assert "no draft tokens" not in generate(*common, "--reference", reference, "--compare").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reference", "a.txt", "--drafter", "none"), "--reference is for drafters, and there"),
        (
            ("--reference", "nowhere.txt", "--drafter", "reference"),
            "reference file 'nowhere.txt' cannot be read: No such file",
        ),
    ],
)
def test_a_reference_that_nobody_can_copy_from_is_refused(generate, arguments, message):
    result = generate("Once", *arguments)
    assert result.code == 2
    error, hint = result.err.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")


def test_several_prompts_keep_their_order(generate, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "long", "max_new_tokens": 20}\n{"prompt": "short", "max_new_tokens": 2}\n'
        '{"prompt_ids": [65, 66], "max_new_tokens": 5}\n'
    )
    result = generate("first", "--input", prompts, "--format", "json", "--max-new-tokens", 9)
    assert [len(record["token_ids"]) for record in records(result.out)] == [9, 20, 2, 5]
    assert [record["prompt"] for record in records(result.out)][:3] == ["first", "long", "short"]
    assert result.err.startswith("4 prompts, 36 tokens in ")


def test_several_prompts_as_text_have_headings(generate):
    result = generate("one", "two", "--max-new-tokens", 3)
    assert result.out.startswith("--- 1 of 2 ---\none")
    assert "\n--- 2 of 2 ---\ntwo" in result.out


def test_output_file(generate, tmp_path):
    path = tmp_path / "out.jsonl"
    arguments = ("a", "b", "--max-new-tokens", 3, "--format", "json", "--output", path)
    result = generate(*arguments)
    assert (result.code, result.out) == (0, "")
    assert [record["prompt"] for record in records(path.read_text())] == ["a", "b"]
    before = path.read_text()
    refused = generate(*arguments)
    assert refused.code == 2
    assert "exists" in refused.err
    assert path.read_text() == before
    assert generate(*arguments, "--force").code == 0


def test_compare_finds_the_same_tokens(generate):
    result = generate("a", "b", "--max-new-tokens", 12, "--compare", "--temperature", 0.7)
    statistics, comparison = result.err.splitlines()
    assert result.code == 0
    assert STATISTICS.fullmatch(statistics)
    assert re.fullmatch(
        r"plain decoding: \d+\.\d tokens/s, the same tokens; drafting is \d+\.\d\d times as fast",
        comparison,
    )


def test_compare_says_when_tokens_differ(generate, monkeypatch):
    plain_outputs = work._outputs

    def outputs(llm, jobs, *, drafters=None):
        for output in plain_outputs(llm, jobs, drafters=drafters):
            if drafters == ():
                output.token_ids[2] ^= 1
            yield output

    monkeypatch.setattr(work, "_outputs", outputs)
    result = generate("a", "--max-new-tokens", 5, "--compare")
    _, error, hint = result.err.splitlines()
    assert result.code == 1
    assert error == (
        "error: plain decoding gave other tokens for 1 of 1 prompt; first at output token 3 of "
        "prompt 1"
    )
    assert hint == "hint: report it: this must not happen"


@pytest.mark.parametrize("level", list(Exactness))
def test_only_exactness_that_promises_the_same_tokens_is_held_to_it(level):
    def run_of(token_ids):
        stats = SimpleNamespace(num_tokens=2)
        output = SimpleNamespace(index=0, token_ids=token_ids, exactness=level, stats=stats)
        return Run([output], elapsed_s=1.0)

    assert "the same tokens" in describe_comparison(run_of([1, 2]), run_of([1, 2]))
    if level in (Exactness.BITWISE, Exactness.NUMERICAL):
        with pytest.raises(ForetokenError, match="first at output token 2"):
            describe_comparison(run_of([1, 2]), run_of([1]))
    else:
        assert "other tokens" in describe_comparison(run_of([1, 2]), run_of([1, 3]))


# -- on a terminal -------------------------------------------------------------------------------


def on_terminal(monkeypatch, *arguments):
    """Run with both output streams on a terminal; return exit code and what it showed."""
    shown = []
    main_end, program_end = pty.openpty()

    def collect():
        while data := read_or_nothing(main_end):
            shown.append(data)

    reader = threading.Thread(target=collect)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(program_end, "w", encoding="utf-8") as terminal:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        code = run(["generate", *map(str, arguments)])
    reader.join()
    os.close(main_end)
    return code, b"".join(shown).decode()


def read_or_nothing(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""


@pytest.fixture
def terminal(monkeypatch, models_on_disk):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    # The draft is the target itself, so that it is always right.
    drafter = f"draft-model:path={models_on_disk.target}"

    def run_there(*arguments):
        common = ("--model", models_on_disk.target, "--drafter", drafter, "--max-new-tokens", 9)
        return on_terminal(monkeypatch, *common, *arguments)

    return run_there


def test_terminal_shows_accepted_tokens_in_colour(terminal):
    code, shown = terminal("Once")
    assert code == 0
    assert "\x1b[1mOnce\x1b[0m\x1b[32m" in shown
    assert re.search(r"\x1b\[32m\d+ % of \d+ draft tokens accepted\x1b\[0m", shown)


def test_terminal_without_colours(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    _, shown = terminal("Once")
    assert "Once" in shown
    assert "\x1b[1m" not in shown
    assert "\x1b[32m" not in shown


def test_terminal_shows_a_bar_for_several_prompts(terminal, tmp_path):
    path = tmp_path / "out.txt"
    code, shown = terminal("one", "two", "three", "--output", path)
    assert code == 0
    assert "loading" in shown
    assert "3/3" in shown
    assert path.read_text(encoding="utf-8").count("---\n") == 3
    code, shown = terminal("one", "two", "--format", "json")
    found = [line for line in shown.splitlines() if '"prompt": "two"' in line]
    assert code == 0
    assert len(found) == 1


def test_terminal_shows_errors_in_colour(terminal):
    code, shown = terminal("")
    assert code == 2
    assert shown.startswith("\x1b[1;31merror:\x1b[0m the prompt is empty")


# -- interrupted ---------------------------------------------------------------------------------


def test_an_interrupt_keeps_what_is_finished(generate, monkeypatch, tmp_path):
    """Results that wait for an earlier prompt are finished too."""
    plain_outputs = work._outputs

    def outputs(llm, jobs, *, drafters=None):
        finished = sorted(plain_outputs(llm, jobs), key=lambda output: output.index)
        yield finished[0]
        yield finished[2]
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "_outputs", outputs)
    path = tmp_path / "out.jsonl"
    result = generate(
        "a", "b", "c", "d", "--max-new-tokens", 2, "--format", "json", "--output", path
    )
    assert (result.code, result.err) == (130, "interrupted: 2 of 4 prompts finished\n")
    assert [record["prompt"] for record in records(path.read_text())] == ["a", "c"]


def test_an_interrupt_before_the_first_result_leaves_no_file(generate, monkeypatch, tmp_path):
    def check_prompt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "check_prompt", check_prompt)
    result = generate("a", "--output", tmp_path / "out.txt")
    assert (result.code, result.err) == (130, "interrupted: 0 of 1 prompts finished\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _default_sigint():
    """Make Ctrl-C an interrupt even where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_default_sigint")
def test_ctrl_c(cli, models_on_disk, tmp_path):
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(
        '{"prompt": "short", "max_new_tokens": 2}\n{"prompt": "long", "max_new_tokens": 190000}\n'
    )
    is_over = threading.Event()

    def interrupt_after_the_first_result():
        while not is_over.wait(0.05):
            if path.exists() and path.read_text().endswith("\n"):
                signal.raise_signal(signal.SIGINT)
                is_over.wait(30)  # and again, as anybody would, if Python lost it in a callback

    watcher = threading.Thread(target=interrupt_after_the_first_result)
    watcher.start()
    arguments = ("--input", prompts, "--format", "json", "--output", path)
    result = cli("generate", "--model", models_on_disk.long, *arguments)
    is_over.set()
    watcher.join()
    assert (result.code, result.out) == (130, "")
    assert result.err == "interrupted: 1 of 2 prompts finished\n"
    assert [record["prompt"] for record in records(path.read_text())] == ["short"]


def test_a_closed_pipe_is_quiet(models_on_disk, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    pipe = os.fdopen(writer, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        code = run(
            ["generate", "a", "b", "--max-new-tokens", "2", "--model", models_on_disk.target]
        )
    with suppress(BrokenPipeError):
        pipe.close()
    assert code == 1
    assert capfd.readouterr().err == ""


# -- bad input -----------------------------------------------------------------------------------


def assert_two_lines(result, message, hint="", code=2):
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert message in lines[0]
    assert hint in lines[1]
    assert (result.code, result.out) == (code, "")


NUMBERS = {
    "--max-new-tokens": "0",
    "--temperature": "-1",
    "--top-k": "-1",
    "--top-p": "0",
    "--min-p": "1.5",
    "--repetition-penalty": "0",
    "--presence-penalty": "2.5",
    "--frequency-penalty": "nan",
    "--seed": "-1",
    "--max-nodes": "-1",
    "--threads": "0",
}


@pytest.mark.parametrize(("option", "value"), NUMBERS.items())
def test_numbers_out_of_range(generate, tmp_path, option, value):
    result = generate("a", option, value, "--output", tmp_path / "out")
    assert_two_lines(result, option.removeprefix("--").replace("-", "_"), "change")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["a", "--model", "./missing"], "'./missing' does not exist", "check the path"),
        (["a", "--model", "{tmp}/t5"], "'t5' is not a causal language model", "AutoModelForCausal"),
        (["a", "--drafter", "draft-model:path={stranger}"], "vocabularies differ", "same family"),
        (["a", "--drafter", "promt-lookup"], "unknown drafter", "did you mean 'prompt-lookup'?"),
        (["a", "--drafter", "auto", "--drafter", "none"], "auto and none stand alone", ""),
        (["a", "--drafter", "draft-model"], "needs the option 'path'", "draft-model:path="),
        (["a", "--drafter", "prompt-lookup:max=3"], "unknown option of prompt-lookup", ""),
        (["a", "--drafter", "draft-model:path={draft},max_depth=x"], "an integer; got 'x'", ""),
        (["a", "--drafter", "prompt-lookup:3"], "options are written key=value", ""),
        (["a", "--verifier", "cuopled"], "unknown verifier", "did you mean 'coupled'?"),
        (["a", "--dtype", "float31"], "dtype is auto or one of", "change dtype"),
        (["a", "--device", "toaster"], "device 'toaster' cannot be used", "cpu"),
        (["a", "--stop", ""], "stop holds texts of at least one character", "leave"),
        (["a", "--logit-bias", "{{1: 2"], "--logit-bias is not JSON", "write it as"),
        (["a", "--logit-bias", "[1]"], "logit_bias maps token ids", "write it as"),
        (
            ["a", "--logit-bias", '{{"999": 1}}'],
            "token id 999 in logit_bias is outside",
            "logit_bias",
        ),
        (["a", "--plan", "{tmp}/missing"], "cannot be read: No such file", "check the path"),
        (["a", "--plan", "{tmp}/list.json"], "holds a JSON list", "write"),
        (["a", "--plan", "{tmp}/typo.json"], "unknown plan entry 'drafter'", "'drafters'"),
        (["a", "--plan", "{tmp}/bad.json"], "drafters are a list of texts", "auto"),
        (["a" * 128], "the prompt has 128 tokens", "shorten"),
        (["a", "b" * 200], "prompt 2: the prompt has 200 tokens", "shorten"),
        (
            ["--input", "{tmp}/ids.jsonl"],
            "ids.jsonl, line 2: token id 999 in the prompt is outside",
            "check",
        ),
        (["--input", "{tmp}/typo.jsonl"], "typo.jsonl, line 1: unknown key", "'temperature'"),
        (["--input", "{tmp}/missing.txt"], "missing.txt cannot be read", "check the path"),
        ([], "there is no prompt", "--input"),
        ([""], "the prompt is empty", "at least one character"),
    ],
)
def test_bad_input(generate, models_on_disk, tmp_path, arguments, message, hint):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "typo.json").write_text('{"drafter": "none"}')
    (tmp_path / "bad.json").write_text('{"drafters": [1]}')
    (tmp_path / "ids.jsonl").write_text('{"prompt_ids": [1]}\n{"prompt_ids": [999]}\n')
    (tmp_path / "typo.jsonl").write_text('{"prompt": "a", "temprature": 1}\n')
    given = [text.format(tmp=tmp_path, **vars(models_on_disk)) for text in arguments]
    result = generate(*given, "--output", tmp_path / "out")
    assert_two_lines(result, message, hint)
    assert not (tmp_path / "out").exists()


def test_no_space_left(generate):
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("no /dev/full here")
    arguments = ("a", "b", "--max-new-tokens", 2, "--output", "/dev/full")
    assert_two_lines(generate(*arguments), "No space left on device", "make room")


# -- loop by loop --------------------------------------------------------------------------------


def test_a_target_that_shares_its_layers_says_the_same_with_tokens_in_flight(cli, tmp_path):
    make_looped(tmp_path, loops=4, vocab=len(ALPHABET) + 1)
    byte_tokenizer(ALPHABET).save_pretrained(tmp_path)
    arguments = ["generate", "--model", tmp_path, "Once", "--max-new-tokens", 24]
    arguments += ["--format", "json", "--temperature", 0.8, "--seed", 3]
    plain, looped = (cli(*arguments, "--drafter", name) for name in ("none", "speed:exit_loop=1"))
    assert (plain.code, looped.code) == (0, 0), looped.err
    [expected], [found] = records(plain.out), records(looped.out)
    assert found["token_ids"] == expected["token_ids"]
    assert found["exactness"] == "bitwise"
    assert found["stats"]["num_accepted"] > 0
    assert found["stats"]["num_steps"] < expected["stats"]["num_steps"]


def test_speed_says_why_it_cannot_help_a_target_whose_layers_differ(generate):
    result = generate("Once", "--drafter", "speed")
    assert result.code == 2
    assert "needs a target that runs a group of layers several times" in result.err
    assert "early-exit" in result.err
