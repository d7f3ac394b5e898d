"""The drafter `rest`: what it retrieves, and datastores as files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.core.draft import DraftBudget
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.drafters.base import DraftContext
from foretoken.drafters.datastore import FILE_KIND, Datastore
from foretoken.drafters.rest import RestDrafter, RestOptions
from foretoken.drafters.token_files import vocabulary_digest, write_token_file
from foretoken.errors import ConfigError
from tests.drafters.test_copying import plain_tree, shape
from tests.engines import make_host, micro_model
from tests.fakes import ASCII_ALPHABET, ByteTokenizer

SAMPLER = Sampler(SamplingParams(), 0, 1)
TOKENIZER = ByteTokenizer()


def draft_of(texts, token_ids, max_nodes=16, max_width=None, **options):
    drafter = RestDrafter(RestOptions(path="unused", **options), Datastore.build(texts))
    budget = DraftBudget(max_nodes=max_nodes, max_depth=max_nodes, max_width=max_width)
    context = DraftContext(request_id="r", token_ids=token_ids, sampler=SAMPLER, budget=budget)
    [draft] = drafter.propose([context])
    return draft


# -- retrieval -------------------------------------------------------------------------------


def searched(texts, query, min_match):
    """Return the length of the longest match and what follows it, place by place."""
    for size in range(min(len(query), 16), min_match - 1, -1):
        run = query[len(query) - size :]
        rests = [
            text[start + size :]
            for text in texts
            for start in range(len(text) - size + 1)
            if text[start : start + size] == run
        ]
        if rests:
            return size, rests
    return 0, []


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=6),
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
    st.integers(1, 3),
    st.integers(1, 12),
)
def test_tree_equals_a_plain_search(texts, query, min_match, max_nodes):
    draft = draft_of(texts, query, max_nodes, min_match=min_match, max_depth=4)
    length, rests = searched(texts, query, min_match)
    # In the order of the suffix array: by what follows, then by place.
    rests.sort(key=lambda rest: [*rest[: 16 - length], -1][: 16 - length])
    followers = [
        lambda path, rest=rest: rest[len(path)] if len(path) < len(rest) else None for rest in rests
    ]
    limits = shape(max_nodes, max_nodes, max_nodes, 0.0, 4, 0.02)
    expected = [path for path, _, _ in plain_tree(followers, length, limits)]
    assert draft.tree.sequences == {(query[-1],)} | {(query[-1], *path) for path in expected}


def test_the_longest_match_decides():
    texts = [[1, 2, 3, 7], [2, 3, 8], [2, 3, 8], [3, 9]]
    assert draft_of(texts, [1, 2, 3]).tree.token_ids == (3, 7)
    assert draft_of(texts, [5, 2, 3], max_nodes=1).tree.token_ids == (3, 8)


def test_short_matches_do_not_count():
    assert draft_of([[3, 9]], [5, 3]).tree.num_draft_tokens == 0
    assert draft_of([[3, 9]], [5, 3], min_match=1).tree.token_ids == (3, 9)


def test_texts_do_not_run_into_each_other():
    assert draft_of([[1, 2], [3, 4]], [1, 2], min_match=1).tree.num_draft_tokens == 0


def test_of_many_occurrences_an_even_share_is_counted():
    texts = [[1, 2, follower] for follower in (5, 6) for _ in range(500)]
    draft = draft_of(texts, [1, 2], max_places=10)
    assert draft.tree.sequences == {(2,), (2, 5), (2, 6)}
    assert draft.draft_logprobs[1] == draft.draft_logprobs[2]


def test_the_widest_node_keeps_to_the_budget():
    texts = [[1, 2, follower, 3] for follower in range(4, 9)]
    draft = draft_of(texts, [1, 2], max_width=2)
    assert max(map(len, draft.tree.children)) == 2


# -- the file --------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "datastore"
    Datastore.build([[1, 2, 3], [4, 5]]).save(path, TOKENIZER)
    return path


def test_a_datastore_that_was_saved_is_loaded(path):
    loaded = Datastore.load(path, 64, TOKENIZER)
    assert loaded.tokens.tolist() == [1, 2, 3, -1, 4, 5, -1]
    built = Datastore.build([[1, 2, 3], [4, 5]])
    np.testing.assert_array_equal(loaded.array, built.array)


def test_other_vocabularies_are_refused(path):
    with pytest.raises(ConfigError, match="another vocabulary") as caught:
        Datastore.load(path, 64, ByteTokenizer(ASCII_ALPHABET[::-1]))
    assert "foretoken datastore build" in caught.value.hint
    with pytest.raises(ConfigError, match="token id 5; the target's are below 5"):
        Datastore.load(path, 5, TOKENIZER)


def test_damaged_datastores_are_refused(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(ConfigError, match="checksum is wrong"):
        Datastore.load(path, 64, TOKENIZER)


@pytest.mark.parametrize(
    ("tokens", "array"),
    [([1, 2, -1], [0, 1, 3]), ([1, 2, -1], [0, 1, -1]), ([1, 2, 3], [0, 1, 2]), ([], [])],
)
def test_whole_files_that_make_no_sense_are_refused(tmp_path, tokens, array):
    """Checksums are right and places are not: reading them would leave the array."""
    path = tmp_path / "it"
    arrays = [np.array(tokens, np.int32), np.array(array, np.int32)]
    write_token_file(path, FILE_KIND, vocabulary_digest(64, TOKENIZER), arrays)
    with pytest.raises(ConfigError, match="points outside its own texts"):
        Datastore.load(path, 64, TOKENIZER)


def test_a_datastore_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="got 0"):
        Datastore.build([[], []])


def test_the_drafter_needs_a_tokenizer(path):
    options = RestOptions(path=str(path))
    with pytest.raises(ConfigError, match="needs the target's tokenizer"):
        RestDrafter.create(options, make_host(micro_model()))
    host = make_host(micro_model(), tokenizer=TOKENIZER)
    assert isinstance(RestDrafter.create(options, host), RestDrafter)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_match": 0}, "1 <= min_match <= max_match <= 16; got 0"),
        ({"max_match": 17}, "got 2 and 17"),
        ({"max_places": 0}, "max_places is at least 1"),
        ({"max_depth": 0}, "max_depth is at least 1"),
        ({"min_prob": -0.1}, "min_prob is from 0 to 1"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RestOptions(path="it", **values)
