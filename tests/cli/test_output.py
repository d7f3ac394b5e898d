"""Records: their order, and files that hold whole ones only."""

import errno
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from foretoken.cli.errors import FileError
from foretoken.cli.output import FileSink, OrderedWriter, StdoutSink, as_json, as_text
from foretoken.core.verdict import Exactness
from foretoken.engine.llm import RequestOutput
from foretoken.engine.logprobs import TokenLogprobs
from foretoken.engine.request import FinishReason
from foretoken.engine.stats import RequestStats
from foretoken.errors import ConfigError, RequestError


def output(index, text="b"):
    return RequestOutput(
        index=index,
        prompt="a",
        prompt_ids=[1],
        text=text,
        token_ids=[2, 3],
        finish_reason=FinishReason.STOP,
        seed=2**64 - 1,
        exactness=Exactness.NUMERICAL,
        stats=RequestStats(num_tokens=2, num_steps=1, num_draft_tokens=4, num_accepted=1),
    )


def test_json_record():
    line = as_json(output(0, text='é\n"\u2028'))
    assert line.count("\n") == 1
    record = json.loads(line)
    assert list(record) == [
        "prompt", "text", "token_ids", "finish_reason", "seed", "exactness", "stats"
    ]  # fmt: skip
    assert record["text"] == 'é\n"\u2028'
    assert record["finish_reason"] == "stop"
    assert record["seed"] == 2**64 - 1
    assert record["exactness"] == "numerical"
    assert set(record["stats"]) == {
        "num_steps", "num_draft_tokens", "num_accepted", "tokens_per_step", "prefill_s",
        "decode_s", "tokens_per_s",
    }  # fmt: skip


def test_text_record():
    assert as_text(output(0), 1) == "ab\n"
    assert as_text(output(1), 3) == "--- 2 of 3 ---\nab\n"


def test_control_characters_do_not_reach_a_terminal():
    hostile = output(0, text="\x1b]0;title\x07\n\tfine")
    assert as_text(hostile, 1, on_terminal=True).endswith("␛]0;title␇\n\tfine\n")
    assert "\x1b" in as_text(hostile, 1)


class ListSink(list):
    write = list.append

    def close(self):
        pass


def test_results_are_written_in_the_order_of_the_prompts():
    sink = ListSink()
    writer = OrderedWriter(lambda result: str(result.index), sink)
    for index, written in [(2, ""), (0, "0"), (1, "012"), (5, "012"), (4, "012")]:
        writer.add(SimpleNamespace(index=index))
        assert "".join(sink) == written
    writer.finish()
    assert "".join(sink) == "01245"


def test_file_appears_with_the_first_record(tmp_path):
    path = tmp_path / "out.jsonl"
    sink = FileSink(path, force=False)
    assert list(tmp_path.iterdir()) == []
    sink.write("é\n")
    assert path.read_text(encoding="utf-8") == "é\n"
    sink.write("two\n")
    assert path.read_text(encoding="utf-8") == "é\ntwo\n"
    sink.close()


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists") as caught:
        FileSink(path, force=False)
    assert "--force" in caught.value.hint
    sink = FileSink(path, force=True)
    assert path.read_text() == "mine", "only the first record replaces it"
    sink.write("new")
    sink.close()
    assert path.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out.txt"
    sink = FileSink(path, force=False)
    path.write_text("mine")
    with pytest.raises(FileError, match="File exists"):
        sink.write("new")
    assert path.read_text() == "mine"


def test_a_folder_is_no_output_file(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        FileSink(tmp_path, force=True)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"directory .* does not exist"):
        FileSink(tmp_path / "no" / "out.txt", force=False)


def test_a_folder_that_takes_no_files():
    folder = Path("/proc")  # nobody can create files there, not even root
    if not folder.is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(FileError, match="cannot be written"):
        FileSink(folder / "out.txt", force=False)


class Disk:
    """A file with little space: takes part of a record, then fails."""

    def __init__(self, file, space):
        self._file = file
        self._space = space

    def write(self, data):
        if not self._space:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self._file.write(bytes(data[: self._space]))
        self._space -= count
        return count

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize(("space", "kept"), [(13, "record 1\n"), (9, "record 1\n"), (5, None)])
def test_a_full_disk_leaves_whole_records_only(tmp_path, monkeypatch, space, kept):
    path = tmp_path / "out.txt"
    plain_open = Path.open

    def open_on_full_disk(self, mode="r", **options):
        return Disk(plain_open(self, mode, **options), space)

    sink = FileSink(path, force=False)
    monkeypatch.setattr(Path, "open", open_on_full_disk)
    if kept:
        sink.write("record 1\n")
    with pytest.raises(FileError, match="No space left on device") as caught:
        sink.write("record 2\n")
    sink.close()
    monkeypatch.undo()
    assert caught.value.hint
    assert (path.read_text() if path.exists() else None) == kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device():
    sink = FileSink(Path("/dev/full"), force=False)
    with pytest.raises(FileError, match="No space left on device"):
        sink.write("x")
    sink.close()


def test_a_broken_pipe_is_not_an_error_of_ours(monkeypatch):
    def write(_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write))
    with pytest.raises(BrokenPipeError):
        StdoutSink().write("x")


def test_log_probabilities_are_valid_json():
    entries = [
        TokenLogprobs(2, -0.5, ((2, -0.5), (5, -1.5))),
        TokenLogprobs(3, -math.inf, ((2, 0.0),)),
    ]
    result = replace(output(0), logprobs=entries, prompt_logprobs=[])
    record = json.loads(as_json(result, lambda ids: f"<{ids[0]}>"), parse_constant=pytest.fail)
    assert record["logprobs"] == [
        {
            "token": "<2>",
            "id": 2,
            "logprob": -0.5,
            "top_logprobs": [
                {"token": "<2>", "id": 2, "logprob": -0.5},
                {"token": "<5>", "id": 5, "logprob": -1.5},
            ],
        },
        {
            "token": "<3>",
            "id": 3,
            "logprob": -9999.0,
            "top_logprobs": [{"token": "<2>", "id": 2, "logprob": 0.0}],
        },
    ]
    assert record["prompt_logprobs"] == []
    assert json.loads(as_json(result))["logprobs"][0]["token"] == ""


def test_a_failed_request_says_why():
    error = RequestError("no token is left", hint="relax a control")
    result = replace(output(0), finish_reason=FinishReason.ERROR, error=error)
    record = json.loads(as_json(result))
    assert record["finish_reason"] == "error"
    assert record["error"] == {"message": "no token is left", "hint": "relax a control"}
    assert record["token_ids"] == [2, 3]
