"""Text between two vocabularies: what tokens spell, and a growing context in other tokens.

Tokens are compared by the bytes that they spell. That is the one form which byte-level and
sentencepiece vocabularies share, and it is exact where a token is a part of a character.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from foretoken.errors import ModelError
from foretoken.models.tokenizer import Tokenizer

# A context is encoded in pieces that end between two words, where tokenizers begin a new token.
# Where a piece ends depends on the text alone, so that a context has one encoding, however it
# grew. Short pieces, because the last one is encoded and fed anew in every step.
MIN_PIECE, MAX_PIECE = 24, 96  # characters
_BETWEEN_WORDS = re.compile(r"(?<=\w)(?=\s[^\W\d_])")
# Encoded before a piece, because at the beginning of a text some tokenizers add a space. Which
# one depends on the piece: it must not become a part of the piece's first token.
_BEFORE_SPACE, _BEFORE_WORD = "a", "\n"

LOOK_BEHIND = 8  # tokens of the context with which its continuation is encoded

_NUM_SAMPLED = 128  # tokens by which a vocabulary is judged
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """A tokenizer as a table of what its tokens spell, and as an encoder of pieces of text.

    Args:
        tokenizer: Any; one of the tokenizers library is asked directly.
        name: Of its model, for messages.
        vocab_size: V of the model; tokens from there on do not count.

    Attributes:
        name: As given.
        spellings: The bytes of each token id, [V]; none for special tokens and ids without token.
        special_ids: Ids of special tokens, by name.
        start_ids: Special tokens that a text begins with.
        adds_space: Whether the tokenizer puts a space before a text.

    Raises:
        ModelError: Tokens decode to something else than what they seem to spell.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, vocab_size: int) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._fast = tokenizer.fast_tokenizer
        self._ids = {
            piece: token_id
            for piece, token_id in tokenizer.vocabulary.items()
            if token_id < vocab_size
        }
        self.special_ids = self._find_special()
        self._special = frozenset(self.special_ids.values())
        is_byte_level = self._fast is not None and "ByteLevel" in repr(self._fast.decoder)
        self.spellings = [b""] * vocab_size
        for piece, token_id in self._ids.items():
            if token_id not in self._special:
                self.spellings[token_id] = _spell(piece, is_byte_level)
        self._check_spellings()
        encoded = tokenizer.encode("a")  # it also ends a truncation that came with the file
        plain = [at for at, token_id in enumerate(encoded) if token_id not in self._special]
        self.start_ids = encoded[: plain[0]] if plain else []
        self.adds_space = self.spell(encoded).startswith(b" ")

    def spell(self, token_ids: Sequence[int]) -> bytes:
        """Return the bytes of some tokens."""
        return b"".join([self.spelling(token_id) for token_id in token_ids])

    def spelling(self, token_id: int) -> bytes:
        """Return the bytes of one token; none for an id that is none of the vocabulary."""
        return self.spellings[token_id] if 0 <= token_id < len(self.spellings) else b""

    def is_special(self, token_id: int) -> bool:
        """Return whether a token stands for no text."""
        return token_id in self._special

    def encode_start(self, text: str) -> list[int]:
        """Return the tokens of the beginning of a text, without what is put around it."""
        if self._fast is not None:
            ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
            return [token_id for token_id in ids if token_id < len(self.spellings)]
        return [token_id for token_id in self._tokenizer.encode(text) if self.spelling(token_id)]

    def encode_inner(self, text: str) -> list[int]:
        """Return the tokens of a text that stands inside a longer one."""
        if not text:
            return []
        before = _BEFORE_SPACE if text[0].isspace() else _BEFORE_WORD
        known, encoded = self._before[before], self.encode_start(before + text)
        if encoded[: len(known)] == known:
            return encoded[len(known) :]
        return self.encode_start(text)

    @cached_property
    def _before(self) -> dict[str, list[int]]:
        return {text: self.encode_start(text) for text in (_BEFORE_SPACE, _BEFORE_WORD)}

    @cached_property
    def id_of(self) -> dict[bytes, int]:
        """The token that spells some bytes: of several the one that text is encoded with."""
        ids: dict[bytes, int] = {}
        # <0x41> is for what no other token spells.
        for _, token_id in sorted(self._ids.items(), key=_byte_pieces_last):
            if self.spellings[token_id]:
                ids.setdefault(self.spellings[token_id], token_id)
        return ids

    def tokens_per_token(self, other: Vocabulary) -> float:
        """Return how many tokens of another vocabulary one of these takes on average, at least 1.

        Of all tokens alike, not as often as they are said: more than in a text.
        """
        texts = [text for _, text in self._sample()]
        lengths = [len(other.encode_inner(text)) for text in texts]
        return max(1.0, sum(lengths) / max(1, len(lengths)))

    def _sample(self) -> list[tuple[int, str]]:
        """Return some tokens that are text, from all over the vocabulary."""
        step = max(1, len(self.spellings) // _NUM_SAMPLED)
        sampled = [(at, _as_text(self.spellings[at])) for at in range(0, len(self.spellings), step)]
        return [(token_id, text) for token_id, text in sampled if text]

    def _find_special(self) -> dict[str, int]:
        if self._fast is not None:
            added = self._fast.get_added_tokens_decoder()
            return {token.content: token_id for token_id, token in added.items() if token.special}
        # Special tokens have no text; a space alone may be taken away at the beginning of one.
        return {
            piece: token_id
            for piece, token_id in self._ids.items()
            if not self._tokenizer.decode([token_id]) and _spell(piece, False) != b" "
        }

    def _check_spellings(self) -> None:
        # In pairs, because some tokenizers write a token differently at the beginning of a text.
        pairs = list(pairwise(self._sample()))
        decoded = [
            (one + two, self._tokenizer.decode([first, second]))
            for (first, one), (second, two) in pairs
        ]
        wrong = [(text, found) for text, found in decoded if text.strip() != found.strip()]
        if 2 * len(wrong) > len(pairs):
            raise ModelError(
                f"the tokenizer of {self.name!r} is of an unknown kind: tokens that seem to "
                f"spell {wrong[0][0]!r} decode to {wrong[0][1]!r}",
                hint="use a draft model with the target's own tokens (drafter draft-model), or a "
                "drafter without a model such as prompt-lookup",
            )


def _byte_pieces_last(item: tuple[str, int]) -> tuple[bool, int]:
    piece, token_id = item
    return _BYTE_PIECE.fullmatch(piece) is not None, token_id


def _spell(piece: str, is_byte_level: bool) -> bytes:
    """Return the bytes for which a vocabulary's entry stands."""
    if is_byte_level and all(char in _BYTE_OF for char in piece):
        return bytes([_BYTE_OF[char] for char in piece])
    found = None if is_byte_level else _BYTE_PIECE.fullmatch(piece)
    if found:
        return bytes([int(found[1], 16)])
    return piece.replace("\u2581", " ").encode()  # sentencepiece's sign for a space


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte for which each character of a byte-level vocabulary stands.

    Printable ones stand for themselves, the others are moved up by 256 in order.
    Source: GPT-2's encoder, `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {**{chr(byte): byte for byte in printable}, **moved}


_BYTE_OF = _byte_level_alphabet()


def _as_text(spelling: bytes) -> str | None:
    """Return the text that some bytes are, None if they are not whole characters."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return None


def shared_tokens(target: Vocabulary, draft: Vocabulary) -> dict[int, int]:
    """Return the tokens with text that both vocabularies have: the draft's ids, by the target's.

    One-to-one: each spelling has one token on either side.
    """
    return {
        target_id: draft.id_of[spelling]
        for spelling, target_id in target.id_of.items()
        if spelling in draft.id_of
    }


def pair_special(
    target: Vocabulary,
    draft: Vocabulary,
    target_eos_ids: Collection[int],
    draft_eos_ids: Collection[int],
) -> dict[int, int]:
    """Return the special tokens that mean the same in both: the draft's ids, by the target's.

    Those of one name, and the ends of sequences if these have no name in common. One-to-one.
    """
    pairs = {
        target_id: draft.special_ids[name]
        for name, target_id in target.special_ids.items()
        if name in draft.special_ids
    }
    if target_eos_ids and draft_eos_ids:
        target_id, draft_id = min(target_eos_ids), min(draft_eos_ids)
        if not pairs.keys() & set(target_eos_ids) and draft_id not in pairs.values():
            pairs[target_id] = draft_id
    return pairs


class Retokenizer:
    """One request's context in the draft model's tokens; it follows the context as it grows.

    The result is a function of the context alone, whatever the steps in which it grew.

    Args:
        target: Of the context's tokens.
        draft: Of the tokens wanted.
        special: The draft's ids of special tokens, by the target's; others are left out.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary, special: Mapping[int, int]) -> None:
        self._target, self._draft, self._special = target, draft, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_taken = 0
        self._closed = list(draft.start_ids)
        self._open = ""  # text after the last piece that is closed
        self._is_start = True  # whether no piece of text is closed yet
        self._has_added_space = target.adds_space  # still to come, at the beginning of the text

    @property
    def num_closed(self) -> int:
        """Tokens that stand whatever follows."""
        return len(self._closed)

    def take(self, token_ids: Sequence[int]) -> None:
        """Take in what is new of a context, which only grows."""
        spelled: list[bytes] = []
        for token_id in token_ids[self._num_taken :]:
            if self._target.is_special(token_id):
                self._add_text(b"".join(spelled))
                spelled = []
                self._add_special(token_id)
            else:
                spelled.append(self._target.spelling(token_id))
        self._add_text(b"".join(spelled))
        self._num_taken = len(token_ids)

    def encode(self) -> list[int]:
        """Return the context in the draft's tokens, none if they do not end where it ends.

        That is so after a part of a character, and where the draft's tokenizer changes or leaves
        out what it is given: a draft would continue another text.
        """
        ids = self._encode_open()
        is_part = bool(self._utf8.getstate()[0])
        if is_part or (self._open and not self._ends_alike(ids)):
            return []
        return [*self._closed, *ids]

    def _add_text(self, spelled: bytes) -> None:
        text = self._utf8.decode(spelled)
        if text and self._has_added_space:
            self._has_added_space = False
            text = text.removeprefix(" ")
        self._open += text
        while (end := _piece_end(self._open)) is not None:
            self._close(end)

    def _add_special(self, token_id: int) -> None:
        has_begun = not self._is_start or bool(self._open)
        self._close(len(self._open))
        # A context often begins with what the target's tokenizer adds; the draft's stands there.
        is_added = not has_begun and token_id in self._target.start_ids
        if token_id in self._special and not is_added:
            self._closed.append(self._special[token_id])

    def _close(self, end: int) -> None:
        if not end:
            return
        rest, self._open = self._open[end:], self._open[:end]
        self._closed += self._encode_open()
        self._open, self._is_start = rest, False

    def _encode_open(self) -> list[int]:
        if self._is_start:
            return self._draft.encode_start(self._open) if self._open else []
        return self._draft.encode_inner(self._open)

    def _ends_alike(self, ids: Sequence[int]) -> bool:
        last = self._draft.spelling(ids[-1]) if ids else b""
        text = f" {self._open}" if self._is_start else self._open  # a space may be added there
        return bool(last) and text.encode().endswith(last)


def _piece_end(text: str) -> int | None:
    """Return where the first piece of a text ends, None if that depends on what follows."""
    found = _BETWEEN_WORDS.search(text, MIN_PIECE, MAX_PIECE + 2)
    if found:
        return found.start()
    return MAX_PIECE if len(text) >= MAX_PIECE + 2 else None


def text_behind(vocabulary: Vocabulary, context_ids: Sequence[int]) -> bytes:
    """Return what the last tokens of a context spell, from the first whole character on."""
    behind: list[bytes] = []
    for token_id in reversed(context_ids[-LOOK_BEHIND:]):
        spelling = vocabulary.spelling(token_id)
        if not spelling:  # a special token: text begins anew after it
            break
        behind.append(spelling)
    return b"".join(reversed(behind)).decode(errors="ignore").encode()


def continue_ids(vocabulary: Vocabulary, behind: bytes, spelled: bytes) -> list[tuple[int, int]]:
    """Return the tokens of a text after a context, each with where it ends in `spelled`, in bytes.

    Nothing is returned where the last token of the context would become another one: a text that
    goes on like this has other tokens already. What the tokenizer does not encode as it stands is
    left out, with all after it.

    Args:
        vocabulary: Of the context, and of the tokens wanted.
        behind: The end of the context, as by `text_behind`; it is encoded along.
        spelled: What follows; a part of a character at its end is left out.
    """
    whole = behind + spelled
    found: list[tuple[int, int]] = []
    position = 0
    for token_id in vocabulary.encode_inner(whole.decode(errors="ignore")):
        spelling = vocabulary.spelling(token_id)
        start, position = position, position + len(spelling)
        if not spelling or whole[start:position] != spelling or start < len(behind) < position:
            break
        if start >= len(behind):
            found.append((token_id, position - len(behind)))
    return found
