"""The drafter `reference`: it keeps its place, loses it and finds it again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken import LLM
from foretoken.core.draft import DraftBudget
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.reference import ReferenceDrafter, ReferenceOptions
from foretoken.errors import ConfigError, RequestError
from tests.engines import check_idle, make_host, micro_model
from tests.fakes import ByteTokenizer

SAMPLER = Sampler(SamplingParams(), 0, 1)


def drafter_of(reference, **options):
    drafter = ReferenceDrafter(ReferenceOptions(path="unused", **options), reference)
    drafter.start(RequestView(request_id="r", prompt_ids=[0]))
    return drafter


def propose(drafter, token_ids, max_nodes=16, max_depth=16):
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_depth)
    context = DraftContext(request_id="r", token_ids=token_ids, sampler=SAMPLER, budget=budget)
    [draft] = drafter.propose([context])
    assert draft.tree.is_chain
    return draft


def copied_of(drafter, token_ids, **budget):
    return list(propose(drafter, token_ids, **budget).tree.token_ids[1:])


def plain_place(reference, text, max_ngram, min_ngram):
    """Return where a copy goes on, token by token as the method is described; None if lost."""
    place, last = None, 0
    for end in range(1, len(text) + 1):
        if place is not None and place < len(reference) and reference[place] == text[end - 1]:
            place += 1
            last = place
            continue
        place = None
        for size in range(min(max_ngram, end), min_ngram - 1, -1):
            run = text[end - size : end]
            ends = [
                stop
                for stop in range(size, len(reference) + 1)
                if reference[stop - size : stop] == run
            ]
            if ends:
                place = last = min([stop for stop in ends if stop >= last] or ends)
                break
    return place


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(1, 5), max_size=12),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_place_equals_a_plain_search_however_the_steps_fall(reference, text, steps, first, second):
    min_ngram, max_ngram = sorted((first, second))
    drafter = drafter_of(reference, min_ngram=min_ngram, max_ngram=max_ngram)
    ends, end = [], 0
    for step in steps:
        end += step
        ends.append(min(end, len(text)))
    for end in [*ends, len(text)]:
        place = plain_place(reference, text[:end], max_ngram, min_ngram)
        expected = [] if place is None else reference[place : place + 16]
        assert copied_of(drafter, text[:end]) == expected


def test_the_copy_goes_on_over_the_same_words_elsewhere():
    reference = [1, 2, 3, 9, 4, 1, 2, 3, 9, 5]
    drafter = drafter_of(reference)
    assert copied_of(drafter, [4, 1, 2]) == [3, 9, 5]
    assert copied_of(drafter, [4, 1, 2, 3]) == [9, 5]
    assert copied_of(drafter, [4, 1, 2, 3, 9]) == [5]


def test_after_a_changed_word_the_nearest_place_ahead_is_taken():
    reference = [7, 1, 2, 3, 4, 7, 5, 6, 7, 8]
    drafter = drafter_of(reference)
    text = [1, 2, 3]
    assert copied_of(drafter, text) == [4, 7, 5, 6, 7, 8]
    text += [30]  # in place of 4
    assert copied_of(drafter, text) == []
    text += [7]
    assert copied_of(drafter, text) == [5, 6, 7, 8]


def test_a_longer_match_wins_over_a_nearer_one():
    reference = [5, 1, 9, 4, 5, 2, 6, 4, 5, 3]
    drafter = drafter_of(reference)
    assert copied_of(drafter, [6, 4, 5], max_nodes=1) == [3]


def test_going_back_to_the_beginning_is_found():
    drafter = drafter_of([1, 2, 3, 4])
    assert copied_of(drafter, [1, 2, 3, 4]) == []
    assert copied_of(drafter, [1, 2, 3, 4, 1]) == [2, 3, 4]


@pytest.mark.parametrize(
    ("max_nodes", "max_depth", "own", "expected"),
    [(3, 9, 9, 3), (9, 2, 9, 2), (9, 9, 4, 4), (0, 9, 9, 0), (9, 0, 9, 0)],
)
def test_the_smallest_bound_counts(max_nodes, max_depth, own, expected):
    drafter = drafter_of([*range(30)], max_depth=own)
    assert len(copied_of(drafter, [5, 6], max_nodes=max_nodes, max_depth=max_depth)) == expected


def test_each_agreeing_token_makes_the_next_likelier():
    drafter = drafter_of([1, 2, 3, 4, 5])
    draft = propose(drafter, [1, 2], max_nodes=2)
    assert [math.exp(value) for value in draft.draft_logprobs[1:]] == pytest.approx([3 / 4, 4 / 5])
    draft = propose(drafter, [1, 2, 3], max_nodes=1)
    assert math.exp(draft.draft_logprobs[1]) == pytest.approx(4 / 5)


def test_a_long_prompt_is_followed_at_once():
    reference = [(place * place) % 251 for place in range(40_000)]
    drafter = drafter_of(reference)
    assert copied_of(drafter, reference[:39_990]) == reference[39_990:]


# -- references of requests ------------------------------------------------------------------


def own_drafter(own, shared=(), **options):
    drafter = ReferenceDrafter(ReferenceOptions(**options), shared)
    drafter.start(RequestView(request_id="r", prompt_ids=[0], reference_ids=own))
    return drafter


def test_a_request_copies_from_its_own_reference():
    assert copied_of(own_drafter([1, 2, 3, 4]), [9, 1, 2]) == [3, 4]


def test_each_request_has_its_own_until_it_stops():
    drafter = own_drafter([1, 2, 3])
    drafter.start(RequestView(request_id="other", prompt_ids=[0], reference_ids=[1, 2, 7]))
    drafter.start(RequestView(request_id="none", prompt_ids=[0]))
    budget = DraftBudget(max_nodes=4, max_depth=4)
    contexts = [
        DraftContext(request_id=name, token_ids=[1, 2], sampler=SAMPLER, budget=budget)
        for name in ("r", "other", "none")
    ]
    copied = [draft.tree.token_ids[1:] for draft in drafter.propose(contexts)]
    assert copied == [(3,), (7,), ()]
    drafter.stop("r")
    drafter.start(RequestView(request_id="r", prompt_ids=[0], reference_ids=[2, 8]))
    assert copied_of(drafter, [1, 2]) == [8]


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ([5, 1, 2, 7], [5, 1, 2, 8], [7]),  # both agree in three tokens: its own
        ([4, 2, 7], [5, 1, 2, 8], [8]),  # the file agrees in more
        ([5, 1, 2], [4, 2, 8], [8]),  # its own is at its end
        ([7, 7], [1, 2, 8], [8]),  # its own has nothing of the kind
    ],
)
def test_the_text_that_agrees_in_more_tokens_is_copied_from(own, shared, expected):
    drafter = own_drafter(own, shared)
    assert copied_of(drafter, [5, 1, 2]) == expected


def test_without_any_reference_nothing_is_drafted():
    drafter = own_drafter([])
    assert copied_of(drafter, [1, 2, 1, 2]) == []


@pytest.fixture(scope="module")
def llm():
    llm = LLM("stories", drafters="reference", max_nodes=16)
    yield llm
    check_idle(llm.engine)
    llm.close()


PROMPTS = ["Once upon a time", "One day, a bird"]
PARAMS = SamplingParams(max_new_tokens=40)


@pytest.fixture(scope="module")
def plain(llm):
    return llm.generate(PROMPTS, PARAMS, drafters="none")


def steps(outputs):
    return [output.stats.num_steps for output in outputs]


def test_references_save_steps_and_change_no_token(llm, plain):
    texts = [output.prompt + output.text for output in plain]
    outputs = llm.generate(PROMPTS, PARAMS, references=texts)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert all(num_steps < 10 for num_steps in steps(outputs))
    wrong = llm.generate(PROMPTS, PARAMS, references=texts[::-1])
    assert [output.token_ids for output in wrong] == [output.token_ids for output in plain]
    assert all(num_steps > 20 for num_steps in steps(wrong))


def test_references_of_sampled_requests(llm):
    params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=4)
    [expected] = llm.generate(PROMPTS[0], params, drafters="none")
    [output] = llm.generate(PROMPTS[0], params, references=PROMPTS[0] + expected.text)
    assert output.token_ids == expected.token_ids
    assert output.stats.num_steps < 10


def test_one_reference_is_for_all_and_an_empty_one_is_none(llm, plain):
    both = " ".join(output.prompt + output.text for output in plain)
    for references in (both, [both], llm.encode(both)):
        outputs = llm.generate(PROMPTS, PARAMS, references=references)
        assert all(num_steps < 12 for num_steps in steps(outputs))
    for references in (None, "", [""], ["", ""], [[], []]):
        assert steps(llm.generate(PROMPTS, PARAMS, references=references)) == steps(plain)
    outputs = llm.generate(PROMPTS, PARAMS, references=["", llm.encode(both)])
    assert steps(outputs)[0] == steps(plain)[0]
    assert steps(outputs)[1] < 12


def test_a_stream_has_its_reference(llm, plain):
    *_, last = llm.stream(PROMPTS[0], PARAMS, reference=PROMPTS[0] + plain[0].text)
    assert last.output.token_ids == plain[0].token_ids
    assert last.output.stats.num_steps < 10


@pytest.mark.parametrize("references", [["a", "b", "c"], []])
def test_a_wrong_number_of_references_is_refused(llm, references):
    with pytest.raises(ConfigError, match=f"2 prompts and {len(references)} references"):
        llm.generate(PROMPTS, PARAMS, references=references)


@pytest.mark.parametrize("token_id", [-1, 10**6, "a"])
def test_token_ids_that_the_target_does_not_have_are_refused(llm, token_id):
    with pytest.raises(RequestError, match=r"token id .* in the reference"):
        llm.generate(PROMPTS[0], PARAMS, references=[[1, token_id]])


# -- building --------------------------------------------------------------------------------


@pytest.fixture
def host():
    return make_host(micro_model(vocab_size=64), tokenizer=ByteTokenizer())


def test_the_file_is_read_with_the_targets_tokenizer(tmp_path, host):
    (tmp_path / "it.txt").write_text("to be or not to be", encoding="utf-8")
    drafter = ReferenceDrafter.create(ReferenceOptions(path=str(tmp_path / "it.txt")), host)
    drafter.start(RequestView(request_id="r", prompt_ids=[0]))
    copied = copied_of(drafter, host.tokenizer.encode("so: or n"))
    assert host.tokenizer.decode(copied) == "ot to be"


def test_an_empty_file_drafts_nothing(tmp_path, host):
    (tmp_path / "it.txt").write_text("", encoding="utf-8")
    drafter = ReferenceDrafter.create(ReferenceOptions(path=str(tmp_path / "it.txt")), host)
    drafter.start(RequestView(request_id="r", prompt_ids=[0]))
    assert copied_of(drafter, [1, 2, 3]) == []


def test_without_a_file_no_tokenizer_is_needed():
    drafter = ReferenceDrafter.create(ReferenceOptions(), make_host(micro_model()))
    drafter.start(RequestView(request_id="r", prompt_ids=[0], reference_ids=[1, 2, 3]))
    assert copied_of(drafter, [0, 1, 2]) == [3]


def test_files_that_cannot_be_used_are_refused(tmp_path, host):
    path = tmp_path / "it.txt"

    def refused(message, host=host):
        with pytest.raises(ConfigError, match=message):
            ReferenceDrafter.create(ReferenceOptions(path=str(path)), host)

    refused("cannot be read: No such file")
    path.write_bytes(b"\xff\xfe\x00")
    refused("it is not UTF-8")
    path.write_text("zz", encoding="utf-8")
    refused("path needs the target's tokenizer", make_host(micro_model()))
    refused(
        "token id 27; the target's are below 26",
        make_host(micro_model(vocab_size=26), tokenizer=ByteTokenizer()),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_ngram": 0}, "1 <= min_ngram <= max_ngram <= 16"),
        ({"min_ngram": 9}, "got 9 and 8"),
        ({"max_ngram": 17}, "got 1 and 17"),
        ({"max_depth": 0}, "at least 1; got 0"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ReferenceOptions(path="it", **values)
