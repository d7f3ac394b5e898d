"""Text that arrives token by token: stop texts, characters cut in two, spaces, special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretoken.engine.text import TextStream
from tests.fakes import UTF8_ALPHABET, ByteTokenizer

BYTES = ByteTokenizer(UTF8_ALPHABET)
PIECES = ["ab", "c", "STO", "P", "!", " x", "S", "abS"]
SPECIAL = len(PIECES)


def decode_pieces(token_ids):
    return "".join(PIECES[token_id] for token_id in token_ids if token_id != SPECIAL)


def decode_words(token_ids):
    """Decode as SentencePiece does: no space before the first word of a text."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


def run(decode, token_ids, *, stop=(), prompt_ids=(), sizes=None):
    """Push token ids in chunks; return the taken chunks and after how many tokens it stopped."""
    stream = TextStream(decode, list(prompt_ids), stop)
    taken, start = [], 0
    for size in sizes or [1] * len(token_ids):
        chunk = token_ids[start : start + size]
        found = stream.push(chunk)
        taken.append(stream.take())
        if found is not None:
            taken.append(stream.finish())
            assert stream.text == "".join(taken)
            return taken, start + found
        start += size
    taken.append(stream.finish())
    assert stream.text == "".join(taken)
    return taken, None


def text_of(*args, **kwargs):
    return "".join(run(*args, **kwargs)[0])


# -- stop texts ------------------------------------------------------------------------------


def test_stop_text_across_token_borders_ends_the_text_before_it():
    taken, stopped_after = run(decode_pieces, [0, 2, 3, 1], stop=("STOP",))
    assert ("".join(taken), stopped_after) == ("ab", 3)


def test_stop_text_inside_one_token_keeps_what_stands_before_it():
    taken, stopped_after = run(decode_pieces, [1, 7, 0], stop=("bS",))
    assert ("".join(taken), stopped_after) == ("ca", 2)


def test_stop_is_found_within_a_chunk_of_several_tokens():
    for sizes in ([4], [1, 3], [3, 1], [2, 2]):
        taken, stopped_after = run(decode_pieces, [0, 2, 3, 1], stop=("STOP",), sizes=sizes)
        assert ("".join(taken), stopped_after) == ("ab", 3)


def test_the_first_of_several_stop_texts_counts():
    taken, stopped_after = run(decode_pieces, [0, 1, 2, 3], stop=("STOP", "bc", "cST"))
    assert ("".join(taken), stopped_after) == ("a", 2)
    # Both are complete with the same token: the one that begins first.
    assert text_of(decode_pieces, [0, 2, 3], stop=("P", "STOP")) == "ab"
    assert text_of(decode_pieces, [0, 2, 3], stop=("STOP", "P")) == "ab"


def test_what_may_become_a_stop_text_is_held_back():
    taken, _ = run(decode_pieces, [0, 2, 1, 2, 4], stop=("STOP", "O!!"))
    assert taken == ["ab", "", "STOc", "", "ST", "O!"]


def test_held_back_text_comes_with_the_end():
    taken, stopped_after = run(decode_pieces, [0, 2], stop=("STOP",))
    assert (taken, stopped_after) == (["ab", "", "STO"], None)


def test_overlapping_beginnings_of_a_stop_text():
    stream_text = text_of(decode_pieces, [6, 2, 3], stop=("SSTOP",))
    assert stream_text == ""
    assert text_of(decode_pieces, [6, 6, 2, 3, 1], stop=("STOP",)) == "SS"


def test_stop_texts_in_the_prompt_do_not_count():
    assert text_of(decode_pieces, [3, 1], stop=("STOP",), prompt_ids=[0, 2]) == "Pc"


def test_stop_text_beyond_ascii():
    token_ids = BYTES.encode("abc 世é🙂 tail")
    assert text_of(BYTES.decode, token_ids, stop=("é🙂",)) == "abc 世"


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
    st.lists(st.text("abcSTOP!", min_size=1, max_size=4), max_size=3),
    st.randoms(),
)
def test_streamed_text_is_the_whole_text_cut_at_the_first_stop(token_ids, stop, rng):
    sizes = []
    while sum(sizes) < len(token_ids):
        sizes.append(rng.randint(1, 4))
    taken, stopped_after = run(decode_pieces, token_ids, stop=tuple(stop), sizes=sizes)
    # Plain reading: the shortest prefix of tokens whose text holds a stop text.
    for count in range(len(token_ids) + 1):
        text = decode_pieces(token_ids[:count])
        found = [text.find(item) for item in stop if item in text]
        if found:
            assert ("".join(taken), stopped_after) == (text[: min(found)], count)
            return
    assert ("".join(taken), stopped_after) == (decode_pieces(token_ids), None)


# -- characters, spaces, special tokens ------------------------------------------------------


def test_characters_split_over_tokens_come_whole():
    text = "é世 🙂!é"
    taken, _ = run(BYTES.decode, BYTES.encode(text))
    assert "".join(taken) == text
    assert all("\ufffd" not in chunk for chunk in taken)
    assert [chunk for chunk in taken if chunk] == list(text)


def test_an_unfinished_character_is_shown_at_the_end_only():
    token_ids = BYTES.encode("a🙂")[:-1]
    taken, _ = run(BYTES.decode, token_ids)
    assert taken[:-1] == ["a", "", "", ""]
    assert set(taken[-1]) == {"\ufffd"}


@given(st.text("ab,é世🙂", max_size=12), st.text("ab,é世🙂", max_size=6), st.randoms())
def test_any_text_survives_any_chunks(text, prompt, rng):
    token_ids, sizes = BYTES.encode(text), []
    while sum(sizes) < len(token_ids):
        sizes.append(rng.randint(1, 5))
    assert text_of(BYTES.decode, token_ids, prompt_ids=BYTES.encode(prompt), sizes=sizes) == text


@given(st.lists(st.integers(0, 60), max_size=12), st.lists(st.integers(0, 60), max_size=8))
def test_bytes_that_are_no_text_decode_as_they_do_in_one_piece(token_ids, prompt_ids):
    prompt_text = BYTES.decode(prompt_ids)
    if prompt_text.endswith("\ufffd"):
        return  # the output may complete the prompt's last character
    whole = BYTES.decode([*prompt_ids, *token_ids])
    assert text_of(BYTES.decode, token_ids, prompt_ids=prompt_ids) == whole[len(prompt_text) :]


@given(st.lists(st.integers(0, 60), max_size=24), st.lists(st.integers(0, 60), max_size=8))
def test_text_that_nobody_reads_while_it_grows_is_the_same(token_ids, prompt_ids):
    if BYTES.decode(prompt_ids).endswith("\ufffd"):
        return
    stream = TextStream(BYTES.decode, prompt_ids, ())
    for token_id in token_ids:
        stream.push([token_id])
    assert stream.finish() == stream.text == text_of(BYTES.decode, token_ids, prompt_ids=prompt_ids)


def test_tokens_are_decoded_when_their_text_is_read():
    decoded = []
    stream = TextStream(lambda ids: decoded.append(ids) or decode_pieces(ids), [0], ())
    stream.push([1])
    stream.push([4])
    assert not decoded
    assert stream.text == "c!"


def test_leading_space_is_kept():
    assert text_of(decode_words, [4, 5], prompt_ids=[1, 2, 3]) == " w4 w5"
    assert text_of(decode_words, [4, 5], prompt_ids=list(range(40))) == " w4 w5"


def test_special_tokens_have_no_text_and_disturb_none():
    assert text_of(decode_pieces, [0, SPECIAL, 1, SPECIAL, SPECIAL, 5]) == "abc x"
    assert text_of(decode_pieces, [0, SPECIAL, 2, SPECIAL, 3, 1], stop=("STOP",)) == "ab"
    assert text_of(decode_pieces, [SPECIAL]) == ""


def test_no_tokenizer_gives_no_text_and_no_stop():
    assert run(None, [1, 2, 3]) == ([""] * 4, None)


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_nothing_is_taken_twice(stop):
    stream = TextStream(decode_pieces, [], stop)
    stream.push([0, 1])
    assert (stream.take(), stream.take()) == ("abc", "")
    stream.push([1])
    assert (stream.take(), stream.finish(), stream.finish()) == ("c", "", "")
