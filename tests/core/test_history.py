"""History: whatever came before, it shows what counting from scratch shows."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.history import History

TOKEN_IDS = st.lists(st.integers(0, 4), max_size=12)
# What happens between two choices: tokens are emitted, or nothing; then a path is looked at.
MOVES = st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), TOKEN_IDS), max_size=12)


def new_history(num_prompt_ids, ngram_size):
    return History(num_prompt_ids, has_counts=True, has_output_counts=True, ngram_size=ngram_size)


def counts(found):
    return dict(zip(found.ids.tolist(), found.numbers.tolist(), strict=True))


def check(history, token_ids, num_prompt_ids, ngram_size):
    assert list(history.token_ids) == token_ids
    assert history.array.tolist() == token_ids
    assert history.num_output_ids == len(token_ids) - num_prompt_ids
    assert counts(history.seen) == Counter(token_ids)
    assert counts(history.output) == Counter(token_ids[num_prompt_ids:])
    starts = range(len(token_ids) - ngram_size + 1)
    ngrams = [token_ids[start : start + ngram_size] for start in starts]
    before = token_ids[len(token_ids) - ngram_size + 1 :]
    followers = {ngram[-1] for ngram in ngrams if ngram[:-1] == before}
    has_enough = len(token_ids) >= ngram_size
    assert set(history.ngrams.followers(token_ids)) == (followers if has_enough else set())


@given(TOKEN_IDS, MOVES, st.integers(2, 4))
def test_a_growing_list_with_paths_that_come_and_go(prompt_ids, moves, ngram_size):
    history, token_ids = new_history(len(prompt_ids), ngram_size), list(prompt_ids)
    for emitted, path in moves:
        token_ids += emitted
        history.move_to(token_ids, path)
        check(history, token_ids + path, len(prompt_ids), ngram_size)
        assert history.source == (token_ids, path)


@given(st.lists(st.tuples(TOKEN_IDS, TOKEN_IDS), max_size=8), st.integers(0, 5))
def test_any_lists_in_any_order(moves, num_prompt_ids):
    """Other lists than the last one, longer or shorter, with the same beginning or not."""
    history = new_history(num_prompt_ids, 2)
    for token_ids, path in moves:
        history.move_to(token_ids, path)
        check(history, token_ids + path, num_prompt_ids, 2)


@given(TOKEN_IDS, TOKEN_IDS, TOKEN_IDS)
def test_tokens_of_a_path_may_be_emitted(prompt_ids, path, other_path):
    history, token_ids = new_history(len(prompt_ids), 3), list(prompt_ids)
    history.move_to(token_ids, path)
    token_ids += path[:2]
    history.move_to(token_ids, path[2:])
    check(history, prompt_ids + path, len(prompt_ids), 3)
    history.move_to(token_ids, tuple(other_path))
    check(history, token_ids + other_path, len(prompt_ids), 3)


def test_a_list_that_was_cut_is_read_anew():
    history, token_ids = new_history(1, 2), [1, 2, 3, 4]
    history.move_to(token_ids)
    del token_ids[2:]
    history.move_to(token_ids)
    check(history, [1, 2], 1, 2)
    token_ids += [5, 6]
    history.move_to(token_ids)
    check(history, [1, 2, 5, 6], 1, 2)


def test_what_nobody_looks_at_is_not_kept():
    history = History(1)
    history.move_to([1, 2, 3], [4])
    assert (history.seen, history.output, history.ngrams) == (None, None, None)
    assert list(history.token_ids) == [1, 2, 3, 4]


class CountingList(list):
    """A list that counts how many of its items are read."""

    num_read = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.num_read += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self):
        self.num_read += len(self)
        return super().__iter__()


@pytest.mark.parametrize("length", [100, 30_000])
def test_a_long_history_costs_what_is_new(length):
    token_ids = CountingList(index % 997 for index in range(length))
    history = new_history(10, 3)
    history.move_to(token_ids)
    token_ids.num_read = 0
    for step in range(50):
        token_ids += [step, step + 1]
        history.move_to(token_ids, [1, 2, 3])
        history.move_to(token_ids, [1, 7])
    # Two new tokens, and the end that tells that the list is the same, once for each call.
    assert token_ids.num_read == 50 * (2 + 2)
