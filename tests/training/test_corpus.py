"""The target's outputs: collected once, resumed, checked when read."""

import json

import pytest

from foretoken import SamplingParams
from foretoken.errors import ConfigError
from foretoken.training.corpus import (
    Example,
    collect,
    held_out_places,
    more_prompts,
    read_corpus,
    seeded,
    without_overlap,
)
from tests.fakes import VOCAB_SIZE
from tests.training.disks import small_disk

PROMPTS = [(3, 7), (11,), (5, 5, 9), (2, 60)]
PARAMS = seeded(SamplingParams(max_new_tokens=6, temperature=1.0), 4, len(PROMPTS))


def gather(target, path, on_progress=lambda _: None, prompts=PROMPTS):
    return collect(
        target, prompts, PARAMS[: len(prompts)], path, stage="outputs", on_progress=on_progress
    )


def expected(target):
    outputs = target.generate([list(prompt) for prompt in PROMPTS], PARAMS)
    return [
        Example(prompt, tuple(output.token_ids))
        for prompt, output in zip(PROMPTS, outputs, strict=True)
    ]


def test_the_outputs_are_the_targets(target, tmp_path):
    assert gather(target, tmp_path / "c.jsonl") == expected(target)


def test_every_prompt_samples_with_a_seed_of_its_own():
    seeds = [params.seed for params in PARAMS]
    assert len(set(seeds)) == len(PROMPTS)
    assert {params.max_new_tokens for params in PARAMS} == {6}
    assert seeds != [params.seed for params in seeded(SamplingParams(), 5, len(PROMPTS))]


def test_a_full_disk_keeps_the_finished_lines(target, tmp_path):
    path = tmp_path / "c.jsonl"
    wanted = gather(target, path)
    num_bytes = sum(map(len, path.read_bytes().splitlines(keepends=True)[:2])) + 5
    path.unlink()
    with small_disk(num_bytes), pytest.raises(ConfigError, match=r"c\.jsonl cannot be written"):
        gather(target, path)
    assert len(read_corpus(path, PROMPTS, VOCAB_SIZE)) == 2
    assert gather(target, path) == wanted


def test_what_is_there_is_not_collected_again(target, tmp_path, progress):
    path = tmp_path / "c.jsonl"
    wanted = gather(target, path)
    lines = path.read_bytes().splitlines(keepends=True)
    # A crash: the last line is cut short, and the one before it was never begun.
    path.write_bytes(lines[0] + lines[1] + lines[3][:9])
    assert gather(target, path, progress.append) == wanted
    assert [(report.done, report.is_resumed) for report in progress] == [
        (2, True), (3, False), (4, False)
    ]  # fmt: skip
    gather(target, path, progress.append)
    assert (progress[-1].done, progress[-1].is_resumed) == (4, True)
    assert len(path.read_text().splitlines()) == 4


def line(**changes):
    return json.dumps({"index": 0, "prompt_ids": [3, 7], "output_ids": [1, 2], **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object with index, prompt_ids and output_ids"),
        ('{"index": 0}', "not an object with"),
        (line(index=-1), "index is an integer >= 0; got -1"),
        (line(index="0"), "index is an integer"),
        (line(output_ids=[]), "output_ids is a list of token ids from 0 to 60"),
        (line(output_ids=[1.5]), "output_ids is a list"),
        (line(prompt_ids=[3, VOCAB_SIZE]), "prompt_ids is a list of token ids from 0 to 60"),
        (line(prompt_ids=[3, 8]), "is not of prompt 0 of this run"),
        (line(index=4), "is not of prompt 4 of this run"),
    ],
)
def test_a_broken_line_is_named(target, tmp_path, text, message):
    path = tmp_path / "c.jsonl"
    path.write_text(f"{line()}\n{text}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        gather(target, path)
    assert str(caught.value).startswith("c.jsonl, line 2: ")
    assert "delete the line" in caught.value.hint


def test_no_file_is_an_empty_corpus(tmp_path):
    assert read_corpus(tmp_path / "none.jsonl", PROMPTS, VOCAB_SIZE) == {}


# -- prompts -------------------------------------------------------------------------------------


def test_the_target_writes_more_prompts_from_those_given(target, tmp_path):
    prompts = more_prompts(target, PROMPTS[:2], 6, 0, tmp_path / "p.jsonl")
    assert prompts[:2] == PROMPTS[:2]
    assert [
        prompt[: len(base)] for prompt, base in zip(prompts[2:], PROMPTS[:2] * 2, strict=True)
    ] == (PROMPTS[:2] * 2)
    assert all(len(prompt) >= 5 for prompt in prompts[2:])
    assert len(set(prompts)) == 6
    assert more_prompts(target, PROMPTS[:2], 6, 0, tmp_path / "again.jsonl") == prompts
    assert more_prompts(target, PROMPTS[:2], 6, 1, tmp_path / "other.jsonl") != prompts


def test_fewer_prompts_are_the_first_ones(target, tmp_path):
    assert more_prompts(target, PROMPTS, 3, 0, tmp_path / "p.jsonl") == PROMPTS[:3]


@pytest.mark.parametrize(
    ("count", "num_held_out", "places"), [(2, 1, [0]), (8, 4, [0, 2, 4, 6]), (9, 3, [1, 4, 7])]
)
def test_held_out_prompts_are_spread(count, num_held_out, places):
    assert held_out_places(count, num_held_out) == places


def test_texts_that_share_a_predicted_token_with_held_out_ones_are_left_out():
    held_out = [Example((1, 2), (3, 4, 5))]
    same_output = Example((1,), (2, 3, 9))  # predicts 3 behind 1 2, as the held-out text does
    longer_prompt = Example((1, 2, 3), (4, 9))
    same_prompt = Example((1, 2), (9, 9))
    longer_still = Example((1, 2, 3, 4, 5), (6,))  # nothing is predicted where it is equal
    other = Example((7,), (3, 4, 5))
    examples = [same_output, longer_prompt, same_prompt, longer_still, other, other]
    assert without_overlap(examples, held_out) == ([same_prompt, longer_still, other], 3)
