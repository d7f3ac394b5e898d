"""From prompts to texts: held-out ones apart, each with its own parameters, resumed."""

import pytest

from foretoken import SamplingParams
from foretoken.errors import ConfigError
from foretoken.training.gather import gather, num_held_out, prompts_fingerprint, shown_name

PROMPTS = [(token_id, token_id + 9, 4) for token_id in range(8)]
SAMPLED = SamplingParams(max_new_tokens=5, temperature=1.0)


def test_held_out_texts_are_not_trained_on(target, tmp_path):
    found = gather(target, PROMPTS, SAMPLED, tmp_path, num_prompts=10, seed=3)
    assert len(found.held_out) == len(found.held_out_params) == 4
    assert {text.prompt_ids for text in found.held_out} < set(PROMPTS)
    assert not {text.token_ids for text in found.held_out} & {
        text.token_ids for text in found.examples
    }
    assert len(found.examples) + found.num_left_out == 10
    described = found.described()
    assert described["num_held_out_tokens"] == sum(len(it.output_ids) for it in found.held_out)
    assert described["num_tokens"] == sum(len(it.output_ids) for it in found.examples)


def test_parameters_give_the_held_out_texts_again(target, tmp_path):
    found = gather(target, PROMPTS, SAMPLED, tmp_path, num_prompts=6, seed=3)
    again = target.generate([list(it.prompt_ids) for it in found.held_out], found.held_out_params)
    assert [tuple(output.token_ids) for output in again] == [
        text.output_ids for text in found.held_out
    ]
    assert len({params.seed for params in found.held_out_params}) == 4


def test_what_was_gathered_is_found_again(target, tmp_path, progress):
    first = gather(target, PROMPTS, SAMPLED, tmp_path, num_prompts=6, seed=3)
    again = gather(
        target, PROMPTS, SAMPLED, tmp_path, num_prompts=6, seed=3, on_progress=progress.append
    )
    assert again == first
    assert [(it.done, it.total) for it in progress if it.is_resumed] == [(2, 2), (10, 10)]


def test_nothing_left_to_train_on_is_an_error(target, tmp_path):
    greedy = SamplingParams(max_new_tokens=3)
    with pytest.raises(ConfigError, match="no text is left to train on"):
        gather(target, [(1, 2), (1, 2)], greedy, tmp_path, num_prompts=1, seed=0)


def test_one_prompt_is_too_few():
    with pytest.raises(ConfigError, match="there are 1 prompts"):
        num_held_out(1)
    assert [num_held_out(count) for count in (2, 5, 1000)] == [1, 2, 32]


def test_names_show_no_folders(tmp_path):
    assert shown_name(str(tmp_path)) == tmp_path.name
    assert shown_name("owner/name") == "owner/name"


def test_prompts_have_a_fingerprint():
    assert prompts_fingerprint(PROMPTS) == prompts_fingerprint([*PROMPTS])
    assert prompts_fingerprint(PROMPTS) != prompts_fingerprint(PROMPTS[::-1])
