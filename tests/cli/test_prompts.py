"""Prompts from arguments, text files and JSON lines."""

import io
import json

import pytest

from foretoken.cli.errors import FileError
from foretoken.cli.prompts import read_jobs
from foretoken.core.params import SamplingParams
from foretoken.errors import ConfigError, ForetokenError, RequestError, UnknownNameError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def stdin(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def prompts_of(jobs):
    return [job.prompt for job in jobs]


def test_arguments_come_before_the_file(tmp_path):
    path = write(tmp_path, "a.txt", "three\n")
    jobs = read_jobs(["one", "two"], path, {"top_k": 4})
    assert prompts_of(jobs) == ["one", "two", "three"]
    assert [job.params for job in jobs] == [SamplingParams(top_k=4)] * 3
    assert [job.place for job in jobs] == ["prompt 1", "prompt 2", f"{path}, line 1"]


def test_one_prompt_needs_no_place():
    assert read_jobs(["one"], None, {})[0].place == ""


def test_text_file_has_one_prompt_a_line(tmp_path):
    text = "\ufeffone \r\n\n  \ntwo\u2028still two\nthree"
    jobs = read_jobs([], write(tmp_path, "a.TXT", text), {})
    assert prompts_of(jobs) == ["one ", "two\u2028still two", "three"]


def test_json_lines_override_parameters(tmp_path):
    lines = '{"prompt": "a", "seed": 3}\n\n{"prompt_ids": [1, 2], "stop": ".", "top_k": 1}\n'
    jobs = read_jobs([], write(tmp_path, "a.jsonl", lines), {"top_k": 7, "temperature": 0.5})
    assert prompts_of(jobs) == ["a", [1, 2]]
    assert jobs[0].params == SamplingParams(top_k=7, temperature=0.5, seed=3)
    assert jobs[1].params == SamplingParams(top_k=1, temperature=0.5, stop=(".",))
    assert jobs[1].place.endswith("a.jsonl, line 3")


def test_a_line_may_have_its_own_reference(tmp_path):
    lines = '{"prompt": "a"}\n{"prompt": "b", "reference": "own"}\n{"prompt": "c", "reference": ""}'
    path = write(tmp_path, "a.jsonl", lines)
    jobs = read_jobs(["one"], path, {}, "for all")
    assert [job.reference for job in jobs] == ["for all", "for all", "own", ""]
    assert [job.reference for job in read_jobs(["one"], path, {})] == ["", "", "own", ""]


@pytest.mark.parametrize(
    ("text", "prompts"), [("one\n{two\n", ["one", "{two"]), ('\n {"prompt": "a"}\n', ["a"])]
)
def test_standard_input_may_be_either(monkeypatch, text, prompts):
    stdin(monkeypatch, text)
    assert prompts_of(read_jobs([], "-", {})) == prompts


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ('{"prompt": "a"', ConfigError, "not JSON"),
        ("[" * 100_000, ConfigError, "not JSON"),
        ('["a"]', ConfigError, "a JSON list, not an object"),
        ('{"promt": "a"}', ConfigError, "unknown key 'promt'"),
        ('{"prompt": "a", "temprature": 1}', ConfigError, "unknown key 'temprature'"),
        ('{"prompt": "a", "temperature": "hot"}', ConfigError, "temperature is a number 0 or"),
        ('{"prompt": "a", "temperature": NaN}', ConfigError, "temperature is a number 0 or"),
        ('{"prompt": "a", "prompt_ids": [1]}', ConfigError, "either prompt or prompt_ids"),
        ('{"seed": 1}', ConfigError, "either prompt or prompt_ids"),
        ('{"prompt": 5}', ConfigError, "prompt is a text; got 5"),
        ('{"prompt": "a", "reference": 5}', ConfigError, "reference is a text; got 5"),
        ('{"prompt": "a", "reference": "\\ud800"}', RequestError, "the reference is not valid"),
        ('{"prompt_ids": "12"}', ConfigError, "prompt_ids is a list of integers"),
        ('{"prompt_ids": [true]}', ConfigError, "prompt_ids is a list of integers"),
        ('{"prompt": ""}', RequestError, "the prompt is empty"),
        ('{"prompt": "\\ud800"}', RequestError, "the prompt is not valid Unicode"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, kind, message):
    path = write(tmp_path, "a.jsonl", f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(kind) as caught:
        read_jobs([], path, {})
    assert str(caught.value).startswith(f"{path}, line 3: {message}")
    assert caught.value.hint


def test_a_misspelt_key_gets_the_nearest(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a", "temprature": 1}')
    with pytest.raises(ConfigError) as caught:
        read_jobs([], path, {})
    assert caught.value.hint == "did you mean 'temperature'?"
    with pytest.raises(UnknownNameError):
        read_jobs(["a"], None, {"temprature": 1})


@pytest.mark.parametrize(
    ("prompts", "name", "content", "kind", "message"),
    [
        ([], None, None, ConfigError, "there is no prompt"),
        ([""], None, None, RequestError, "the prompt is empty"),
        (["a", ""], None, None, RequestError, "prompt 2: the prompt is empty"),
        (["\udcff"], None, None, RequestError, "the prompt is not valid Unicode"),
        ([], "a.txt", "\n \n", ConfigError, "has no prompts"),
        ([], "a.jsonl", "", ConfigError, "has no prompts"),
        ([], "a.csv", "a,b", ConfigError, "ends in .csv; .txt and .jsonl are known"),
        ([], "names", "a", ConfigError, "ends in nothing"),
        ([], "a.txt", b"fine\nb\xffd\n", FileError, "a.txt, line 2: not UTF-8"),
        ([], "missing.txt", None, FileError, "missing.txt cannot be read: No such file"),
    ],
)
def test_bad_input(tmp_path, prompts, name, content, kind, message):
    path = str(tmp_path / name) if name else None
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(kind) as caught:
        read_jobs(prompts, path, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) + caught.value.hint
    assert isinstance(caught.value, ForetokenError)


def test_a_folder_is_no_input(tmp_path):
    folder = tmp_path / "a.txt"
    folder.mkdir()
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        read_jobs([], str(folder), {})


def test_lines_take_every_control(tmp_path):
    path = tmp_path / "prompts.jsonl"
    values = {
        "bad_words_ids": [[1, 2]],
        "sequence_bias": [[[3, 4], 0.5]],
        "stop_token_ids": [5],
        "min_new_tokens": 2,
        "json_schema": {"type": "object"},
        "logprobs": 3,
    }
    path.write_text(json.dumps({"prompt": "a", **values}))
    [job] = read_jobs([], str(path), {})
    assert job.params == SamplingParams(**values)
    assert json.loads(job.params.json_schema) == {"type": "object"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logits_processors": ["f"]}, "line 1: logits_processors is a list of functions"),
        ({"regex": "a", "lark": "b"}, "line 1: at most one of json_schema, regex, lark"),
        ({"min_new_tokens": 300}, "line 1: min_new_tokens is at most max_new_tokens"),
    ],
)
def test_lines_with_wrong_controls_are_named(tmp_path, values, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", **values}))
    with pytest.raises(ConfigError, match=message):
        read_jobs([], str(path), {})
