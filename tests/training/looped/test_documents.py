"""Texts: read, split without copies, cut into rows that hold every token once an epoch."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken.errors import ConfigError
from foretoken.training.looped.documents import (
    TokenRows,
    encode_texts,
    read_texts,
    split_texts,
)

TEXTS = [f"Story {number}: a tale of {number * number} ducks." for number in range(400)]


def test_files_hold_texts(tmp_path):
    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("One\ntwo.\n<|endoftext|>\nThree.\n<|endoftext|>\n", encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Four", "Fünf")))
    assert read_texts([plain, lines]) == ["One\ntwo.", "Three.", "Four", "Fünf"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "'none.txt' cannot be read: No such file"),
        ("bytes.txt", b"\xff\xfe", "'bytes.txt' cannot be read: it is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "'a.jsonl' has a line that is no JSON object"),
        ("b.jsonl", b'{"words": "a"}\n', "'b.jsonl' has a line that is no JSON object"),
        ("c.jsonl", b"once\n", "'c.jsonl' has a line that is no JSON object"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_texts([tmp_path / name])


def test_texts_are_held_out_by_their_opening():
    split = split_texts(TEXTS)
    assert sorted([*split.train, *split.held_out]) == sorted(TEXTS)
    assert 3 <= len(split.held_out) <= 25  # 12 of 400 are expected
    # Order, and what else there is, do not move a text to the other side.
    assert set(split_texts([*TEXTS[::-1], "More."]).held_out) == set(split.held_out)
    assert split_texts(TEXTS).fingerprint() == split.fingerprint()
    assert split_texts(TEXTS[1:]).fingerprint() != split.fingerprint()


def test_versions_of_a_text_are_one_or_on_one_side():
    opening = "It was a long and quiet day in the wood, and nobody had seen the old grey owl for "
    versions = [opening + end for end in ("weeks.", "years, they said.", "WEEKS!")]
    split = split_texts([*TEXTS, *versions])
    kept = [[it for it in side if it.startswith(opening)] for side in (split.train, split.held_out)]
    assert sorted(map(len, kept)) == [0, 2]


def test_given_held_out_texts_lose_what_is_trained_on():
    ending = (
        " and so they all went home to sleep, and dreamt of nothing but ducks, and of a pond " * 2
    )
    train = ["Once" + ending, "Twice."]
    split = split_texts(train, ["Another, but" + ending, "New.", "New!", "Twice"])
    assert split.train == train
    assert split.held_out == ["New!"]
    with pytest.raises(ConfigError, match="there are 2 and 0"):
        split_texts(train, ["twice"])


class Letters:
    def encode(self, text):
        return [ord(letter) for letter in text]


def test_texts_end():
    assert encode_texts(["ab", "c"], Letters(), 7) == [[97, 98, 7], [99, 7]]
    assert encode_texts(["ab"], Letters(), None) == [[97, 98]]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    context=st.integers(1, 5),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_an_epoch_predicts_every_token_once(lengths, context, batch_size, seed):
    texts, first = [], 0
    for length in lengths:
        texts.append(list(range(first, first + length)))
        first += length
    if (first - 1) // (context * batch_size) < 1:
        with pytest.raises(ConfigError, match=f"have {first} tokens"):
            TokenRows(texts, context, batch_size, seed)
        return
    rows = TokenRows(texts, context, batch_size, seed)
    num_steps = rows.num_steps_per_epoch
    batches = [rows.batch(step) for step in range(2 * num_steps)]
    assert all(batch.shape == (batch_size, context + 1) for batch in batches)
    for epoch in (batches[:num_steps], batches[num_steps:]):
        predicted = torch.cat([batch[:, 1:].flatten() for batch in epoch]).tolist()
        assert len(set(predicted)) == len(predicted) == num_steps * batch_size * context
        asked = torch.cat([batch[:, :-1].flatten() for batch in epoch]).tolist()
        assert asked[1:] == predicted[:-1]
    # A step's batch does not depend on what was asked before.
    fresh = TokenRows(texts, context, batch_size, seed)
    for step in reversed(range(2 * num_steps)):
        assert torch.equal(fresh.batch(step), batches[step])


def test_texts_stay_whole_and_change_places():
    texts = [[number, number, number] for number in range(50)]
    rows = TokenRows(texts, 149, 1, seed=3)
    one, other = rows.batch(0)[0], rows.batch(1)[0]
    assert not torch.equal(one, other)
    assert not torch.equal(one, TokenRows(texts, 149, 1, seed=4).batch(0)[0])
    for stream in (one, other):
        assert stream.view(50, 3).unique(dim=1).shape == (50, 1)
