"""Workloads: three kinds of files, every mistake with its line."""

import json

import pytest

from foretoken.bench.workloads import load_workload
from foretoken.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_here(name, *lines):
        path = tmp_path / name
        path.write_text(
            "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        )
        return str(path)

    return write_here


def test_the_embedded_openings():
    workload = load_workload("stories")
    assert workload.name == "stories"
    assert len(workload.prompts) == 64
    assert workload.categories == []


def test_a_text_file_has_a_prompt_a_line(write):
    workload = load_workload(write("some.txt", "one", "", "  two"))
    assert workload.name == "some.txt"
    assert [item.prompt for item in workload.prompts] == ["one", "  two"]
    assert workload.prompts[1].place == "some.txt, line 3"


def test_json_lines_hold_texts_token_ids_and_bounds(write):
    path = write(
        "some.jsonl",
        {"prompt": "one", "max_new_tokens": 5, "category": "short"},
        {"prompt_ids": [1, 2]},
    )
    first, second = load_workload(path).prompts
    assert (first.prompt, first.max_new_tokens, first.category) == ("one", 5, "short")
    assert second.prompt == (1, 2)


def test_spec_bench_gives_the_first_turn_and_the_category(write):
    path = write(
        "spec.jsonl",
        {"question_id": 1, "category": "writing", "turns": ["first", "second"], "reference": []},
        {"question_id": 2, "category": "math", "turns": ["sum"]},
    )
    workload = load_workload(path)
    assert [item.prompt for item in workload.prompts] == ["first", "sum"]
    assert workload.categories == ["writing", "math"]


def test_the_real_spec_bench(shared_data):
    workload = load_workload(str(shared_data / "prompts" / "spec_bench_question.jsonl"))
    assert len(workload.prompts) == 480
    few = workload.take(26)
    assert few.categories == workload.categories
    assert len(few.prompts) == 26


def test_taking_some_takes_each_category_in_turn(write):
    lines = [{"prompt": f"{kind}{n}", "category": kind} for kind in "ab" for n in range(3)]
    workload = load_workload(write("some.jsonl", *lines)).take(3)
    assert [item.prompt for item in workload.prompts] == ["a0", "b0", "a1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: a JSON list, not an object"),
        ({"prompt": "a", "temperature": 1}, "line 2: unknown key 'temperature'"),
        ({"prompt": "a", "prompt_ids": [1]}, "line 2: either prompt or prompt_ids"),
        ({"category": "a"}, "line 2: either prompt or prompt_ids"),
        ({"prompt": ""}, "line 2: prompt is a text of at least one character"),
        ({"prompt_ids": [True]}, "line 2: prompt_ids is a list of integers"),
        ({"prompt": "a", "max_new_tokens": 0}, "line 2: max_new_tokens is an integer >= 1"),
        ({"question_id": 1, "category": "a", "turns": []}, "line 2: turns is a list of texts"),
    ],
)
def test_a_wrong_line_is_named(write, line, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_workload(write("bad.jsonl", {"prompt": "good"}, line))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("novels", "neither stories nor"),
        ("prompts.csv", "neither stories nor"),
        ("missing.txt", "cannot be read: No such file"),
    ],
)
def test_a_wrong_name(name, message):
    with pytest.raises(ConfigError, match=message):
        load_workload(name)


def test_empty_and_undecodable_files(write, tmp_path):
    with pytest.raises(ConfigError, match="has no prompts"):
        load_workload(write("empty.txt", "", " "))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_workload(str(tmp_path / "latin.txt"))
