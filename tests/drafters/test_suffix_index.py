"""The index over texts: every occurrence is found, the oldest texts go, memory is bounded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.drafters.suffix_index import ORDERS, SuffixIndex

ALL = 10_000


def ids(*token_ids):
    return np.array(token_ids, np.int32)


def find_own(index, max_match, max_places):
    """Return where the last tokens of an index's only text occurred before in it."""
    found = index.find(index.tail(max_match), max_places)
    return found._replace(end=index.num_tokens)


def found_in(index, occurrences):
    """Return {(length, what follows up to the end of its text)} with repetitions, sorted."""
    tokens = index._arrays.tokens.tolist()
    result = []
    for start, length in zip(occurrences.starts, occurrences.lengths, strict=True):
        rest, place = [], int(start)
        while tokens[place % len(tokens)] >= 0 and len(rest) < 50:
            rest.append(tokens[place % len(tokens)])
            place += 1
        result.append((int(length), rest))
    return sorted(result)


def match_length(text, end, query):
    """Return how many tokens before `end` agree with the last ones of the query."""
    length = 0
    while (
        length < min(end, len(query)) and text[end - 1 - length] == query[len(query) - 1 - length]
    ):
        length += 1
    return length


def searched(texts, query):
    """Return what `found_in` does, by looking at every place."""
    result = []
    for text in texts:
        for end in range(1, len(text)):
            length = match_length(text, end, query)
            if length:
                result.append((length, text[end:][:50]))
    return sorted(result)


def held(texts, max_tokens):
    """Return the newest whole texts that fit, each with a separator."""
    kept, room = [], max_tokens
    for text in reversed(texts):
        cut = text[-(max_tokens - 1) :]
        room -= len(cut) + 1
        if room < 0:
            break
        kept.append(cut)
    return kept[::-1]


texts_of = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=12)


@given(texts_of, st.lists(st.integers(0, 3), min_size=1, max_size=14), st.integers(2, 120))
def test_every_occurrence_in_the_newest_texts_is_found(texts, query, max_tokens):
    index = SuffixIndex(max_tokens)
    for text in texts:
        index.add_text(ids(*text))
    kept = held(texts, max_tokens)
    assert index.texts().tolist() == [token_id for text in kept for token_id in (*text, -1)]
    assert found_in(index, index.find(ids(*query), ALL)) == searched(kept, query)


@given(st.lists(st.lists(st.integers(0, 2), max_size=20), max_size=8), st.integers(1, 12))
def test_every_earlier_occurrence_in_a_growing_text_is_found(parts, max_match):
    index = SuffixIndex(ALL, 3)
    text = [1]
    index.extend(text)
    for part in parts:
        index.extend(part)
        text += part
        found = find_own(index, max_match, ALL)
        expected = [
            (length, end)
            for end in range(1, len(text))
            if (length := match_length(text, end, text[-max_match:]))
        ]
        pairs = zip(found.lengths.tolist(), found.starts.tolist(), strict=True)
        assert sorted(pairs) == sorted(expected)
        assert found.end == len(text)


def test_newest_places_come_first_and_their_number_is_bounded():
    index = SuffixIndex(ALL)
    for follower in range(10, 30):
        index.add_text(ids(5, 6, 7, follower))
    found = index.find(ids(9, 6, 7), 4)
    assert [rest for _, rest in found_in(index, found)] == [[26], [27], [28], [29]]
    assert found.lengths.tolist() == [2] * 4
    assert index._arrays.tokens[found.starts[0]] == 29


def test_matches_of_all_lengths_are_found_once():
    index = SuffixIndex(ALL)
    index.add_text(ids(*range(1, 13), 20))
    index.add_text(ids(10, 11, 12, 21))
    index.add_text(ids(12, 22))
    found = found_in(index, index.find(ids(*range(1, 13)), ALL))
    assert found == [(1, [22]), (3, [21]), (12, [20])]
    assert ORDERS == (8, 3, 1)  # a length of each chain, and one between


def test_a_text_longer_than_the_bound_keeps_its_end():
    index = SuffixIndex(5)
    index.add_text(ids(1, 2, 3, 4, 5, 6, 7))
    assert index.texts().tolist() == [4, 5, 6, 7, -1]
    index.add_text(ids(8))
    assert index.texts().tolist() == [8, -1]


def test_what_is_evicted_is_never_found_again():
    """A place that was written over must not be reached through an old chain."""
    rng = np.random.default_rng(0)
    index = SuffixIndex(64)
    texts = []
    for _ in range(500):
        texts.append(rng.integers(0, 4, rng.integers(1, 20)).tolist())
        index.add_text(ids(*texts[-1]))
        query = rng.integers(0, 4, 9).tolist()
        kept = held(texts, 64)
        assert found_in(index, index.find(ids(*query), ALL)) == searched(kept, query)


def test_memory_stops_at_the_bound():
    index = SuffixIndex(10_000)
    sizes = set()
    text = ids(*range(99))
    for _ in range(400):
        index.add_text(text)
        sizes.add(index.num_bytes)
    assert index.num_tokens == 10_000
    assert max(sizes) == index.num_bytes <= 10_000 * 36
    assert len(sizes) < 10  # it doubles


def test_memory_at_fifty_million_tokens_is_below_two_gibibytes():
    """The arrays' sizes alone; the pages of what nobody touched are never had."""
    index = SuffixIndex(50_000_000, 1)
    arrays = index._arrays
    per_place = 4 + 4 * len(ORDERS)  # tokens and chains
    assert arrays.tokens.itemsize == arrays.previous.itemsize == arrays.heads.itemsize == 4
    num_buckets = 1 << (50_000_000 - 1).bit_length()
    assert 50_000_000 * per_place + 4 * len(ORDERS) * num_buckets < 2 * 2**30


def test_going_on_beyond_the_bound_is_refused():
    index = SuffixIndex(4)
    index.extend([1, 2, 3])
    with pytest.raises(ValueError, match="more than 4 tokens"):
        index.extend([4, 5])


def test_tokens_that_are_taken_back_leave_nothing():
    """Up to a full ring: then the next place is the first again, and copies went on with zeros."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(1, 4, 80).tolist()
    for length in range(55, 66):
        index, longer = SuffixIndex(1000, 64), SuffixIndex(1000, 64)
        index.extend(token_ids[:length])
        longer.extend(token_ids[: length + 3])
        before = [array.copy() for array in find_own(index, 8, ALL)[:3]]
        with index.extended(token_ids[length : length + 3]):
            for found, expected in zip(
                find_own(index, 8, ALL), find_own(longer, 8, ALL), strict=True
            ):
                held = length + 3  # beyond it the arrays are not written yet
                assert np.array_equal(np.atleast_1d(found)[:held], np.atleast_1d(expected)[:held])
            assert index.tail(99).tolist() == token_ids[: length + 3]
        after = find_own(index, 8, ALL)
        assert all(
            np.array_equal(old[:length], new[:length])
            for old, new in zip(before, after[:3], strict=True)
        )
        assert after.end == index.num_tokens == length
        index.extend(token_ids[length:])
        longer.extend(token_ids[length + 3 :])
        for found, expected in zip(find_own(index, 8, ALL), find_own(longer, 8, ALL), strict=True):
            assert np.array_equal(np.atleast_1d(found)[:80], np.atleast_1d(expected)[:80])
