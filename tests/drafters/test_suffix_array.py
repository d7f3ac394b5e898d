"""Suffix arrays: sorted by a bounded number of tokens, searched by halves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from foretoken.drafters.suffix_array import MAX_MATCH, build_suffix_array, longest_suffix

texts = st.lists(st.integers(-1, 2), max_size=80)


def ids(token_ids):
    return np.array(token_ids, np.int32)


@given(texts)
def test_places_are_sorted_by_their_next_tokens_and_then_by_place(text):
    expected = sorted(range(len(text)), key=lambda place: (text[place : place + MAX_MATCH], place))
    array = build_suffix_array(ids(text))
    assert array.dtype == np.int32
    assert array.tolist() == expected


def test_periodic_texts_are_sorted_to_the_last_round():
    text = [0] * 15 + [1] + [0] * 16 + [2] + [0] * 40
    expected = sorted(range(len(text)), key=lambda place: (text[place : place + 16], place))
    assert build_suffix_array(ids(text)).tolist() == expected


def test_large_token_ids_and_empty_texts():
    text = [2**31 - 3, 0, -1, 2**31 - 3, 5]
    expected = sorted(range(5), key=lambda place: text[place:])
    assert build_suffix_array(ids(text)).tolist() == expected
    assert build_suffix_array(ids([])).tolist() == []
    assert longest_suffix(ids([]), build_suffix_array(ids([])), ids([1])) == (0, 0, 0)


@given(texts, st.lists(st.integers(0, 2), min_size=1, max_size=22))
def test_longest_suffix_equals_a_search(text, query):
    array = build_suffix_array(ids(text))
    length, low, high = longest_suffix(ids(text), array, ids(query))
    for size in range(min(len(query), MAX_MATCH), -1, -1):
        run = query[len(query) - size :]
        places = [start for start in range(len(text)) if text[start : start + size] == run]
        if places and size:
            assert length == size
            assert sorted(array[low:high].tolist()) == places
            return
    assert (length, low, high) == (0, 0, 0)
