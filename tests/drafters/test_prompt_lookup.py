"""Prompt lookup: which occurrence is copied, how far, and what the options mean."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import DraftBudget
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext, RequestView
from foretoken.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupOptions
from foretoken.errors import ConfigError

SAMPLER = Sampler(SamplingParams(), 0, 1)


def context(token_ids, max_nodes=10, max_depth=10):
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_depth)
    return DraftContext(request_id="r", token_ids=token_ids, sampler=SAMPLER, budget=budget)


def draft_of(token_ids, *, max_nodes=10, max_depth=10, **options):
    drafter = PromptLookupDrafter(PromptLookupOptions(**options))
    drafter.start(RequestView(request_id="r", prompt_ids=token_ids))
    [draft] = drafter.propose([context(token_ids, max_nodes, max_depth)])
    return draft


def copied_of(token_ids, **options):
    draft = draft_of(token_ids, **options)
    assert draft.tree.is_chain
    assert draft.tree.token_ids[0] == token_ids[-1]
    return list(draft.tree.token_ids[1:])


def brute_force(token_ids, max_ngram, min_ngram, length):
    """Return the copy by searching the text from its end, as the method is described."""
    for size in range(min(max_ngram, len(token_ids) - 1), min_ngram - 1, -1):
        tail = token_ids[-size:]
        for start in range(len(token_ids) - size - 1, -1, -1):
            if token_ids[start : start + size] == tail:
                copied = list(token_ids)
                for step in range(length):  # reads its own copy past the end
                    copied.append(copied[start + size + step])
                return copied[len(token_ids) :]
    return []


def test_what_followed_the_last_tokens_is_copied():
    assert copied_of([1, 2, 3, 4, 5, 1, 2], max_depth=3) == [3, 4, 5]


def test_longer_match_wins_over_later_match():
    assert copied_of([1, 2, 3, 9, 2, 4, 7, 1, 2], max_depth=1) == [3]


def test_latest_of_equal_matches_wins():
    assert copied_of([1, 2, 3, 1, 2, 4, 1, 2], max_depth=1) == [4]


def test_copy_goes_on_with_itself_at_the_end_of_the_text():
    assert copied_of([7, 8, 9, 7, 8, 9], max_depth=8) == [7, 8, 9, 7, 8, 9, 7, 8]
    assert copied_of([5, 5], max_depth=4) == [5, 5, 5, 5]


@pytest.mark.parametrize("token_ids", [[1], [1, 2, 3], [1, 2, 3, 4]])
def test_nothing_is_drafted_without_a_match(token_ids):
    assert copied_of(token_ids) == []


def test_min_ngram_ignores_shorter_matches():
    assert copied_of([1, 2, 9, 2], min_ngram=1) != []
    assert copied_of([1, 2, 9, 2], min_ngram=2) == []


@pytest.mark.parametrize(
    ("max_nodes", "max_depth", "own", "expected"),
    [
        (3, 9, 9, 3),
        (9, 2, 9, 2),
        (9, 9, 4, 4),
        (0, 9, 9, 0),
        (9, 0, 9, 0),
    ],
)
def test_the_smallest_bound_counts(max_nodes, max_depth, own, expected):
    draft = draft_of([1, 2] * 5, max_nodes=max_nodes, max_depth=max_depth)
    assert draft.tree.num_draft_tokens == min(max_nodes, max_depth, 10)
    assert len(brute_force([1, 2] * 5, 3, 1, expected)) == expected
    drafter = PromptLookupDrafter(PromptLookupOptions(max_depth=own))
    drafter.start(RequestView(request_id="r", prompt_ids=[1]))
    [draft] = drafter.propose([context([1, 2] * 5, max_nodes, max_depth)])
    assert draft.tree.num_draft_tokens == expected


def test_longer_matches_are_trusted_more():
    short, long = draft_of([4, 2, 9, 2]), draft_of([1, 2, 3, 4, 1, 2, 3])
    assert short.draft_logprobs[1] < long.draft_logprobs[1] < 0
    assert math.isclose(math.exp(long.draft_logprobs[1]), 4 / 5)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=25),
    st.lists(st.integers(1, 4), max_size=6),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_index_kept_while_the_text_grows_equals_a_search(token_ids, growth, first, second):
    min_ngram, max_ngram = sorted((first, second))
    options = PromptLookupOptions(min_ngram=min_ngram, max_ngram=max_ngram, max_depth=6)
    drafter = PromptLookupDrafter(options)
    text = list(token_ids)
    drafter.start(RequestView(request_id="r", prompt_ids=text))
    for count in [0, *growth]:
        text += [(count * 7 + step) % 3 for step in range(count)]
        [draft] = drafter.propose([context(text)])
        expected = brute_force(text, max_ngram, min_ngram, 6)
        assert list(draft.tree.token_ids[1:]) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_ngram": 0}, "1 <= min_ngram <= max_ngram"),
        ({"min_ngram": 4, "max_ngram": 3}, "got 4 and 3"),
        ({"max_depth": 0}, "at least 1; got 0"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        PromptLookupOptions(**values)
