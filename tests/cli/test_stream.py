"""Which part of streamed text each token gave."""

from types import SimpleNamespace

import pytest

from foretoken.cli.stream import Painter
from foretoken.cli.terminal import ACCEPTED, OWN
from tests.fakes import UTF8_ALPHABET, ByteTokenizer

TOKENIZER = ByteTokenizer(UTF8_ALPHABET)


def chunk(text, token_ids, sources):
    return SimpleNamespace(text=text, token_ids=token_ids, sources=sources)


def painted(chunks):
    painter = Painter(TOKENIZER.decode, TOKENIZER.encode("So "))
    return [piece for item in chunks for piece in painter.pieces(item)]


def test_each_token_has_the_style_of_its_source():
    ids = TOKENIZER.encode("abc")
    assert painted([chunk("abc", ids, ("drafter", "drafter", ""))]) == [
        ("a", ACCEPTED),
        ("b", ACCEPTED),
        ("c", OWN),
    ]


def test_a_character_of_several_tokens_belongs_to_the_last():
    ids = TOKENIZER.encode("a世b")
    pieces = painted([
        chunk("a", ids[:3], ("", "drafter", "")),
        chunk("世b", ids[3:], ("drafter", "")),
    ])  # fmt: skip
    assert pieces == [("a", OWN), ("世", ACCEPTED), ("b", OWN)]


def test_text_may_lag_behind_its_tokens():
    ids = TOKENIZER.encode("abc")
    pieces = painted([
        chunk("a", ids[:2], ("drafter", "")),
        chunk("bc", ids[2:], ("drafter",)),
    ])  # fmt: skip
    assert pieces == [("a", ACCEPTED), ("b", OWN), ("c", ACCEPTED)]


def test_text_without_tokens_is_shown_all_the_same():
    ids = TOKENIZER.encode("世")
    assert painted([chunk("\ufffd", ids[:1], ("drafter",))]) == [("\ufffd", OWN)]


@pytest.mark.parametrize("text", ["", "ab", "a世🙂é", "🙂"])
def test_no_text_is_lost(text):
    ids = TOKENIZER.encode(text)
    items = [chunk(text if index == len(ids) - 1 else "", [token_id], ("",)) for index, token_id in
             enumerate(ids)]  # fmt: skip
    assert "".join(part for part, _ in painted(items)) == text
