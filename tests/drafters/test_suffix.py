"""The drafter `suffix`: what it learns from finished requests, and what outlives the process."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from foretoken.core.draft import DraftBudget
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.suffix import FILE_KIND, SuffixDrafter, SuffixOptions
from foretoken.drafters.token_files import map_token_file, vocabulary_digest
from foretoken.errors import ConfigError
from foretoken.planner.base import FixedPlanner, PassingPlanner
from tests.engines import finish, greedy, make_engine, make_host, micro_model, plain_ids

SAMPLER = Sampler(SamplingParams(), 0, 1)


@pytest.fixture(scope="module")
def host():
    return make_host(micro_model())


@pytest.fixture
def build(host):
    return lambda **options: SuffixDrafter.create(SuffixOptions(**options), host)


def propose(drafter, token_ids, request_id="r", max_nodes=8, max_width=None):
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_nodes, max_width=max_width)
    context = DraftContext(
        request_id=request_id, token_ids=token_ids, sampler=SAMPLER, budget=budget
    )
    [draft] = drafter.propose([context])
    return draft


def draft_of(drafter, token_ids, **budget):
    drafter.start(RequestView(request_id="new", prompt_ids=token_ids))
    draft = propose(drafter, token_ids, "new", **budget)
    drafter.stop("new")
    return draft


def run_request(drafter, prompt_ids, output_ids):
    """Let a drafter see a request from its start to its end."""
    token_ids = list(prompt_ids)
    drafter.start(RequestView(request_id="r", prompt_ids=list(prompt_ids)))
    propose(drafter, token_ids)
    token_ids += output_ids  # after the last draft, as when a request ends
    drafter.stop("r")


def held(drafter):
    return drafter._past.index.texts().tolist()


# -- what is learned -------------------------------------------------------------------------


def test_outputs_of_finished_requests_are_copied(build):
    drafter = build()
    assert draft_of(drafter, [1, 2, 3]).tree.num_draft_tokens == 0
    run_request(drafter, [9, 1, 2], [3, 4, 5, 6])
    draft = draft_of(drafter, [8, 2, 3])
    assert draft.tree.token_ids == (3, 4, 5, 6)
    assert draft.tree.is_chain


def test_the_beginning_of_an_output_is_found_from_the_end_of_its_prompt(build):
    drafter = build()
    run_request(drafter, [9, 1, 2], [3, 4])
    assert draft_of(drafter, [7, 1, 2]).tree.token_ids == (2, 3, 4)


def test_only_so_much_of_a_prompt_is_kept_as_can_match(build):
    drafter = build(max_match=2)
    run_request(drafter, [9, 1, 2], [3, 4])
    assert held(drafter) == [1, 2, 3, 4, -1]


def test_requests_without_output_or_never_drafted_for_leave_nothing(build):
    drafter = build()
    run_request(drafter, [1, 2, 3], [])
    drafter.start(RequestView(request_id="r", prompt_ids=[1, 2]))
    drafter.stop("r")
    drafter.stop("unknown")
    assert held(drafter) == []


def test_outputs_that_it_did_not_draft_for_are_copied_too(build):
    drafter, token_ids = build(), [9, 1, 2]
    drafter.start(RequestView(request_id="r", prompt_ids=[9, 1, 2], token_ids=token_ids))
    token_ids += [3, 4, 5, 6]
    drafter.stop("r")
    assert draft_of(drafter, [8, 2, 3]).tree.token_ids == (3, 4, 5, 6)


class LatePlanner(PassingPlanner):
    """Has nobody draft until it is told to."""

    is_on = False

    def order(self, shares):
        return super().order(shares) if self.is_on else [{}] * len(shares)


def test_what_was_decoded_plainly_is_found_when_it_comes_again(build):
    target, prompts = micro_model(), [[1, 2, 3, 4], [5, 6]]
    planner = LatePlanner(FixedPlanner())
    engine = make_engine(target, {"suffix": build()}, max_nodes=6, planner=planner)
    steps = []
    for planner.is_on in (False, True):
        requests = [engine.add_request(prompt, greedy(24)) for prompt in prompts]
        finish(engine)
        outputs = [plain_ids(target, prompt, greedy(24)) for prompt in prompts]
        assert [it.output_ids for it in requests] == outputs
        steps.append([it.stats.num_steps for it in requests])
    assert steps == [[24, 24], [4, 4]]


def test_the_request_itself_wins_when_its_match_is_longer(build):
    drafter = build()
    run_request(drafter, [5], [3, 7, 7])
    assert draft_of(drafter, [1, 2, 3, 4, 5, 1, 2, 3], max_nodes=2).tree.token_ids == (3, 4, 5)
    run_request(drafter, [0, 4, 5, 1, 2], [3, 8, 8])
    assert draft_of(drafter, [1, 2, 3, 4, 5, 1, 2, 3], max_nodes=2).tree.token_ids == (3, 8, 8)


def test_different_outputs_make_a_tree_by_their_counts(build):
    drafter = build()
    for output in ([2, 3, 4], [2, 3, 4], [2, 3, 6], [2, 7]):
        run_request(drafter, [1], output)
    tree = draft_of(drafter, [1, 2], max_nodes=4).tree
    assert tree.sequences == {(2,), (2, 3), (2, 3, 4), (2, 3, 6), (2, 7)}
    assert draft_of(drafter, [1, 2], max_nodes=4, max_width=1).tree.sequences == {
        (2,),
        (2, 3),
        (2, 3, 4),
    }


def test_without_past_outputs_drafts_depend_on_the_request_alone(build):
    drafter = build(max_tokens=0)
    run_request(drafter, [9, 1, 2], [3, 4, 5, 6])
    assert draft_of(drafter, [8, 2, 3]).tree.num_draft_tokens == 0
    assert draft_of(drafter, [2, 3, 2]).tree.token_ids[:2] == (2, 3)


def test_the_oldest_outputs_go_whole(build):
    drafter = build(max_tokens=12, max_match=1)
    for first in (10, 20, 30):
        run_request(drafter, [0], [first, first + 1, first + 2])
    assert held(drafter) == [0, 20, 21, 22, -1, 0, 30, 31, 32, -1]
    assert draft_of(drafter, [9, 11]).tree.num_draft_tokens == 0
    assert draft_of(drafter, [9, 21]).tree.token_ids == (21, 22)


def test_drafts_change_with_what_was_learned_and_tokens_do_not(build):
    target = micro_model()
    prompts = [[1, 2, 3, 4], [5, 6], [1, 2, 3, 4]]
    params = greedy(24)
    truths = [plain_ids(target, prompt, params) for prompt in prompts]
    engine = make_engine(target, {"suffix": build()}, max_nodes=6)
    steps = []
    for _ in range(2):
        requests = [engine.add_request(prompt, params) for prompt in prompts]
        finish(engine)
        assert [request.output_ids for request in requests] == truths
        steps.append(sum(request.stats.num_steps for request in requests))
    # Everything was said before: all but the ends is copied.
    assert steps[1] < steps[0]
    assert steps[1] <= 3 * 6


def test_a_long_context_is_indexed_once_and_drafted_from(build):
    drafter = build(max_tokens=0)
    rng = np.random.default_rng(0)
    text = rng.integers(0, 26, 60_000).tolist()
    text += text[1000:1040]
    draft = draft_of(drafter, text, max_nodes=16)
    assert list(draft.tree.token_ids[1:]) == text[1040:1056]


# -- the file --------------------------------------------------------------------------------


def test_past_outputs_are_there_in_the_next_run(build, tmp_path):
    path = tmp_path / "past"
    first = build(path=str(path))
    run_request(first, [1], [2, 3, 4])
    assert not path.exists()  # too little news to write in the middle of serving
    first._past.save()
    second = build(path=str(path))
    assert held(second) == held(first) == [1, 2, 3, 4, -1]
    assert draft_of(second, [9, 2]).tree.token_ids == (2, 3, 4)


def test_a_drafter_that_goes_away_saves(build, tmp_path):
    path = tmp_path / "past"
    drafter = build(path=str(path))
    run_request(drafter, [1], [2, 3, 4])
    del drafter
    gc.collect()
    assert held(build(path=str(path))) == [1, 2, 3, 4, -1]


def test_the_end_of_the_process_saves(tmp_path):
    path = tmp_path / "past"
    code = (
        "from foretoken import LLM, SamplingParams\n"
        f"llm = LLM('stories', drafters='suffix:path={path}')\n"
        "print(llm.generate('Once', SamplingParams(max_new_tokens=8))[0].token_ids)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    [output] = [eval(line) for line in done.stdout.splitlines()]
    content = path.read_bytes()
    assert np.frombuffer(content[192:], np.int32).tolist()[-9:] == [*output, -1]


def test_news_are_written_while_serving_in_proportion_to_the_whole(build, tmp_path, host):
    path = tmp_path / "past"
    drafter = build(path=str(path), max_match=1)
    run_request(drafter, [1], [2] * 4090)
    assert not path.exists()
    run_request(drafter, [1], [3] * 10)
    vocabulary = vocabulary_digest(host.target.info.vocab_size, None)
    [texts] = map_token_file(path, FILE_KIND, vocabulary)
    assert texts.tolist() == held(drafter)


def test_a_file_of_more_outputs_than_are_kept_gives_the_newest(build, tmp_path):
    path = tmp_path / "past"
    first = build(path=str(path), max_match=1)
    for token_id in (5, 6, 7):
        run_request(first, [1], [token_id] * 3)
    first._past.save()
    second = build(path=str(path), max_tokens=11)
    assert held(second) == [1, 6, 6, 6, -1, 1, 7, 7, 7, -1]


def test_a_damaged_file_is_refused_and_left_alone(build, tmp_path):
    path = tmp_path / "past"
    drafter = build(path=str(path))
    run_request(drafter, [1], [2, 3, 4])
    drafter._past.save()
    content = path.read_bytes()[:-1]
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="damaged") as caught:
        build(path=str(path))
    assert "or a new one" in caught.value.hint
    assert path.read_bytes() == content


def test_a_file_for_another_vocabulary_is_refused(build, tmp_path):
    path = tmp_path / "past"
    drafter = build(path=str(path))
    run_request(drafter, [1], [2, 3, 4])
    drafter._past.save()
    other = make_host(micro_model(vocab_size=31))
    with pytest.raises(ConfigError, match="another vocabulary"):
        SuffixDrafter.create(SuffixOptions(path=str(path)), other)


def test_a_folder_that_does_not_exist_is_refused_at_once(build, tmp_path):
    with pytest.raises(ConfigError, match="folder that does not exist"):
        build(path=str(tmp_path / "no" / "past"))


def test_a_save_that_fails_warns_and_serving_goes_on(build, tmp_path, monkeypatch):
    drafter = build(path=str(tmp_path / "past"), max_match=1)

    def fail(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.warns(RuntimeWarning, match="were not saved .* No space left"):
        run_request(drafter, [1], [2] * 5000)
    assert draft_of(drafter, [9, 2], max_nodes=1).tree.token_ids == (2, 2)


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is from 0"),
        ({"max_tokens": 2**31}, "max_tokens is from 0 to 2147483647"),
        ({"max_match": 0}, "max_match is from 1"),
        ({"max_places": 0}, "max_places is from 1"),
        ({"depth_offset": -1}, "depth_offset is from 0"),
        ({"depth_per_match": float("nan")}, "depth_per_match is from 0"),
        ({"min_prob": 1.5}, "min_prob is from 0 to 1; got 1.5"),
        ({"max_tokens": 0, "path": "it"}, "max_tokens=0 keeps none"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SuffixOptions(**values)


def test_outputs_come_in_when_somebody_looks_or_there_are_many(build):
    drafter = build()

    def run(output_ids):
        token_ids = [0]
        drafter.start(RequestView(request_id="r", prompt_ids=[0], token_ids=token_ids))
        token_ids += output_ids
        drafter.stop("r")

    def num_held():
        return drafter._past._index.num_tokens

    run([1, 2, 3, 4])
    assert num_held() == 0
    assert draft_of(drafter, [1, 2, 3]).tree.token_ids == (3, 4)
    assert num_held() == 6
    run([1] * 2000)
    assert num_held() == 6
    run([1] * 2100)
    assert num_held() == 6 + 2002 + 2102
